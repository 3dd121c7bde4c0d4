"""What is particular to the Triton backend: launches, the table of tensors, packed forms, and who it refuses."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from numerics import assert_as_good_as_eager, in_int8
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, Identity, LearnedOptimizer, LogAndSign, RuleSpec, int8, reference
from l2l_fast.backends import get, resolve, triton
from l2l_fast.kernels import backward, launch, scaled, step, tile, weights

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = RuleSpec()
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from here on."""
    names: list[str] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.kernel.__name__)
            return self.kernel[grid]

    for module, name in (
        (step, "step_in_place_kernel"),
        (step, "step_kernel"),
        (backward, "backward_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    return names


# Launches


def test_one_launch_for_any_number_of_tensors(launches: list[str], generator: torch.Generator) -> None:
    lengths = torch.randint(0, 5, (300,), generator=generator).tolist()
    params = [torch.nn.Parameter(torch.randn(length, generator=generator)) for length in lengths]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    LearnedOptimizer(params, CoordinatewiseLSTM(), backend="triton").step()
    assert launches == ["step_in_place_kernel"]


def test_one_launch_per_group_and_dtype(launches: list[str]) -> None:
    groups = [
        [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float16)] for _ in "ab"
    ]
    for param in (param for group in groups for param in group):
        param.grad = torch.ones_like(param)
    LearnedOptimizer([{"params": group} for group in groups], CoordinatewiseLSTM(), backend="triton").step()
    assert launches == ["step_in_place_kernel"] * 4


def test_nothing_to_do_launches_nothing(launches: list[str]) -> None:
    param = torch.nn.Parameter(torch.ones(0))
    param.grad = torch.ones(0)
    LearnedOptimizer([param], CoordinatewiseLSTM(), backend="triton").step()
    assert launches == []


def test_the_gradient_of_an_unroll_is_one_launch(launches: list[str]) -> None:
    weights_ = torch.zeros(SPEC.num_weights)
    triton.BACKEND.unroll_backward(SPEC, weights_, torch.ones(4, 70), torch.ones(4), torch.zeros(70, 2, 2, 20))
    assert launches == ["backward_kernel"]


@pytest.mark.parametrize(("tiles", "multiprocessors", "programs"), [(0, 132, 0), (1, 132, 1), (10**6, 132, 528)])
def test_grid(tiles: int, multiprocessors: int, programs: int) -> None:
    assert launch.LaunchConfig(programs_per_sm=4).grid(tiles, multiprocessors) == programs


# The table of tensors


@pytest.fixture
def training(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor], list[Tensor], Any]:
    """Three tensors, their gradients and states, and prepared weights."""
    params = [torch.randn(n, generator=generator) for n in (70, 1, 130)]
    grads = [torch.randn(param.shape, generator=generator) for param in params]
    states = [triton.BACKEND.init_state(param.numel(), SPEC, torch.float32, CPU) for param in params]
    rule = CoordinatewiseLSTM()
    return params, grads, states, triton.BACKEND.prepare(SPEC, rule.flat_weights())


def test_the_table_says_where_everything_is(training: Any) -> None:
    params, grads, states, prepared = training
    table = prepared.table(params)
    assert table.tiles.count == 6
    assert table.tiles.tiles.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert table.rows(params, grads, states).tolist() == [
        [param.data_ptr(), grad.data_ptr(), state.data_ptr(), param.numel()]
        for param, grad, state in zip(params, grads, states, strict=True)
    ]


