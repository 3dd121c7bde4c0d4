"""Every kernel on a case small enough for compute-sanitizer: ``python bench/gpu_small.py``."""

from __future__ import annotations

import torch
from torch import Tensor

import l2l_fast
from l2l_fast.backends import get

TENSORS = 300
STEPS = 3


def finite(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or bool(tensor.isfinite().all())


def main() -> None:
    """Two steps over ragged tensors in every storage, one differentiable step, and the backward of an unroll."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = TENSORS if device.type == "cuda" else 5
    torch.manual_seed(0)
    for preprocess in (l2l_fast.LogAndSign(), None):
        rule = l2l_fast.CoordinatewiseLSTM(preprocess=preprocess).to(device)
        rule.output.reset_parameters()  # updates that show, where a fresh rule takes tiny ones
        for dtype, state_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
            params = [torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype)) for size in range(tensors)]
            optimizer = l2l_fast.LearnedOptimizer(params, rule, backend="triton", state_dtype=state_dtype)
            for _ in range(2):
                for param in params:
                    param.grad = torch.randn_like(param)  # new addresses each time
                optimizer.step()
            finite(*params)
        spec, weights, backend = rule.spec, rule.flat_weights().detach(), get("triton")
        n = 65  # a whole tile and one coordinate
        state = torch.randn(n, 2, 2, spec.hidden_size, device=device).tanh()
        grads = torch.randn(STEPS + 1, n, device=device)
        finite(*backend.step(spec, weights, grads[0], state))
        finite(*backend.step_backward(spec, weights, grads[0], state, grads[1], state))
        finite(*backend.unroll_backward(spec, weights, grads, torch.ones(STEPS + 1), state))
        finite(*backend.unroll_backward(spec, weights, grads, torch.ones(STEPS + 1), None))
    print("small case: done")


if __name__ == "__main__":
    main()
