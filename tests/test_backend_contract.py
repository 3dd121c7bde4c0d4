"""What every backend promises, on every case of the database. New memory is full of NaN throughout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    REGIMES,
    SIZES,
    SPECS,
    STEP_CASES,
    UNROLL_CASES,
    StepCase,
    UnrollCase,
    exact_unroll,
    make_state,
    make_weights,
    pool,
    thin_unroll,
)
from conftest import BACKEND_IDS
from numerics import assert_as_good_as_eager, ulps_apart
from torch import Tensor

from l2l_fast import RuleSpec, reference
from l2l_fast.backends import Backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

# For tests whose yardstick is the reference backend itself.
fused_backends = pytest.mark.parametrize(
    "backend", [name for name in BACKEND_IDS if name != "reference"], indirect=True
)

SPEC = SPECS["log10"]
STORAGE = (torch.float32, torch.float16, torch.bfloat16)


def assert_all_as_good(actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each as good as eager; whose error is that of all draws, even if ``actual`` has only the first of them."""
    assert actual.keys() == eager.keys() == exact.keys()
    actual = {name: torch.cat([actual[name], eager[name][len(actual[name]) :]]) for name in actual}
    for name in actual:
        assert_as_good_as_eager(name, actual[name], eager[name], exact[name])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal, with NaN equal to NaN."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def interpreted(backend: Backend) -> bool:
    """Whether it runs in Triton's interpreter, at 40 milliseconds per tile and step."""
    return backend.name == "triton" and not torch.cuda.is_available()


# One step and its backward


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step(backend: Backend, case: StepCase) -> None:
    (eager, _), (exact, _) = case.oracle
    actual = []
    for inputs in case.few_draws if interpreted(backend) else case.draws:
        update, state = backend.step(case.spec, *inputs[:3])
        assert update.dtype == state.dtype == torch.float32
        actual.append(case.outputs(update=update, state=state))
    assert_all_as_good(pool(actual), eager, exact)


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step_backward(backend: Backend, case: StepCase) -> None:
    (_, eager), (_, exact) = case.oracle
    actual = []
    for inputs in case.few_draws if interpreted(backend) else case.draws:
        d_weights, d_grad, d_state = backend.step_backward(case.spec, *inputs)
        assert d_weights.dtype == d_grad.dtype == d_state.dtype == torch.float32
        actual.append(case.gradients(inputs.grad, d_weights=d_weights, d_grad=d_grad, d_state=d_state))
    assert_all_as_good(pool(actual), eager, exact)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_zeroed_output_layer_gives_exactly_no_update(
    backend: Backend, spec: RuleSpec, generator: torch.Generator
) -> None:
    weights = make_weights(spec, generator)
    weights[-spec.hidden_size - 1 :] = 0
    grad = torch.cat([REGIMES[regime](33, spec, generator) for regime in ("normal", "decades", "zero", "huge")])
    update, _ = backend.step(spec, weights, grad, make_state(len(grad), spec, generator))
    assert_same_bits(update.abs(), torch.zeros(len(grad)))


def test_no_coordinates(backend: Backend, generator: torch.Generator) -> None:
    weights, grad, state = make_weights(SPEC, generator), torch.zeros(0), torch.zeros(0, 2, 2, 20)
    update, new_state = backend.step(SPEC, weights, grad, state)
    assert update.shape == (0,)
    assert new_state.shape == (0, 2, 2, 20)
    for d_weights, *others in (
        backend.step_backward(SPEC, weights, grad, state, grad, state),
        backend.unroll_backward(SPEC, weights, torch.zeros(4, 0), torch.ones(4), state),
    ):
        assert_same_bits(d_weights, torch.zeros(SPEC.num_weights))
        assert all(other is not None and other.numel() == 0 for other in others)


# The whole unroll