def test_the_table_is_written_only_when_something_moved(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads, states, prepared = training
    triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    table = prepared.table(params)
    written: list[list[int]] = []
    original = table._host_rows

    def recorded(addresses: list[int]) -> Tensor:
        written.append(addresses)
        rows: Tensor = original(addresses)
        return rows

    monkeypatch.setattr(table, "_host_rows", recorded)
    triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    assert written == []
    grads[1] = grads[1].clone()
    triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    assert [addresses[4] for addresses in written] == [grads[1].data_ptr()]
    assert prepared.table(params) is table


def test_groups_keep_their_tables(training: Any) -> None:
    """Even if they are of the same sizes."""
    params, prepared = training[0], training[-1]
    other = [param.clone() for param in params]
    tables = [prepared.table(group) for group in (params, other, params[:2])]
    assert len({id(table) for table in tables}) == 3
    for group, table in zip((params, other, params[:2]), tables, strict=True):
        assert prepared.table(group) is table
    assert prepared.table(params).tiles is prepared.table(other).tiles


def test_tables_do_not_pile_up(training: Any) -> None:
    prepared = training[-1]
    alive = [[torch.empty(size) for size in (3 + i % 300, 4)] for i in range(3 * prepared._LIMIT)]
    for group in alive + alive[-300:]:
        assert prepared.table(group).tiles.count == sum(-(-param.numel() // 64) for param in group)
    assert len(prepared._tables) == len(prepared._tiles) == prepared._LIMIT


def test_moved_gradients_are_followed(training: Any) -> None:
    """The old gradients are poison by then."""
    params, grads, states, prepared = training
    expected = [param.clone() for param in params]
    other = [state.clone() for state in states]
    for _ in range(2):
        triton.BACKEND.step_(SPEC, prepared, expected, grads, other)
    triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    moved = [grad.clone() for grad in grads]
    for grad in grads:
        grad.fill_(float("nan"))
    triton.BACKEND.step_(SPEC, prepared, params, moved, states)
    for actual, right in zip(params + states, expected + other, strict=True):
        assert torch.equal(actual, right)


def test_a_gradient_of_another_size_is_refused(training: Any) -> None:
    params, grads, states, prepared = training
    before = [param.clone() for param in params]
    grads[2] = grads[2][:-1]
    with pytest.raises(RuntimeError, match="another size than its parameter"):
        triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_a_tensor_without_memory_is_refused(training: Any) -> None:
    params, grads, states, prepared = training
    before = [param.clone() for param in params]
    grads[2] = grads[2].clone()
    grads[2].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"Tensor of shape \(130,\) has no memory of its own.*'reference'"):
        triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_parameters_that_share_memory_are_refused(training: Any) -> None:
    """The interpreter updates them one after the other, a device at the same time."""
    params, grads, states, prepared = training
    params[1] = params[0][5:6]
    with pytest.raises(ValueError, match="two parameters share memory"):
        triton.BACKEND.step_(SPEC, prepared, params, grads, states)


def test_a_gradient_on_another_device_is_refused(training: Any) -> None:
    params, grads, states, prepared = training

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:1")

    grads[1] = grads[1].as_subclass(Elsewhere)
    with pytest.raises(RuntimeError, match="is on cuda:1, its parameter's step runs on cpu"):
        triton.BACKEND.step_(SPEC, prepared, params, grads, states)


def test_a_default_device_changes_nothing(training: Any) -> None:
    params, grads, states, prepared = training
    torch.set_default_device("meta")
    try:
        triton.BACKEND.step_(SPEC, prepared, params, grads, states)
    finally:
        torch.set_default_device(None)
    assert all(param.device == CPU for param in params)


# Packed forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_number_of_a_state_has_its_place(dtype: torch.dtype) -> None:
    """16 bytes in a row belong to one coordinate, or to the two that a thread holds."""
    coordinate = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 2, 2, 20)
    vectors = tile.pack(coordinate, dtype).view(-1, 16 // dtype.itemsize)
    for vector in vectors:
        assert len(vector.unique()) == dtype.itemsize % 4 // 2 + 1
    number = torch.arange(64 * 80.0).view(64, 2, 2, 20) % 2048  # exact in float16
    assert torch.equal(tile.pack(number, dtype).flatten().sort().values, number.flatten().to(dtype).sort().values)


def test_coordinates_that_pad_the_last_tile_are_zero() -> None:
    packed = tile.pack(torch.ones(65, 2, 2, 20), torch.float32)
    assert packed.shape == (2, 5, 1024)
    assert packed.sum() == 65 * 80


def test_every_number_of_an_int8_state_has_its_place() -> None:
    """8 bytes in a row belong to the two coordinates of a thread, and 4 scales to their four units."""
    coordinate = torch.arange(64, dtype=torch.int8).view(4, 16, 1).expand(4, 16, 80)
    number = torch.arange(80, dtype=torch.int8).expand(4, 16, 80)
    scale = torch.arange(80, dtype=torch.uint8).expand(4, 80)
    coordinates, numbers = scaled.pack(coordinate, scale), scaled.pack(number, scale)
    assert coordinates.shape == (1, 5, 1088)
    for k in range(5):
        of_thread = coordinates[0, k, :1024].view(4, 8, 4, 2, 4)  # warp row quad half | unit
        row = torch.arange(8).view(8, 1)
        for half in (0, 1):
            first = of_thread[:, :, :, half, 0]
            assert torch.equal(of_thread[:, :, :, half], first[..., None].expand(4, 8, 4, 4))
            assert torch.equal(first.long(), (16 * torch.arange(4).view(4, 1, 1) + 8 * half + row).expand(4, 8, 4))
        unit = numbers[0, k, :1024].view(4, 8, 4, 2, 4)
        scales = numbers[0, k, 1024:].view(4, 1, 4, 1, 4)
        assert torch.equal(unit, scales.expand(4, 8, 4, 2, 4))
    units = numbers[0, :, :1024].reshape(5, 4, 8, 4, 2, 4)[:, 0, 0, :, 0]
    assert torch.equal(units.flatten().sort().values, number[0, 0])


@pytest.mark.parametrize("groups", [0, 1, 3, 4, 6])
def test_an_int8_state_comes_back_with_zeros_past_its_end(groups: int, generator: torch.Generator) -> None:
    numbers = torch.randint(-128, 128, (groups, 16, 80), generator=generator).to(torch.int8)
    scales = torch.randint(0, 248, (groups, 80), generator=generator).to(torch.uint8)
    back, back_scales = scaled.unpack(scaled.pack(numbers, scales))
    assert len(back) == len(back_scales) == -(-groups // 4) * 4
    assert torch.equal(back[:groups], numbers)
    assert torch.equal(back_scales[:groups], scales)
    assert not back[groups:].any()
    assert not back_scales[groups:].any()


INT8_STATES = {
    "tiny": 1e-7,
    "smallest": 1e-38,
    "usual": 1.0,
}


@pytest.mark.parametrize("size", INT8_STATES.values(), ids=INT8_STATES)
def test_an_int8_step_is_as_close_to_float64_as_one_from_float32(size: float, generator: torch.Generator) -> None:
    """Its products take two terms, for what it stores has seven bits, though it may be too small for float16."""
    n = 64
    weights_ = CoordinatewiseLSTM().flat_weights().detach() * 3
    state = int8.unpack(int8.pack(size * torch.randn(n, 2, 2, 20, generator=generator).tanh()), n, 80)
    grad = torch.randn(n, generator=generator)
    right, _ = reference.step(SPEC, weights_.double(), grad.double(), state.double())
    eager, _ = reference.step(SPEC, weights_, grad, state.float())
    param = torch.zeros(n)
    prepared = triton.BACKEND.prepare(SPEC, weights_)
    triton.BACKEND.step_(SPEC, prepared, [param], [grad], [triton.BACKEND.pack_state(state, torch.int8)])
    assert_as_good_as_eager("param", param, eager, right)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("value", [1e-40, 3e38, float("inf"), float("nan")])
def test_int8_states_of_edge_values_are_stored_as_the_codec_stores_them(
    value: float, skip_nonfinite: bool, generator: torch.Generator
) -> None:
    """An output of zeros keeps the parameter; c only grows, to beyond what float32 holds."""
    state = torch.randn(70, 2, 2, 20, generator=generator)
    state[7, :, 1] = value
    state[11, 1, 1, 18] = -value
    state[32:48, 0, 1, 3] = value  # a whole group
    grad = torch.zeros(70)
    grad[5] = float("nan")
    weights_ = CoordinatewiseLSTM().flat_weights().detach()
    results = {}
    for dtype in (torch.float32, torch.int8):
        stored = triton.BACKEND.pack_state(int8.unpack(int8.pack(state), 70, 80), dtype)
        prepared = triton.BACKEND.prepare(SPEC, weights_)
        triton.BACKEND.step_(SPEC, prepared, [torch.zeros(70)], [grad], [stored], skip_nonfinite=skip_nonfinite)
        results[dtype] = triton.BACKEND.unpack_state(stored, 70, SPEC)
    expected, steps = in_int8(results[torch.float32])
    assert torch.equal(results[torch.int8].isnan(), expected.isnan())
    assert ((results[torch.int8].double() - expected.double()).abs().nan_to_num() <= steps).all()


@pytest.mark.parametrize("spec", [RuleSpec(), RuleSpec(preprocess=Identity())], ids=["log", "identity"])
def test_packed_weights_lose_less_than_float32(spec: RuleSpec, generator: torch.Generator) -> None:
    flat = torch.randn(spec.num_weights, generator=generator, dtype=torch.float64)
    places = weights._map(spec.features, CPU)
    packed = weights.pack(flat, spec.features)
    high_head, low_head, high_tail, low_tail = (
        part.double()
        for part in packed.halves.split([weights.SLICES * size for size in (weights.HEAD,) * 2 + (weights.TAIL,) * 2])
    )
    inside = slice(0, spec.num_weights - 21)  # the output layer is not among the slices
    found = torch.where(
        places.head[inside] >= 0,
        (high_head + low_head)[places.head[inside]],
        (high_tail + low_tail)[places.tail[inside]],
    )
    right = flat[inside] * places.scale[inside]
    assert ((found - right).abs() <= 2.0**-23 * right.abs() + 2.0**-25).all()
    assert torch.equal(packed.vectors[:21], flat[-21:].float())
    # Every weight once, and nothing else.
    residuals = 80 * (2 * spec.features + 1)
    assert int((high_head != 0).sum() + (high_tail != 0).sum()) == spec.num_weights - 21 + residuals
    assert len(places.sums.unique()) == spec.num_weights


def test_weights_too_large_for_float16_saturate() -> None:
    flat = torch.full((SPEC.num_weights,), 1e6)
    packed = weights.pack(flat, SPEC.features)
    assert packed.halves.isfinite().all()
    assert packed.halves.abs().max() == 65504


# Who is refused


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes believe that there is a CUDA device of some compute capability."""

    def present(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
        triton._capability.cache_clear()

    yield present
    triton._capability.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_serves_tensor_cores(device: Any, capability: tuple[int, int]) -> None:
    device(*capability)
    assert triton.BACKEND.unavailable(CUDA, torch.float32, SPEC) is None
    assert resolve(None, CUDA, torch.float32, SPEC).name == "triton"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "needs compute capability 8.0.*cuda has 7.5"), ((10, 0), "miscompiles.*10.0"), ((10, 3), "10.3")],
)
def test_other_devices_fall_back_or_raise(
    device: Any, capability: tuple[int, int], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    device(*capability)
    from l2l_fast.backends import _report_fallback

    _report_fallback.cache_clear()
    assert [resolve(None, CUDA, torch.float32, SPEC).name for _ in range(2)] == ["reference"] * 2
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match=f"backend='triton' can't be used: .*{reason}"):
        resolve("triton", CUDA, torch.float32, SPEC)


def test_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable = triton.BACKEND.unavailable
    assert "float64" in str(unavailable(CPU, torch.float64, SPEC))
    assert "p=0.001) a feature may be too large" in str(
        unavailable(CPU, torch.float32, RuleSpec(preprocess=LogAndSign(0.001)))
    )
    assert "20 hidden units, not 7" in str(unavailable(CPU, torch.float32, RuleSpec(hidden_size=7)))
    assert "not on meta" in str(unavailable(torch.device("meta"), torch.float32, SPEC))
    assert "there is no CUDA device" in str(unavailable(CUDA, torch.float32, SPEC)) or torch.cuda.is_available()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(unavailable(CUDA, torch.float32, SPEC))
    monkeypatch.setattr(triton, "_IMPORT_ERROR", "No module named 'triton'")
    assert "pip install 'l2l_fast[triton]'" in str(unavailable(CPU, torch.float32, SPEC))


def test_cpu_tensors_need_the_interpreter() -> None:
    code = (
        "import torch, l2l_fast\n"
        "optimizer = l2l_fast.LearnedOptimizer([torch.zeros(3, requires_grad=True)], 'quadratic', backend='triton')"
    )
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "RuntimeError: backend='triton' can't be used: it runs on CUDA devices, not on cpu" in result.stderr


def test_a_graph_does_not_capture_what_allocates(monkeypatch: pytest.MonkeyPatch, training: Any) -> None:
    params, _, _, prepared = training
    monkeypatch.setattr(triton, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take a step before"):
        triton.BACKEND.init_state(3, SPEC, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="take a step before"):
        prepared.table(params)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes believe that a CUDA graph is being captured, or not."""
    monkeypatch.setattr(triton, "_KEPT_FOR_GRAPHS", [])
    return lambda capturing: monkeypatch.setattr(triton, "_capturing", lambda device: capturing)


def test_what_a_graph_copies_from_is_never_written_again(capture: Any, training: Any) -> None:
    """A replay reads the host memory of its capture, whatever has happened since."""
    params, grads, states, prepared = training
    table = prepared.table(params)
    eager = table.rows(params, grads, states)
    capture(True)
    places = [grads, [grad.clone() for grad in grads], [grad.clone() for grad in grads]]
    captured = [table.rows(params, place, states) for place in places]
    again = table.rows(params, places[0], states)
    capture(False)
    table.rows(params, [grad.clone() for grad in grads], states)
    hosts = [host for host, _ in triton._KEPT_FOR_GRAPHS]
    assert len({rows.data_ptr() for rows in (eager, *captured)}) == 4
    assert again.data_ptr() == captured[0].data_ptr()
    for host, rows, place in zip(hosts, captured, places, strict=True):
        assert host[:, 1].tolist() == rows[:, 1].tolist() == [grad.data_ptr() for grad in place]


def test_captures_are_supplied_between_them(capture: Any, training: Any) -> None:
    params, grads, states, prepared = training
    table = prepared.table(params)

    def capture_many(count: int) -> None:
        capture(True)
        for _ in range(count):
            kept.append([grad.clone() for grad in grads])
            table.rows(params, kept[-1], states)

    kept: list[list[Tensor]] = []
    capture_many(triton._CAPTURES)
    with pytest.raises(RuntimeError, match="take a step outside of a capture"):
        capture_many(1)
    capture(False)
    table.rows(params, grads, states)
    capture_many(triton._CAPTURES)
    assert len({rows.data_ptr() for _, rows in triton._KEPT_FOR_GRAPHS}) == 2 * triton._CAPTURES


def test_preprocessing_as_the_kernels_take_it() -> None:
    threshold, p, exp_p = triton._preprocessing(RuleSpec(preprocess=LogAndSign(5.0)))
    assert (threshold, p, exp_p) == (math.exp(-5), 5.0, math.exp(5))
    assert get("triton") is triton.BACKEND
