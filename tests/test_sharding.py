"""Parameters that several processes share: every rank steps what it holds, and the result is that of one process.

Gradients are the same in both runs, and coordinates are independent, so parameters and states agree bit for bit.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_loop import make_rule
from ranks import Ranks
from sharded import (
    PLACEMENTS,
    _local,
    assert_placed_alike,
    assert_same,
    assert_same_shares,
    communicates,
    contents,
    loss_of,
    make_model,
    make_optimizer,
    on_all,
    params_of,
    placed,
    seeded,
    set_grads,
    sharded_and_plain,
    states_of,
    take_steps,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from l2l_fast import LearnedOptimizer, optimizer_in_backward
from l2l_fast.release import OptimizerInBackward

pytestmark = pytest.mark.usefixtures("one_thread")


# In int8 the coordinates that share a scale are those that a rank has in a row, so that a step depends on the sharding:
# by some steps of the state, 1/64 to 1/128 of the largest of 16 numbers.
INT8_TOLERANCE = 0.05

# ---- steps ----


def step_as_one_process(backend: str, state_dtype: torch.dtype) -> None:
    _, sharded, plain = sharded_and_plain(backend=backend, state_dtype=state_dtype)
    empty = [param.shape for param in params_of(sharded) if isinstance(param, DTensor) and not param.to_local().numel()]
    assert bool(empty) == (dist.get_rank() > 0)
    for step in range(3):
        set_grads(params_of(sharded), step)
        with communicates(0):
            sharded.step()
            states_of(sharded)
        take_steps(plain, range(step, step + 1))
    # The matrix products of the reference may round otherwise for another number of rows.
    tolerances = {"cpu": (0.0, 0.0), "reference": (1e-5, 1e-2)}[backend]
    before, after = (INT8_TOLERANCE, INT8_TOLERANCE) if state_dtype == torch.int8 else tolerances
    assert_same_shares(sharded, plain, before)
    for optimizer in (sharded, plain):
        optimizer.convert_state(torch.bfloat16)
    assert_same_shares(sharded, plain, after)
    assert_placed_alike(sharded)


@pytest.mark.parametrize(
    ("backend", "state_dtype"),
    [("cpu", torch.float32), ("cpu", torch.float16), ("cpu", torch.int8), ("reference", torch.float32)],
    ids=str,
)
def test_steps_of_fsdp(ranks: Ranks, backend: str, state_dtype: torch.dtype) -> None:
    on_all(ranks, step_as_one_process, backend, state_dtype)


def train_as_one_process() -> None:
    model, sharded, plain = sharded_and_plain()
    before = contents_of_params(plain)
    for step in range(3):
        sharded.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()  # type: ignore[no-untyped-call]
        for param, twin in zip(params_of(sharded), params_of(plain), strict=True):
            assert param.grad is not None
            twin.grad = whole(param.grad)
        sharded.step()
        plain.step()
    assert_same(contents(sharded), contents(plain))
    assert not torch.equal(params_of(plain)[0], before[0])


def contents_of_params(optimizer: LearnedOptimizer) -> list[Tensor]:
    return [whole(param).clone() for param in params_of(optimizer)]


def test_training_with_fsdp(ranks: Ranks) -> None:
    on_all(ranks, train_as_one_process)


def train_in_the_backward() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    models = [make_model() for _ in range(2)]
    for model in models:
        fully_shard(model, mesh=mesh)
    handle = optimizer_in_backward(models[0], make_rule(seeded(1)), lr=0.5, weight_decay=0.1)
    optimizer = make_optimizer(models[1].parameters())
    for step in range(3):
        for model in models:
            loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert own.grad is None
            assert torch.equal(_local(own), _local(other))
    states = [entry["lstm"] for _, entry in sorted(handle.state_dict()["state"].items())]
    for state, twin in zip(states, states_of(optimizer), strict=True):
        assert torch.equal(_local(state), _local(twin))


def test_update_in_the_backward_of_fsdp(ranks: Ranks) -> None:
    on_all(ranks, train_in_the_backward)


def resume_in_the_backward(folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> tuple[nn.Module, OptimizerInBackward]:
        model = make_model()
        fully_shard(model, mesh=mesh)
        return model, optimizer_in_backward(model, make_rule(seeded(1)), lr=0.5, warmup=4)

    def train(model: nn.Module, steps: range) -> None:
        for step in steps:
            loss_of(model, step, dist.get_rank()).backward()  # type: ignore[no-untyped-call]

    model, handle = make()
    train(model, range(3))
    save_checkpoint(dict(zip(("model", "optimizer"), get_state_dict(model, handle), strict=True)), checkpoint_id=folder)
    train(model, range(3, 5))
    fresh, its_handle = make()
    template: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(fresh, its_handle), strict=True))
    load_checkpoint(template, checkpoint_id=folder)
    set_state_dict(fresh, its_handle, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    assert len(its_handle.state) == len(list(fresh.parameters()))
    train(fresh, range(3, 5))
    for own, other in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(_local(own), _local(other))


def test_resume_in_the_backward_of_fsdp(two: Ranks, tmp_path: Path) -> None:
    on_all(two, resume_in_the_backward, str(tmp_path / "checkpoint"))


def train_with_ddp() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(make_model(seed=rank))  # which takes the weights of rank 0
    optimizer, alone = make_optimizer(model.parameters()), make_optimizer(make_model().parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        for param, twin in zip(params_of(optimizer), params_of(alone), strict=True):
            assert param.grad is not None
            twin.grad = param.grad.clone()
        optimizer.step()
        alone.step()
    assert_same(contents(optimizer), contents(alone))
    for tensor in contents(optimizer):
        gathered = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(gathered, tensor)
        assert_same(gathered, [tensor] * size)


def test_training_with_ddp(ranks: Ranks) -> None:
    on_all(ranks, train_with_ddp)


def step_and_load_with_placements() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = [torch.randn(shape, generator=seeded(0)) for shape in [(3, 5, 2), (1, 7, 3), (2, 2, 33)]]
    for placements in PLACEMENTS:
        sharded = make_optimizer(placed(tensors, mesh, placements))
        plain = make_optimizer([nn.Parameter(tensor.clone()) for tensor in tensors])
        take_steps(sharded, range(2))
        take_steps(plain, range(2))
        assert_same_shares(sharded, plain)
        assert_placed_alike(sharded)
        for saved in (sharded.state_dict(), plain.state_dict()):
            loaded = make_optimizer(placed(contents_of_params(plain), mesh, placements))
            with communicates(0):
                loaded.load_state_dict(saved)
            assert_placed_alike(loaded)
            assert_same_shares(loaded, plain)
            twin = copy.deepcopy(plain)
            take_steps(loaded, range(2, 4))
            take_steps(twin, range(2, 4))
            assert_same_shares(loaded, twin)


def test_placements(four: Ranks) -> None:
    """The state of a sharded run, and the whole state of an unsharded one that every rank has read, load alike."""
    on_all(four, step_and_load_with_placements)


def train_with_tensor_parallelism(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def make(seed: int) -> tuple[nn.Module, LearnedOptimizer]:
        model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=seeded(seed)))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        return model, make_optimizer(model.parameters())

    model, sharded = make(0)
    plain = make_optimizer([nn.Parameter(whole(param).clone()) for param in model.parameters()])
    for step in range(3):
        loss_of(model, step, mesh.get_local_rank("data")).backward()  # type: ignore[no-untyped-call]
        for param, twin in zip(params_of(sharded), params_of(plain), strict=True):
            assert param.grad is not None
            twin.grad = whole(param.grad)
        with communicates(0):
            sharded.step()
        sharded.zero_grad()
        plain.step()
    assert_same(contents(sharded), contents(plain))
    assert_placed_alike(sharded)
    save(model, sharded, folder)
    other_model, other = make(5)
    load(other_model, other, folder)
    assert_same(contents(other), contents(plain))


def test_tensor_parallelism_with_fsdp(four: Ranks, tmp_path: Path) -> None:
    """A row-wise shard of a shard has a placement of its own kind."""
    on_all(four, train_with_tensor_parallelism, tmp_path)


def reduce_a_gradient() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (param,) = placed([torch.randn(4, 6, generator=seeded(0))], mesh, [Replicate()])
    twin = nn.Parameter(whole(param).clone())
    optimizer, plain = make_optimizer([param]), make_optimizer([twin])
    batch = distribute_tensor(torch.randn(8, 6, generator=seeded(2)), mesh, [Shard(0)])
    nn.functional.linear(batch, param).square().sum().backward()  # type: ignore[no-untyped-call]
    assert isinstance(param.grad, DTensor)
    assert param.grad.placements[0].is_partial()
    twin.grad = whole(param.grad)
    with communicates(1):
        optimizer.step()
    plain.step()
    assert_same(contents(optimizer), contents(plain))


def test_gradient_that_is_a_sum_to_take(two: Ranks) -> None:
    """Of a replicated parameter whose input is sharded; the sum is the only thing that is communicated."""
    on_all(two, reduce_a_gradient)


def step_on_a_part_of_the_ranks() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    optimizer = make_optimizer(placed([torch.randn(5, 3, generator=seeded(0))], mesh, [Shard(0)]))
    take_steps(optimizer, range(2))
    (state,) = states_of(optimizer)
    other = make_optimizer(placed([torch.zeros(5, 3)], mesh, [Shard(0)]))
    other.load_state_dict(optimizer.state_dict())
    assert_same([states_of(other)[0].to_local()], [state.to_local()])  # type: ignore[attr-defined]
    assert (state.to_local().numel() > 0) == (dist.get_rank() < 2)  # type: ignore[attr-defined]


def test_ranks_outside_the_mesh(four: Ranks) -> None:
    on_all(four, step_on_a_part_of_the_ranks)


def copy_and_continue() -> None:
    model, sharded, plain = sharded_and_plain()
    take_steps(sharded, range(2))
    twin = copy.deepcopy(sharded)
    take_steps(sharded, range(2, 4))
    take_steps(twin, range(2, 4))
    take_steps(plain, range(4))
    assert_same_shares(sharded, plain)
    assert_same_shares(twin, plain)
    assert all(a is not b for a, b in zip(params_of(twin), model.parameters(), strict=True))


def test_deep_copy(two: Ranks) -> None:
    on_all(two, copy_and_continue)


# ---- torch.distributed.checkpoint ----


def save(model: nn.Module, optimizer: LearnedOptimizer, folder: Path) -> None:
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    save_checkpoint(state, checkpoint_id=folder)


def load(model: nn.Module, optimizer: LearnedOptimizer, folder: Path) -> None:
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    load_checkpoint(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def model_and_optimizer(seed: int = 0, **options: Any) -> tuple[nn.Module, LearnedOptimizer]:
    model = make_model(seed)
    if dist.is_initialized():
        fully_shard(model)
    return model, make_optimizer(model.parameters(), **options)


def run_and_save(folder: Path, state_dtype: torch.dtype) -> None:
    model, optimizer = model_and_optimizer(state_dtype=state_dtype)
    take_steps(optimizer, range(3))
    save(model, optimizer, folder)


def load_and_run(folder: Path, state_dtype: torch.dtype) -> None:
    model, optimizer = model_and_optimizer(seed=9, state_dtype=state_dtype)
    load(model, optimizer, folder)
    take_steps(optimizer, range(3, 5))
    uninterrupted = make_optimizer(make_model().parameters(), state_dtype=state_dtype)
    take_steps(uninterrupted, range(5))
    tolerance = INT8_TOLERANCE if state_dtype == torch.int8 else 0.0
    if dist.is_initialized():
        assert_same_shares(optimizer, uninterrupted, tolerance)
    else:
        assert_same(contents(optimizer), contents(uninterrupted), tolerance)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which is what one process means
@pytest.mark.parametrize(
    ("saved", "loaded", "state_dtype"),
    [
        *((saved, loaded, torch.float32) for saved, loaded in ((4, 4), (4, 2), (4, 1), (2, 4), (1, 4))),
        (4, 2, torch.int8),
        (2, 1, torch.int8),
    ],
    ids=str,
)
def test_resume_on_another_number_of_ranks(
    two: Ranks, four: Ranks, tmp_path: Path, saved: int, loaded: int, state_dtype: torch.dtype
) -> None:
    """As if nothing had happened, and as one process would have gone on."""
    for count, function in ((saved, run_and_save), (loaded, load_and_run)):
        if count == 1:
            function(tmp_path, state_dtype)
        else:
            on_all({2: two, 4: four}[count], function, tmp_path, state_dtype)


def pass_on(options: StateDictOptions) -> None:
    model, optimizer = model_and_optimizer()
    take_steps(optimizer, range(2))
    weights = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert (dist.get_rank() > 0 and options.broadcast_from_rank0) == (not state)
    other_model, other = model_and_optimizer(seed=9)
    set_model_state_dict(other_model, weights, options=options)
    set_optimizer_state_dict(other_model, other, state, options=options)
    assert_placed_alike(other)
    take_steps(other, range(2, 4))
    take_steps(optimizer, range(2, 4))
    assert_same(contents(other), contents(optimizer))


@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(full_state_dict=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    ],
    ids=["full", "flat", "broadcast"],
)
def test_options_of_state_dicts(two: Ranks, options: StateDictOptions) -> None:
    on_all(two, pass_on, options)


# ---- what is refused ----


def refusals() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = torch.randn(4, 6, generator=seeded(0))
    partial = nn.Parameter(DTensor.from_local(tensor, mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"sharded or replicated, got placements \(Partial.*redistribute it first"):
        make_optimizer([partial])

    first, second = placed([tensor, tensor], mesh, [Shard(0)])
    sharded = make_optimizer([first, second])
    take_steps(sharded, range(1))
    before = [tensor.clone() for tensor in contents(sharded)]
    set_grads([first, second], 1)
    second.grad = torch.ones(4, 6)
    with pytest.raises(TypeError, match=r"is a DTensor but its gradient is a Tensor; .*distribute_tensor"):
        sharded.step()
    second.grad = distribute_tensor(torch.ones(4, 6), DeviceMesh("cpu", [0]), [Replicate()])
    with pytest.raises(RuntimeError, match=r"shape \(4, 6\) on DeviceMesh.* has a gradient of shape \(4, 6\) on"):
        sharded.step()
    assert_same(contents(sharded), before)

    plain = make_optimizer([nn.Parameter(tensor.clone()), nn.Parameter(tensor.clone())])
    params_of(plain)[0].grad = first.grad
    with pytest.raises(TypeError, match=r"is a plain tensor but its gradient is a DTensor; .*full_tensor\(\)"):
        plain.step()
    with pytest.raises(ValueError, match=r"parameter 0 is a DTensor but the parameter is not; .*full_tensor\(\)"):
        plain.load_state_dict(sharded.state_dict())
    assert not plain.state
    # A step later too, when the parameter is known.
    params_of(plain)[0].grad = torch.ones_like(tensor)
    plain.step()
    known = params_of(plain)[0].detach().clone()
    params_of(plain)[0].grad = first.grad
    with pytest.raises(TypeError, match="is a plain tensor but its gradient is a DTensor"):
        plain.step()
    assert torch.equal(params_of(plain)[0], known)

    otherwise = make_optimizer(placed([tensor, tensor], mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"placements \(Shard\(dim=1\),\) on .* got \(Shard\(dim=0\),\) on"):
        otherwise.load_state_dict(sharded.state_dict())
    saved = sharded.state_dict()
    saved["state"][1]["lstm"] = saved["state"][1]["lstm"].to_local()
    with pytest.raises(ValueError, match=r"parameter 1 must have shape \(4, 6, 2, 2, 20\)"):
        sharded.load_state_dict(saved)
    assert_same(contents(sharded), before)


def test_refusals(two: Ranks) -> None:
    on_all(two, refusals)


def test_importing_the_package_leaves_dtensor_alone() -> None:
    """It takes half as long again as PyTorch, which brings it itself where an optimizer is made."""
    code = "import sys, l2l_fast; sys.exit('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