@pytest.mark.parametrize("case", UNROLL_CASES, ids=str)
def test_unroll_backward(backend: Backend, case: UnrollCase) -> None:
    case = thin_unroll(case) if interpreted(backend) else case
    eager, exact = case.oracle
    actual = []
    for inputs, d_points in zip(case.draws, case.d_points, strict=True):
        d_weights, d_state = backend.unroll_backward(case.spec, *inputs, d_points=d_points)
        assert (d_state is None) == (inputs.state is None)
        actual.append(case.gradients(d_weights, d_state))
    assert_all_as_good(pool(actual), eager, exact)


def test_unroll_from_zeros_is_unroll_from_a_state_of_zeros(backend: Backend) -> None:
    weights, grads, loss_weights, _ = UnrollCase(n=65, steps=5).draws[0]
    from_zeros, nothing = backend.unroll_backward(SPEC, weights, grads, loss_weights, None)
    from_state, _ = backend.unroll_backward(SPEC, weights, grads, loss_weights, torch.zeros(65, 2, 2, 20))
    assert nothing is None
    assert_same_bits(from_zeros, from_state)


def test_unroll_of_one_step_is_one_step_backward(backend: Backend) -> None:
    weights, grads, loss_weights, state = UnrollCase(n=65, steps=1).draws[0]
    assert state is not None
    d_weights, d_state = backend.unroll_backward(SPEC, weights, grads, loss_weights, state)
    step_weights, _, step_state = backend.step_backward(
        SPEC, weights, grads[0], state, loss_weights[1] * grads[1], torch.zeros_like(state)
    )
    torch.testing.assert_close(d_weights, step_weights)
    torch.testing.assert_close(d_state, step_state)


def test_derivatives_by_the_points_default_to_the_gradients(backend: Backend) -> None:
    weights, grads, loss_weights, state = UnrollCase(n=65, steps=5).draws[0]
    without = backend.unroll_backward(SPEC, weights, grads, loss_weights, state)
    given = backend.unroll_backward(SPEC, weights, grads, loss_weights, state, d_points=grads.clone())
    torch.testing.assert_close(given, without, rtol=0, atol=0)


def test_the_first_point_moves_nothing(backend: Backend) -> None:
    """No update comes before it, so neither its weight nor the derivative by it matters."""
    case = UnrollCase(n=33, steps=3, with_d_points=True)
    (weights, grads, loss_weights, state), d_points = case.draws[0], case.d_points[0]
    assert d_points is not None
    before = backend.unroll_backward(SPEC, weights, grads, loss_weights, state, d_points=d_points)
    d_points, loss_weights = d_points.clone(), loss_weights.clone()
    d_points[0], loss_weights[0] = 1e3, -7
    after = backend.unroll_backward(SPEC, weights, grads, loss_weights, state, d_points=d_points)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_derivative_by_the_state_is_left_out_on_request(backend: Backend) -> None:
    case = UnrollCase(n=33, steps=3, with_d_points=True)
    inputs, d_points = case.draws[0], case.d_points[0]
    with_it, _ = backend.unroll_backward(SPEC, *inputs, d_points=d_points)
    without, nothing = backend.unroll_backward(SPEC, *inputs, need_d_state=False, d_points=d_points)
    assert nothing is None
    assert_same_bits(without, with_it)


@functools.cache
def many(n: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """``n`` coordinates for 20 steps: the inputs, and the gradient by float32 eager and by float64."""
    steps = 20
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(SPEC, generator, "trained")
    grads = REGIMES["normal"]((steps + 1) * n, SPEC, generator).view(steps + 1, n)
    loss_weights = torch.ones(steps + 1)
    eager, _ = reference.unroll_backward(SPEC, weights, grads, loss_weights, torch.zeros(n, 2, 2, 20))
    # Coordinates are independent; portions of them stay in the cache.
    exact = torch.zeros(SPEC.num_weights, dtype=torch.float64)
    for part in torch.split(grads, 1000, dim=1):
        exact += exact_unroll(SPEC, weights, part, loss_weights, None)[0]
    return (weights, grads, loss_weights), eager, exact


@fused_backends
def test_gradient_of_a_million_coordinate_steps(backend: Backend) -> None:
    """Block by block: small entries would vanish in the scale of the whole. The interpreter gets 100 000."""
    inputs, eager, exact = many(5_000 if interpreted(backend) else 50_000)
    d_weights, _ = backend.unroll_backward(SPEC, *inputs, None)
    by_eager, right = reference.split_weights(SPEC, eager), reference.split_weights(SPEC, exact)
    for name, block in reference.split_weights(SPEC, d_weights).items():
        assert_as_good_as_eager(name, block, by_eager[name], right[name])


# The step in place


def _ragged(count: int) -> list[tuple[int, ...]]:
    lengths = torch.randint(0, 50, (count - 4,), generator=torch.Generator().manual_seed(1)).tolist()
    return [(), (0,), (3, 0, 2), (5, 7, 3), *((length,) for length in lengths)]


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "none": [],
    "one": [(13, 11)],
    "empty": [(0,)],
    "scalars": [()] * 200,
    "ragged": _ragged(300),
}
FEW = _ragged(24)


