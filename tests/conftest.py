"""Fixtures shared by the tests: randomness, every backend, poisoned memory, ranks, and where the device comes in."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, start_ranks
from torch import Tensor

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a device they run through Triton's interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.patch_once()
    interpreter.round_to_bfloat16()
    interpreter.fuse_multiply_add()

from l2l_fast import RuleSpec
from l2l_fast.backends import Backend, backends, cpu, get, triton

CUDA_TESTS = Path(__file__).parent / "cuda"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("l2l_fast").addoption(
        "--gpu-dry-run",
        action="store_true",
        help="pretend that the CPU is a CUDA device: run the tests for one as far as Triton's interpreter goes",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "hardware: only a CUDA device can answer this; left out of a dry run")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests for a CUDA device out where there is none, unless they are asked for by name: then they fail."""
    if collection_path != CUDA_TESTS or torch.cuda.is_available() or config.getoption("--gpu-dry-run"):
        return None
    asked = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(CUDA_TESTS) for path in asked) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take what needs hardware out of a dry run, in the open: the summary counts it as deselected."""
    if not config.getoption("--gpu-dry-run"):
        return
    hardware = [item for item in items if item.get_closest_marker("hardware")]
    config.hook.pytest_deselected(items=hardware)
    items[:] = [item for item in items if item not in hardware]


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(20160614)


class OnDevice:
    """A backend that serves CPU tensors with another one on ``device``: arguments go there, results come back.

    So every test that makes CPU tensors runs on the device too. Strides and alignment go along.
    """

    def __init__(self, inner: Backend, device: torch.device) -> None:
        self.name = inner.name
        self.inner = inner
        self.device = device

    def _there(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().resolve_neg()
        source = tensor.untyped_storage()
        storage = torch.UntypedStorage(source.nbytes(), device=self.device)  # type: ignore[no-untyped-call]
        storage.copy_(source)
        moved = torch.zeros(0, dtype=tensor.dtype, device=self.device)
        return moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def unavailable(self, device: torch.device, dtype: torch.dtype, spec: RuleSpec) -> str | None:
        return self.inner.unavailable(self.device if device.type == "cpu" else device, dtype, spec)

    def prepare(self, spec: RuleSpec, weights: Tensor) -> Any:
        return self.inner.prepare(spec, self._there(weights))

    def renew(self, spec: RuleSpec, prepared: Any, weights: Tensor) -> Any:
        return self.inner.renew(spec, prepared, self._there(weights))

    def init_state(self, n: int, spec: RuleSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.inner.init_state(n, spec, dtype, self.device).cpu()

    def pack_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return self.inner.pack_state(self._there(state), dtype).cpu()

    def unpack_state(self, packed: Tensor, n: int, spec: RuleSpec) -> Tensor:
        return self.inner.unpack_state(self._there(packed), n, spec).cpu()

    @torch.no_grad()
    def step_(
        self,
        spec: RuleSpec,
        prepared: Any,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        there = [[self._there(tensor) for tensor in tensors] for tensors in (params, grads, states)]
        self.inner.step_(
            spec,
            prepared,
            *there,
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
            skip_nonfinite=skip_nonfinite,
        )
        for tensors, moved in zip((params, grads, states), there, strict=True):
            for tensor, result in zip(tensors, moved, strict=True):
                tensor.copy_(result)

    def step(self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        update, new_state = self.inner.step(spec, *map(self._there, (weights, grad, state)))
        return update.cpu(), new_state.cpu()

    def step_backward(
        self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = map(self._there, (weights, grad, state, d_update, d_state))
        d_weights, d_grad, d_state_before = self.inner.step_backward(spec, *arguments)
        return d_weights.cpu(), d_grad.cpu(), d_state_before.cpu()

    def unroll_backward(
        self,
        spec: RuleSpec,
        weights: Tensor,
        grads: Tensor,
        loss_weights: Tensor,
        state: Tensor | None,
        need_d_state: bool = True,
        d_points: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        start, d_points = (None if tensor is None else self._there(tensor) for tensor in (state, d_points))
        d_weights, d_state = self.inner.unroll_backward(
            spec, self._there(weights), self._there(grads), loss_weights, start, need_d_state, d_points
        )
        return d_weights.cpu(), None if d_state is None else d_state.cpu()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The last CUDA device, which with several is not the current one; the CPU in a dry run."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.device_count() - 1)
    if request.config.getoption("--gpu-dry-run"):
        return torch.device("cpu")
    pytest.fail("tests/cuda needs a CUDA device and there is none; --gpu-dry-run runs as much of it as can be run")


@pytest.fixture(autouse=True)
def device_serves_cpu_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a machine with a CUDA device the backend ``triton`` takes the CPU tensors of the tests.

    The tests for a device have tensors there, and nothing between them and the backend.
    """
    if request.path.is_relative_to(CUDA_TESTS):
        request.getfixturevalue("device")
        yield
        return
    if not torch.cuda.is_available() and not request.config.getoption("--gpu-dry-run"):
        yield
        return
    inner = triton.BACKEND
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "BACKEND", OnDevice(inner, device))
        get.cache_clear()
        yield
    get.cache_clear()


def _backend_ids() -> list[str]:
    """Every backend; the one in C++ once per instruction set that this processor runs."""
    ids = []
    for name, reason in backends().items():
        if name == "cpu" and reason is None:
            ids += [f"cpu-{instruction_set}" for instruction_set in cpu.instruction_sets()]
        else:
            ids.append(name)
    return ids


BACKEND_IDS = _backend_ids()


@pytest.fixture(params=BACKEND_IDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn; one that does not work here is a failure, not a skip."""
    name, _, instruction_set = request.param.partition("-")
    reason = backends()[name]
    assert reason is None, f"backend {name!r} must work where the tests run: {reason}"
    if not instruction_set:
        yield get(name)
        return
    before = cpu.instruction_set()
    cpu.use_instruction_set(instruction_set)
    yield get(name)
    cpu.use_instruction_set(before)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that an element which a kernel forgot to write shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **options: Any) -> Tensor:
            tensor = allocate(*args, **options)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        return allocate_and_fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, which small tensors want."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start_ranks(2, tmp_path_factory.mktemp("two")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start_ranks(4, tmp_path_factory.mktemp("four")) as ranks:
        yield ranks


@pytest.fixture(params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)
