"""The questions that the suite for CUDA devices asks, one function each, in the order of their importance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from gpu_graph import meta_training
from gpu_measure import Bench, Check, Run, close, compare, device_state
from shapes import MODELS
from torch import Tensor

import l2l_fast
from l2l_fast import CoordinatewiseLSTM, int8, reference
from l2l_fast.backends import get
from l2l_fast.experiments.speed import eager_step
from l2l_fast.kernels import launch
from l2l_fast.kernels.launch import LaunchConfig
from l2l_fast.storage import public_dtype

UNITS = 20
STATE = 4 * UNITS  # numbers per coordinate
# A block of weights may be a single number, whose eager error is small by luck.
compare_sums = partial(compare, factor=4.0, ulps=4.0)

FLOAT32, FLOAT16, BFLOAT16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
STATE_BYTES = {FLOAT32: 4 * STATE, FLOAT16: 2 * STATE, BFLOAT16: 2 * STATE, INT8: STATE + STATE // int8.TILE}


def make_rule(bench: Bench) -> CoordinatewiseLSTM:
    """A rule with the weights of a fresh module."""
    torch.manual_seed(0)
    made = CoordinatewiseLSTM()
    made.output.reset_parameters()  # updates that show, where a fresh rule takes tiny ones
    return made.to(bench.device)


def random_gradients(bench: Bench, *shape: int, seed: int = 0) -> Tensor:
    """Over eight decades, so that both branches of the preprocessing are taken."""
    generator = bench.generator(seed)
    decades = torch.rand(shape, generator=generator, device=bench.device).mul_(-8)
    return torch.randn(shape, generator=generator, device=bench.device).mul_(decades.mul_(math.log(10)).exp_())


def random_state(bench: Bench, n: int, seed: int = 1) -> Tensor:
    """``[N, 2, 2, H]`` as a run leaves it: ``|h| < 1``, ``c`` of a few units."""
    state = torch.randn(n, 2, 2, UNITS, generator=bench.generator(seed), device=bench.device)
    state[:, :, 0].tanh_()
    return state


def spread(n: int, count: int) -> Tensor:
    """At most ``count`` of ``n`` indices: the first ones, the last ones, and between them random ones; on the CPU."""
    if n <= count:
        return torch.arange(n)
    edge = count // 4
    between = torch.randint(n, (count - 2 * edge,), generator=torch.Generator().manual_seed(2))
    return torch.cat([torch.arange(edge), between, torch.arange(n - edge, n)])


def spread_groups(n: int, count: int) -> Tensor:
    """About as many in groups of 16 in a row, which share scales in int8."""
    first = int8.TILE * spread(-(-n // int8.TILE), max(4, count // int8.TILE))
    at = (first[:, None] + torch.arange(int8.TILE)).flatten()
    return at[at < n]


@contextmanager
def configured(kernels: Literal["step_in_place", "backward"], config: LaunchConfig) -> Iterator[None]:
    """Launch these kernels in another configuration than the one that the library chooses."""
    name = f"{kernels}_config"
    before = getattr(launch, name)
    setattr(launch, name, lambda capability: config)
    try:
        yield
    finally:
        setattr(launch, name, before)


def chosen_config(bench: Bench, kernels: Literal["step_in_place", "backward"]) -> LaunchConfig:
    """The configuration that the library chooses on this device."""
    major, minor = (9, 0) if bench.dry_run else torch.cuda.get_device_capability()
    config: LaunchConfig = getattr(launch, f"{kernels}_config")(10 * major + minor)
    return config


@dataclass
class Model:
    """Tensors of a model with gradients and packed states, and what a sample of its coordinates was before.

    Attributes:
        index: per tensor, the coordinates of the sample.
        before: ``(param, grad, state)`` of the sample in float32 on the CPU.
    """

    rule: CoordinatewiseLSTM
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    index: list[Tensor]
    before: tuple[Tensor, Tensor, Tensor]
    prepared: Any = field(repr=False)

    @property
    def coordinates(self) -> int:
        return sum(param.numel() for param in self.params)

    def step(self) -> None:
        get("triton").step_(self.rule.spec, self.prepared, self.params, self.grads, self.states)

    def check(self) -> Check:
        """Compare the sample with float64; to be called when one step has been made."""
        spec = self.rule.spec
        weights = self.rule.flat_weights().detach().cpu()
        param, grad, state = self.before

        def after(dtype: torch.dtype) -> dict[str, Tensor]:
            update, new_state = reference.step(spec, weights.to(dtype), grad.to(dtype), state.to(dtype))
            return {"parameter": param.to(dtype) + update, "state": new_state}

        now = {
            "parameter": _sample(self.params, self.index),
            "state": torch.cat(
                [
                    get("triton").unpack_state(packed, param.numel(), spec)[index.to(packed.device)].cpu().float()
                    for packed, param, index in zip(self.states, self.params, self.index, strict=True)
                ]
            ),
        }
        right = after(torch.float64)
        stored = {"parameter": self.params[0].dtype}
        if self.states[0].dtype == INT8:
            steps = torch.cat(
                [_int8_steps(part) for part in torch.split(right["state"], [len(at) for at in self.index])]
            )
            difference = now["state"] - right["state"]
            now["state"] = right["state"] + difference - difference.clamp(-steps, steps)
        else:
            stored["state"] = self.states[0].dtype
        return compare(now, after(torch.float32), right, stored=stored)


def _int8_steps(state: Tensor) -> Tensor:
    """The steps between the numbers that int8 has for those of ``state [N, 2, 2, H]``, in whole groups."""
    _, scales = int8.encode(state)
    steps = torch.ldexp(torch.ones(()), scales.int() - 126).repeat_interleave(int8.TILE, dim=0)
    return steps[: len(state)].view_as(state)


def _sample(tensors: list[Tensor], index: list[Tensor]) -> Tensor:
    return torch.cat(
        [tensor.view(-1)[at.to(tensor.device)].cpu().float() for tensor, at in zip(tensors, index, strict=True)]
    )


def make_model(
    bench: Bench, sizes: list[int], param_dtype: torch.dtype = FLOAT32, state_dtype: torch.dtype = FLOAT32
) -> Model:
    """Random parameters, gradients and states in tensors of these sizes."""
    rule, backend = make_rule(bench), get("triton")
    params, grads, states, index, before = [], [], [], [], []
    for seed, n in enumerate(sizes):
        params.append(torch.randn(n, generator=bench.generator(3 + seed), device=bench.device).to(param_dtype))
        grads.append(random_gradients(bench, n, seed=seed).to(param_dtype))
        state = random_state(bench, n, seed=seed + 1).to(public_dtype(state_dtype))
        at = spread_groups(n, bench.sizes.checked // len(sizes))
        index.append(at)
        states.append(backend.pack_state(state, state_dtype))
        del state
        before.append(backend.unpack_state(states[-1], n, rule.spec)[at.to(bench.device)].cpu().float())
    sample = (_sample(params, index), _sample(grads, index), torch.cat(before))
    prepared = backend.prepare(rule.spec, rule.flat_weights().detach())
    return Model(rule, params, grads, states, index, sample, prepared)


def time_steps(
    bench: Bench,
    case: str,
    sizes: list[int],
    param_dtype: torch.dtype = FLOAT32,
    state_dtype: torch.dtype = FLOAT32,
    note: str = "",
) -> None:
    """One step in place over tensors of these sizes, checked and timed."""
    model = make_model(bench, sizes, param_dtype, state_dtype)
    model.step()
    check = model.check()
    bytes_each = 2 * STATE_BYTES[state_dtype] + 3 * param_dtype.itemsize
    bench.add(case, model.step, check, coordinate_steps=model.coordinates, bytes_each=bytes_each, note=note)


def ragged_sizes(total: int, tensors: int) -> list[int]:
    """Sizes over four decades that add up to ``total``, as the tensors of a model do; few are whole tiles."""
    draws = (torch.rand(tensors, generator=torch.Generator().manual_seed(6)) * 9).exp()
    sizes = [max(1, int(share * total)) for share in (draws / draws.sum()).tolist()]
    sizes[-1] += total - sum(sizes)
    assert min(sizes) > 0
    return sizes


def copy_ceiling(bench: Bench) -> None:
    """The ceiling: how fast device memory can be read and written."""
    source = torch.randn(bench.sizes.copied, generator=bench.generator(), device=bench.device)
    target = torch.full_like(source, float("nan"))
    target.copy_(source)
    check = Check("copy", float(not torch.equal(target, source)), 0.0)
    bench.add("device to device", lambda: target.copy_(source), check, coordinate_steps=source.numel(), bytes_each=8)


def forward(bench: Bench) -> None:
    """One step at float32 throughout, by the backend and by the optimizer."""
    n = bench.sizes.forward
    time_steps(bench, "float32 state", [n])
    bench.section.facts["device just after"] = device_state()
    rule = make_rule(bench)
    param = torch.nn.Parameter(torch.zeros(n, device=bench.device))
    param.grad = random_gradients(bench, n)
    optimizer = l2l_fast.LearnedOptimizer([param], rule, backend="triton")
    optimizer.step()
    at = spread(n, bench.sizes.checked).to(bench.device)
    check = check_update(rule, param.detach()[at], param.grad[at], steps=1)
    bench.add(
        "float32 state, optimizer.step()",
        optimizer.step,
        check,
        coordinate_steps=n,
        bytes_each=2 * STATE * 4 + 12,
    )


def check_update(rule: CoordinatewiseLSTM, moved: Tensor, grad: Tensor, steps: int, factor: float = 2.0) -> Check:
    """Parameters that started from zero with a fresh state, after so many steps with the same gradients."""
    weights, gradient = rule.flat_weights().detach().cpu(), grad.detach().cpu()

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        state = torch.zeros(gradient.numel(), 2, 2, UNITS, dtype=dtype)
        total = torch.zeros(gradient.numel(), dtype=dtype)
        for _ in range(steps):
            update, state = reference.step(rule.spec, weights.to(dtype), gradient.to(dtype), state)
            total += update
        return {"parameter": total}

    return compare({"parameter": moved.cpu()}, run(torch.float32), run(torch.float64), factor=factor)


def launch_configurations(bench: Bench) -> None:
    """Programs per multiprocessor, loading ahead and pipelining depth of the forward."""
    chosen = chosen_config(bench, "step_in_place")
    for prefetch, num_stages in ((True, 1), (False, 1), (True, 2)):
        for programs in (2, 3, 4):
            config = LaunchConfig(programs, num_stages=num_stages, prefetch=prefetch)
            ahead = ", prefetch" if prefetch else ""
            case = f"float32 state, {programs} programs per SM, {num_stages} stage(s){ahead}"
            try:
                with configured("step_in_place", config):
                    time_steps(bench, case, [bench.sizes.forward], note="chosen" if config == chosen else "")
            except Exception as error:
                if config == chosen:
                    raise
                bench.section.facts[case] = f"refused: {error!r}"  # by the compiler or the device


def narrow_storage(bench: Bench) -> None:
    """State of 16 or 8 bits, parameters of 16."""
    for param_dtype, state_dtype in (
        (FLOAT32, FLOAT16),
        (FLOAT32, BFLOAT16),
        (BFLOAT16, FLOAT32),
        (BFLOAT16, FLOAT16),
        (FLOAT16, FLOAT16),
        (FLOAT32, INT8),
        (BFLOAT16, INT8),
    ):
        case = f"{str(state_dtype)[6:]} state, {str(param_dtype)[6:]} parameters"
        time_steps(bench, case, [bench.sizes.forward], param_dtype, state_dtype)


def ragged(bench: Bench) -> None:
    """Many tensors of different sizes against one with as many coordinates."""
    n, tensors = bench.sizes.forward, bench.sizes.tensors
    for state_dtype in (FLOAT32, FLOAT16, INT8):
        name = str(state_dtype)[6:]
        time_steps(bench, f"{name} state, one tensor", [n], state_dtype=state_dtype)
        time_steps(bench, f"{name} state, ragged, {tensors} tensors", ragged_sizes(n, tensors), state_dtype=state_dtype)


def small(bench: Bench) -> None:
    """So few coordinates that launching is all the work; then the host's time for many small tensors."""
    n, tensors = bench.sizes.launch_bound, bench.sizes.small_tensors
    time_steps(bench, f"{n} coordinates", [n])
    model = make_model(bench, [n])
    replay = captured(bench, model)
    replay()
    check = model.check()
    bench.add(f"{n} coordinates, CUDA graph", replay, check, coordinate_steps=n, note=_only_on_a_device(bench))

    rule = make_rule(bench)
    params = [torch.nn.Parameter(torch.zeros(n // tensors, device=bench.device)) for _ in range(tensors)]
    draws = [[random_gradients(bench, p.numel(), seed=seed) for seed, p in enumerate(params)] for _ in range(2)]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "LearnedOptimizer": l2l_fast.LearnedOptimizer(params, rule, backend="triton"),
        "AdamW(fused)": torch.optim.AdamW(params, fused=True),
        "AdamW(foreach)": torch.optim.AdamW(params, foreach=True),
    }

    def give(gradients: list[Tensor]) -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient

    give(draws[0])
    optimizers["LearnedOptimizer"].step()
    moved = torch.cat([param.detach() for param in params])
    check = check_update(rule, moved, torch.cat(draws[0]), steps=1)
    for name, optimizer in optimizers.items():
        bench.add(
            f"{name}, {tensors} tensors of {n // tensors}",
            optimizer.step,
            check if name == "LearnedOptimizer" else None,
            coordinate_steps=n,
            note="host time of step()",
            timer=bench.host_seconds,
        )
    for optimizer_name in ("LearnedOptimizer", "AdamW(fused)"):
        turns = 0

        def prepare() -> None:
            nonlocal turns
            turns += 1
            give(draws[turns % 2])

        bench.add(
            f"{optimizer_name}, {tensors} tensors of {n // tensors}, gradients that move",
            optimizers[optimizer_name].step,
            check if optimizer_name == "LearnedOptimizer" else None,
            coordinate_steps=n,
            note="host time of step()",
            timer=partial(bench.host_seconds, prepare=prepare),
        )


def _only_on_a_device(bench: Bench) -> str:
    return "without a graph in a dry run" if bench.dry_run else ""


def captured(bench: Bench, model: Model) -> Run:
    """A function that replays one step of ``model``, which has not been stepped when this returns."""
    if bench.dry_run:
        return model.step
    saved = [tensor.clone() for tensor in (*model.params, *model.states)]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    for tensor, before in zip((*model.params, *model.states), saved, strict=True):
        tensor.copy_(before)
    return graph.replay


def _in_slices(n: int, derivative: Callable[[slice, torch.dtype], Tensor], size: int = 2**16) -> Tensor:
    """The float64 derivative by the weights over all coordinates, a slice at a time to save memory."""
    parts = [derivative(slice(start, start + size), torch.float64) for start in range(0, n, size)]
    return torch.stack(parts).sum(0)


def step_backward(bench: Bench) -> None:
    """The derivative of one step; the forward is recomputed within."""
    n, checked, backend = bench.sizes.backward, bench.sizes.checked_backward, get("triton")
    rule = make_rule(bench)
    spec, weights = rule.spec, rule.flat_weights().detach()
    generator = bench.generator(5)
    inputs = (
        random_gradients(bench, n),
        random_state(bench, n),
        torch.randn(n, generator=generator, device=bench.device),
        torch.randn(n, 2, 2, UNITS, generator=generator, device=bench.device),
    )

    def by_reference(part: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        arguments = [x[part].to(dtype) for x in inputs]
        return _named(spec, reference.step_backward(spec, weights.to(dtype), *arguments), arguments[0])

    part = slice(0, checked)
    few = [x[part] for x in inputs]
    check = compare_sums(
        _named(spec, backend.step_backward(spec, weights, *few), few[0]),
        by_reference(part, torch.float32),
        by_reference(part, torch.float64),
    )

    def run() -> tuple[Tensor, Tensor, Tensor]:
        return backend.step_backward(spec, weights, *inputs)

    whole = _in_slices(
        n,
        lambda part, dtype: reference.step_backward(spec, weights.to(dtype), *(x[part].to(dtype) for x in inputs))[0],
    )
    at_size = close("derivative by the weights, all coordinates", run()[0], whole, 1e-4)
    bench.add(
        "one step",
        run,
        worse(check, at_size),
        coordinate_steps=n,
        bytes_each=3 * STATE * 4 + 12,
        memory=True,
    )


def _named(spec: l2l_fast.RuleSpec, derivatives: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor]:
    """Derivatives by name, the weights' block by block; that by the gradient relative to how steep the features are."""
    d_weights, d_grad, d_state = derivatives
    slope = torch.clamp(1 / (spec.log_p * grad.abs()), max=math.exp(spec.log_p))
    blocks = {f"d_{name}": block for name, block in reference.split_weights(spec, d_weights).items()}
    return {**blocks, "d_grad": d_grad / slope, "d_state": d_state}


def worse(one: Check, other: Check) -> Check:
    return one if not one.passed or other.passed else other


def time_unroll(bench: Bench, case: str, steps: int, counts: Sequence[int], *, check_all: bool = True) -> None:
    """The meta-gradient of an unroll over so many coordinates, recompute included, checked and timed.

    Args:
        check_all: compare the sum over all coordinates with float64 too, which takes as long as the rest together.
    """
    n, part, backend = max(counts), slice(0, bench.sizes.checked_backward), get("triton")
    rule = make_rule(bench)
    spec, weights = rule.spec, rule.flat_weights().detach()
    grads, loss_weights = random_gradients(bench, steps + 1, n), torch.ones(steps + 1)

    def by_reference(part: slice, dtype: torch.dtype) -> Tensor:
        mine = grads[:, part].to(dtype)
        start = torch.zeros(mine.shape[1], 2, 2, UNITS, dtype=dtype, device=bench.device)
        return reference.unroll_backward(spec, weights.to(dtype), mine, loss_weights.to(mine), start)[0]

    def run(mine: Tensor) -> Tensor:
        return backend.unroll_backward(spec, weights, mine, loss_weights, None)[0]

    check = compare_sums(
        reference.split_weights(spec, run(grads[:, part])),
        reference.split_weights(spec, by_reference(part, torch.float32)),
        reference.split_weights(spec, by_reference(part, torch.float64)),
    )
    if check_all:
        exact = _in_slices(n, by_reference)
        check = worse(check, close("derivative by the weights, all coordinates", run(grads), exact, 1e-4))
    for count in counts:
        mine = grads[:, :count].contiguous()
        name = f"{case}T = {steps}, N = {count}"
        bench.add(name, partial(run, mine), check, coordinate_steps=steps * count, memory=True)


def unroll_backward(bench: Bench) -> None:
    """The backward of whole unrolls; two sizes each, for the memory that does not grow with them."""
    n = bench.sizes.backward
    for steps in bench.sizes.steps:
        time_unroll(bench, "", steps, (n, n // 4))


def meta_step(bench: Bench) -> None:
    """An unroll with its meta-gradient: fused at full size, eager at what autograd's graph leaves room for."""
    rule = make_rule(bench)
    steps = bench.sizes.steps[0]
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(bench.sizes.backward, generator=generator).to(bench.device)

    def fused(n: int) -> list[Tensor]:
        run = l2l_fast.unroll(rule, Bowl(target[:n]), steps, backend="triton")
        return list(torch.autograd.grad(run.loss, list(rule.parameters())))

    def eager(n: int, dtype: torch.dtype = FLOAT32) -> list[Tensor]:
        module = copy.deepcopy(rule).to(dtype)
        step, goal = eager_step(module), target[:n].to(dtype)
        state = tuple(torch.zeros(n, UNITS, dtype=dtype, device=bench.device) for _ in range(4))
        theta, loss = torch.zeros_like(goal), goal.new_zeros(())
        for _ in range(steps):
            update, state = step((theta - goal).detach(), state)
            theta = theta + update
            loss = loss + (theta - goal).square().sum() / 2
        return list(torch.autograd.grad(loss, list(module.parameters())))

    n = bench.sizes.eager_unroll
    exact = eager(n, torch.float64)
    check = compare_sums(_numbered(fused(n)), _numbered(eager(n)), _numbered(exact))
    for name, run, count in (("fused", fused, bench.sizes.backward), ("fused", fused, n), ("eager", eager, n)):
        bench.add(
            f"{name}, T = {steps}, N = {count}",
            partial(run, count),
            check if name == "fused" else None,
            coordinate_steps=steps * count,
            memory=True,
        )


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


class Bowl:
    """Half the squared distance to ``target [N]``: an optimizee that costs next to nothing itself."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"x": torch.zeros_like(self.target)[None]}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return (params["x"] - self.target).square().sum(1) / 2


def baselines(bench: Bench) -> None:
    """The same update by PyTorch: eager, and compiled from the cells and from the formulas."""
    rule = make_rule(bench)
    spec, weights = rule.spec, rule.flat_weights().detach()
    compile_: Callable[..., Any] = partial(torch.compile, backend="eager") if bench.dry_run else torch.compile
    by_cells = eager_step(rule)

    def by_formulas(grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.step(spec, weights, grad, state)

    for n in bench.sizes.baselines:
        grad, param = random_gradients(bench, n), torch.zeros(n, device=bench.device)
        cells = tuple(torch.zeros(n, UNITS, device=bench.device) for _ in range(4))
        rows = torch.zeros(n, 2, 2, UNITS, device=bench.device)
        time_steps(bench, f"fused, N = {n}", [n])
        torch.compiler.reset()  # compiled for this size alone, which is when it is fastest
        for name, step, state in (
            ("eager", by_cells, cells),
            ("torch.compile of two LSTMCells", compile_(by_cells), cells),
            ("torch.compile of the formulas", compile_(by_formulas), rows),
        ):
            run = carried(step, grad, param.zero_(), state)
            run()
            at = spread(n, bench.sizes.checked).to(bench.device)
            check = check_update(rule, param[at], grad[at], steps=1, factor=8)
            bench.add(f"{name}, N = {n}", run, check, coordinate_steps=n, memory=True)
            del run, step, state


def carried(step: Callable[..., Any], grad: Tensor, param: Tensor, state: Any) -> Run:
    """Steps ``param`` in place and carries the state from call to call."""

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        update, state = step(grad, state)
        param.add_(update)

    return run


def adamw(bench: Bench) -> None:
    """For scale: what PyTorch's own fused optimizer takes for the same parameters."""
    n, tensors = bench.sizes.forward, bench.sizes.tensors
    for sizes in ([n], ragged_sizes(n, tensors)):
        for name in ("fused", "foreach"):
            params = [torch.nn.Parameter(torch.ones(size, device=bench.device)) for size in sizes]
            for seed, param in enumerate(params):
                param.grad = random_gradients(bench, param.numel(), seed=seed)
            optimizer = torch.optim.AdamW(params, fused=name == "fused", foreach=name == "foreach")
            optimizer.step()
            bench.add(
                f"AdamW({name}), {len(sizes)} tensor(s)",
                optimizer.step,
                _check_adamw(*sampled_step(params, bench.sizes.checked // len(sizes))),
                coordinate_steps=n,
                bytes_each=28,
            )


def sampled_step(params: list[torch.nn.Parameter], count: int) -> tuple[Tensor, Tensor]:
    """Values and gradients of so many coordinates of each parameter, eight at least, on the CPU."""
    moved, gradients = [], []
    for param in params:
        assert param.grad is not None
        at = spread(param.numel(), max(8, count)).to(param.device)
        moved.append(param.detach()[at].cpu())
        gradients.append(param.grad[at].cpu())
    return torch.cat(moved), torch.cat(gradients)


def _check_adamw(moved: Tensor, gradients: Tensor) -> Check:
    """Parameters that started from one, after one step."""
    expected = torch.nn.Parameter(torch.ones(len(moved), dtype=torch.float64))
    expected.grad = gradients.double()
    torch.optim.AdamW([expected]).step()
    return close("parameter", moved, expected.detach(), 1e-6)


def models(bench: Bench) -> None:
    """``optimizer.step()`` over the parameters of whole models, its memory, and AdamW on the same."""
    rule = make_rule(bench)
    learned = partial(l2l_fast.LearnedOptimizer, rule=rule, backend="triton")
    optimizers: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "float32 state": learned,
        "float16 state": partial(learned, state_dtype=FLOAT16),
        "int8 state": partial(learned, state_dtype=INT8),
        "AdamW(fused)": partial(torch.optim.AdamW, fused=True),
        "AdamW(foreach)": partial(torch.optim.AdamW, foreach=True),
    }
    for model, shapes in MODELS.items():
        sizes = [min(math.prod(shape), bench.sizes.model_tensor) for shape in shapes][: bench.sizes.model_tensors]
        for name, make in optimizers.items():
            start = 1.0 if name.startswith("AdamW") else 0.0
            params = [torch.nn.Parameter(torch.full((size,), start, device=bench.device)) for size in sizes]
            for seed, param in enumerate(params):
                param.grad = random_gradients(bench, param.numel(), seed=seed)
            optimizer = make(params)
            optimizer.step()
            moved, gradients = sampled_step(params, bench.sizes.checked // len(sizes))
            bench.add(
                f"{model}, {name}",
                optimizer.step,
                _check_adamw(moved, gradients) if start else check_update(rule, moved, gradients, steps=1),
                coordinate_steps=sum(sizes),
                bytes_each=28 if start else 2 * STATE_BYTES[getattr(optimizer, "state_dtype", FLOAT32)] + 12,
                memory=True,
                note=f"{len(sizes)} tensors, state {state_bytes(optimizer) / 2**20:.0f} MiB",
            )
            del optimizer, params, param


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the state of an optimizer occupies."""
    entries = optimizer.state.values()
    return sum(value.nbytes for entry in entries for value in entry.values() if isinstance(value, Tensor))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "copy": copy_ceiling,
    "forward": forward,
    "launch configurations": launch_configurations,
    "16-bit storage": narrow_storage,
    "ragged tensors": ragged,
    "launch-bound": small,
    "one-step backward": step_backward,
    "unroll backward": unroll_backward,
    "meta-step": meta_step,
    "meta-training": meta_training,
    "baselines": baselines,
    "AdamW": adamw,
    "models": models,
}