class Tensors:
    """Parameters, gradients and states of several tensors, and what they are when flattened."""

    def __init__(
        self, shapes: list[tuple[int, ...]], *, regime: str = "normal", dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        self.weights = make_weights(SPEC, generator, "trained")
        sizes = [torch.Size(shape).numel() for shape in shapes]
        n = sum(sizes)
        param = torch.randn(n, generator=generator) * 10 ** (-8 * torch.rand(n, generator=generator))
        grad = REGIMES[regime](n, SPEC, generator)
        state = make_state(n, SPEC, generator) * 10 ** (-8 * torch.rand(n, 2, 2, 20, generator=generator))
        self.param, self.grad, self.state = param.to(dtype), grad.to(dtype), state
        self.shapes, self.sizes = shapes, sizes

    def step_(
        self, backend: Backend, steps: int = 1, state_dtype: torch.dtype = torch.float32, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Parameters ``[N]`` and state ``[N, 2, 2, H]`` after that many steps with the same gradients."""
        params = [
            part.view(shape).clone()
            for part, shape in zip(torch.split(self.param, self.sizes), self.shapes, strict=True)
        ]
        grads = [
            part.view(shape).clone()
            for part, shape in zip(torch.split(self.grad, self.sizes), self.shapes, strict=True)
        ]
        states = [backend.pack_state(part, state_dtype) for part in torch.split(self.state, self.sizes)]
        given = [grad.clone() for grad in grads]
        prepared = backend.prepare(SPEC, self.weights)
        for _ in range(steps):
            backend.step_(SPEC, prepared, params, grads, states, **options)
        for grad, before in zip(grads, given, strict=True):
            assert_same_bits(grad, before)
        unpacked = [backend.unpack_state(state, size, SPEC) for state, size in zip(states, self.sizes, strict=True)]
        assert all(state.dtype == state_dtype for state in unpacked)
        if not params:
            return self.param, self.state
        return torch.cat([param.view(-1) for param in params]), torch.cat(unpacked)

    def expected(
        self, dtype: torch.dtype, *, lr: float = 1.0, weight_decay: float = 0.0, maximize: bool = False
    ) -> dict[str, Tensor]:
        """The same by the reference, in ``dtype``."""
        grad = self.grad.to(dtype)
        update, state = reference.step(SPEC, self.weights.to(dtype), -grad if maximize else grad, self.state.to(dtype))
        return {
            "param": (1 - lr * weight_decay) * self.param.to(dtype) + lr * update,
            "state": state,
        }


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        *(pytest.param(shapes, {}, id=name) for name, shapes in SHAPES.items()),
        *(
            pytest.param(FEW, options, id="-".join(f"{name}{value}" for name, value in options.items()))
            for options in ({"lr": 0.3}, {"lr": 0.3, "weight_decay": 0.1}, {"maximize": True}, {"lr": 0.0})
        ),
    ],
)
def test_step_in_place(backend: Backend, shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    tensors = Tensors(shapes)
    param, state = tensors.step_(backend, **options)
    if not shapes:
        return  # that it ran is all there is to see
    assert_all_as_good(
        {"param": param, "state": state},
        tensors.expected(torch.float32, **options),
        tensors.expected(torch.float64, **options),
    )


def test_step_in_place_equals_step(backend: Backend) -> None:
    tensors = Tensors([(4097,)])
    tensors.param.zero_()
    update, state = backend.step(SPEC, tensors.weights, tensors.grad, tensors.state)
    new_param, new_state = tensors.step_(backend)
    assert_same_bits(new_param, update)
    assert_same_bits(new_state, state)


@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("regime", ["normal", "nonfinite"])
def test_narrow_storage_rounds_the_float32_result(
    backend: Backend, regime: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    tensors = Tensors(FEW, regime=regime, dtype=dtype)
    tensors.state = tensors.state.to(state_dtype)
    wide = Tensors(FEW, regime=regime)
    wide.param, wide.grad, wide.state = tensors.param.float(), tensors.grad.float(), tensors.state.float()

    options: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1}
    param, state = tensors.step_(backend, state_dtype=state_dtype, **options)
    wide_param, wide_state = wide.step_(backend, **options)
    assert_same_bits(param, wide_param.to(dtype))
    if state_dtype == torch.float32:
        assert_same_bits(state, wide_state)
    else:
        assert ulps_apart(state, wide_state.to(state_dtype)).max() <= 1


@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
def test_nonfinite_gradients_stay_in_their_coordinate(backend: Backend, state_dtype: torch.dtype) -> None:
    tensors = Tensors(FEW, regime="nonfinite")
    bad = ~tensors.grad.isfinite()
    clean = Tensors(FEW, regime="nonfinite")
    clean.grad[bad] = 0.5
    param, state = tensors.step_(backend, state_dtype=state_dtype)
    clean_param, clean_state = clean.step_(backend, state_dtype=state_dtype)
    assert bad.any()
    assert param[bad].isnan().all()
    assert state[bad].isnan().all()
    assert_same_bits(param[~bad], clean_param[~bad])
    assert_same_bits(state[~bad], clean_state[~bad])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_skip_nonfinite_leaves_parameter_and_state(backend: Backend, dtype: torch.dtype, maximize: bool) -> None:
    tensors = Tensors(FEW, regime="nonfinite", dtype=dtype)
    tensors.state = tensors.state.to(dtype)
    bad = ~tensors.grad.isfinite()
    options: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1, "maximize": maximize, "state_dtype": dtype}
    param, state = tensors.step_(backend, skip_nonfinite=True, **options)
    plain_param, plain_state = tensors.step_(backend, **options)
    assert_same_bits(param[bad], tensors.param[bad])
    assert_same_bits(state[bad], tensors.state[bad])
    assert_same_bits(param[~bad], plain_param[~bad])
    assert_same_bits(state[~bad], plain_state[~bad])


# State


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("n", [0, *SIZES])
def test_packing_loses_nothing(backend: Backend, n: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    state = make_state(n, SPEC, generator).to(dtype)
    before = state.clone()
    packed = backend.pack_state(state, dtype)
    unpacked = backend.unpack_state(packed, n, SPEC)
    assert packed.dtype == dtype
    assert_same_bits(unpacked, before)
    packed.fill_(7)
    assert_same_bits(state, before)
    assert_same_bits(unpacked, before)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_packing_converts_to_the_storage_dtype(
    backend: Backend, dtype: torch.dtype, generator: torch.Generator
) -> None:
    state = make_state(33, SPEC, generator)
    assert_same_bits(backend.unpack_state(backend.pack_state(state, dtype), 33, SPEC), state.to(dtype))
    strided = state.transpose(0, 3).contiguous().transpose(0, 3)
    assert_same_bits(backend.unpack_state(backend.pack_state(strided, dtype), 33, SPEC), state.to(dtype))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("n", [0, 1, 33])
def test_initial_state_is_zero(backend: Backend, n: int, dtype: torch.dtype) -> None:
    packed = backend.init_state(n, SPEC, dtype, torch.device("cpu"))
    assert packed.dtype == dtype
    assert_same_bits(backend.unpack_state(packed, n, SPEC), torch.zeros(n, 2, 2, 20, dtype=dtype))


@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
def test_half_and_half_make_the_whole(backend: Backend, state_dtype: torch.dtype) -> None:
    whole = Tensors(FEW)
    param, state = whole.step_(backend, steps=4, state_dtype=state_dtype)
    half = Tensors(FEW)
    half.param, half.state = half.step_(backend, steps=2, state_dtype=state_dtype)
    half_param, half_state = half.step_(backend, steps=2, state_dtype=state_dtype)
    assert_same_bits(half_param, param)
    assert_same_bits(half_state, state)


# Determinism and side effects

OPERATIONS: dict[str, Callable[[Backend, int], tuple[Tensor | None, ...]]] = {
    "step": lambda backend, n: backend.step(SPEC, *StepCase(n=n).draws[0][:3]),
    "step_backward": lambda backend, n: backend.step_backward(SPEC, *StepCase(n=n).draws[0]),
    "unroll_backward": lambda backend, n: backend.unroll_backward(SPEC, *UnrollCase(n=n, steps=4).draws[0]),
    "step_": lambda backend, n: Tensors([(n,)]).step_(backend, steps=2),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_same_bits_every_time(backend: Backend, operation: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    for first, second in zip(operation(backend, 1000), operation(backend, 1000), strict=True):
        assert_same_bits(first, second)


@fused_backends  # the matrix products of PyTorch add up in another order for another number of threads
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_results_do_not_depend_on_the_number_of_threads(backend: Backend, operation: Any) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(operation(backend, 1000))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


def test_arguments_are_left_alone(backend: Backend) -> None:
    step, case = StepCase(n=65).draws[0], UnrollCase(n=65, steps=3, with_d_points=True)
    unroll, d_points = case.draws[0], case.d_points[0]
    arguments = (*step, *unroll, d_points)
    before = [tensor.clone() for tensor in arguments if tensor is not None]
    backend.step(SPEC, *step[:3])
    backend.step_backward(SPEC, *step)
    backend.unroll_backward(SPEC, *unroll, d_points=d_points)
    backend.prepare(SPEC, step.weights)
    for tensor, copy in zip(arguments, before, strict=True):
        assert tensor is not None
        assert_same_bits(tensor, copy)


def test_renewed_weights_are_those_of_a_new_preparation(backend: Backend) -> None:
    case = StepCase(n=65).draws[0]
    old, new = case.weights, case.weights.flip(0)
    before = old.clone()

    def step(prepared: Any) -> Tensor:
        param, packed = torch.zeros_like(case.grad), backend.pack_state(case.state, torch.float32)
        backend.step_(SPEC, prepared, [param], [case.grad], [packed])
        return param

    prepared = backend.prepare(SPEC, old)
    with_old = step(prepared)
    with_new = step(backend.renew(SPEC, prepared, new))
    assert_same_bits(with_new, step(backend.prepare(SPEC, new)))
    assert not torch.equal(with_new, with_old)
    assert_same_bits(old, before)


def test_any_strides(backend: Backend) -> None:
    """Results do not depend on how the arguments lie in memory."""

    def scatter(tensor: Tensor) -> Tensor:
        holder = torch.full((*tensor.shape, 2), float("nan"))
        holder[..., 0] = tensor
        return holder[..., 0]

    step, case = StepCase(n=65).draws[0], UnrollCase(n=65, steps=3, with_d_points=True)
    (weights, grads, loss_weights, state), d_points = case.draws[0], case.d_points[0]
    assert state is not None
    assert d_points is not None
    for scattered, plain in (
        (backend.step(SPEC, *map(scatter, step[:3])), backend.step(SPEC, *step[:3])),
        (backend.step_backward(SPEC, *map(scatter, step)), backend.step_backward(SPEC, *step)),
        (
            backend.unroll_backward(
                SPEC,
                scatter(weights),
                scatter(grads),
                scatter(loss_weights),
                scatter(state),
                d_points=scatter(d_points),
            ),
            backend.unroll_backward(SPEC, weights, grads, loss_weights, state, d_points=d_points),
        ),
    ):
        for one, two in zip(scattered, plain, strict=True):
            torch.testing.assert_close(one, two)
