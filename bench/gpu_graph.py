"""A segment of meta-training on the paper's MNIST network, with and without a CUDA graph of its steps."""

from __future__ import annotations

from functools import partial

import torch
from gpu_measure import Bench, Check
from meta_training import network
from torch import Tensor

import l2l_fast
from l2l_fast import CoordinatewiseLSTM
from l2l_fast.meta.graph import StepGraph


def meta_training(bench: Bench) -> None:
    """Segments and their meta-gradients, the same to the bit each time."""
    torch.manual_seed(0)
    rule, steps = CoordinatewiseLSTM().to(bench.device), bench.sizes.steps[0]
    instances = network(device=bench.device)
    params = instances.init(generator=torch.Generator().manual_seed(1))
    coordinates = sum(tensor.numel() for tensor in params.values())

    def segment(graph: StepGraph | None) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        run = l2l_fast.unroll(rule, instances, steps, params=params, generator=generator, graph=graph)
        return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(run.loss, list(rule.parameters()))])

    expected = segment(None)
    graph, note = (None, "without a graph in a dry run") if bench.dry_run else (StepGraph(), "")
    for name, chosen, remark in (("without a graph", None, ""), ("CUDA graph", graph, note)):
        error = (segment(chosen) - expected).abs().max().item()
        bench.add(
            f"{name}, T = {steps}, N = {coordinates}",
            partial(segment, chosen),
            Check("meta-gradient, against the first one without a graph", error, 0.0),
            coordinate_steps=steps * coordinates,
            note=remark,
        )
