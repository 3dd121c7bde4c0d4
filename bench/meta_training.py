"""A segment of meta-training on the paper's MNIST network, and its peak memory in a process of its own:
``python bench/meta_training.py fused|eager first|second T``.

Images are random, so no data is needed; nothing here depends on what they show. Prints the bytes by which the resident
set rose at most above what it was before. Linux only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from memory import resident
from torch import Tensor

import l2l_fast
from l2l_fast.datasets import Dataset
from l2l_fast.experiments.speed import eager_step, zero_state
from l2l_fast.problems.classification import ImageClassifier, ImageClassifierInstances

COORDINATES = 784 * 20 + 20 + 20 * 10 + 10


def network(hidden: int = 20, batch: int = 1, device: torch.device | None = None) -> ImageClassifierInstances:
    """So many networks of 784-20-10 units, one by default, with minibatches of 128 images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1000, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (1000,), generator=generator)
    data = Dataset("random", images, labels, images, labels, classes=10, largest=255)
    return ImageClassifierInstances(ImageClassifier("mnist", hidden=(hidden,)), data, batch, device)


def fused(rule: l2l_fast.CoordinatewiseLSTM, instances: ImageClassifierInstances, steps: int, order: str) -> Tensor:
    """The meta-loss."""
    generator = torch.Generator().manual_seed(0)
    return l2l_fast.unroll(rule, instances, steps, generator=generator, second_derivatives=order == "second").loss


def eager(rule: l2l_fast.CoordinatewiseLSTM, instances: ImageClassifierInstances, steps: int, order: str) -> Tensor:
    """The same as PyTorch users write it: two ``nn.LSTMCell`` and a ``nn.Linear`` at each step, all on one tape."""
    generator = torch.Generator().manual_seed(0)
    params = {name: tensor.requires_grad_() for name, tensor in instances.init(generator=generator).items()}
    sizes = [tensor.numel() for tensor in params.values()]
    step, state = eager_step(rule), zero_state(rule, sum(sizes))
    total = torch.zeros(())
    for t in range(steps + 1):
        loss = instances.loss(params, generator=generator).mean()
        total = total + loss
        if t == steps:
            break
        second = order == "second"
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, create_graph=second)
        grad = torch.cat([block.reshape(-1) for block in grads])
        update, state = step(grad if second else grad.detach(), state)
        blocks = torch.split(update, sizes)
        params = {name: old + block.view_as(old) for (name, old), block in zip(params.items(), blocks, strict=True)}
    return total


SEGMENTS = {"fused": fused, "eager": eager}


def main(name: str, order: str, steps: int) -> None:
    """Warm up on a network of few coordinates, then measure."""
    torch.set_num_threads(1)
    rule, large = l2l_fast.CoordinatewiseLSTM(), network()
    torch.autograd.backward(SEGMENTS[name](rule, network(hidden=1), 2, order))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
    before = resident("VmRSS")
    torch.autograd.backward(SEGMENTS[name](rule, large, steps, order))
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
