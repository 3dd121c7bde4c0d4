"""Any ``nn.Module`` with a loss and a data set as a problem."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset, IterableDataset, default_collate

Split = Literal["train", "held_out", "test"]
ModuleFn = Callable[[], nn.Module]
LossFn = Callable[[Any, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]

EVALUATED_EXAMPLES = 8192


def module_problem(
    module_fn: ModuleFn,
    loss_fn: LossFn,
    data: Pair | Dataset[Any],
    *,
    minibatch: int = 128,
    test_data: Pair | Dataset[Any] | None = None,
    held_out_data: Pair | Dataset[Any] | None = None,
) -> ModuleProblem:
    """Train a module on a data set; every instance has an initialisation and minibatches of its own.

    A loss is a function of parameters, minibatch and the state of the generator, and leaves nothing behind:
    normalisation layers in training mode normalise by the minibatch and keep no running statistics, dropout draws
    from the generator, and what else a module writes into its buffers is gone after the call. Buffers and
    parameters that require no grad are constants of an instance. A submodule that ``module_fn`` has put in
    evaluation mode stays in it. All of it is tried on two instances at once, so that what can't work is said here.

    Args:
        module_fn: builds a freshly initialised module on the CPU, of the same architecture at every call, with random
            numbers from PyTorch only. What it returns is read and not changed.
        loss_fn: ``loss_fn(module(inputs), targets)``, a scalar: the mean over the examples of one minibatch.
        data: training data, ``(inputs [n, ...], targets [n, ...])`` or a map-style data set of such pairs, which is
            read once: random augmentation is drawn once too.
        minibatch: examples in a minibatch, drawn with replacement.
        test_data: data for ``evaluate(params, "test")``, as ``data``.
        held_out_data: data that modules are not trained on, as ``data``: the loss that counts in meta-training and
            validation is on those, so that a rule learns not to overfit.

    Raises:
        TypeError: if an argument, or what ``module_fn`` or ``loss_fn`` returns, has the wrong kind.
        ValueError: if there is nothing to train or no data, or if module and loss fail on a minibatch, alone or under
            ``torch.func.vmap``; the error of PyTorch is its cause.
    """
    if isinstance(module_fn, nn.Module):
        raise TypeError(
            f"module_fn must be a function that builds a module, got a {type(module_fn).__name__} itself; "
            "pass lambda: copy.deepcopy(module) to start all instances from it"
        )
    for name, function in (("module_fn", module_fn), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    if isinstance(minibatch, bool) or not isinstance(minibatch, int):
        raise TypeError(f"minibatch must be an int, got {minibatch!r}")
    if minibatch < 1:
        raise ValueError(f"minibatch must be at least 1, got {minibatch}")
    splits = {"train": _load_pair("data", data)}
    if test_data is not None:
        splits["test"] = _load_pair("test_data", test_data)
    if held_out_data is not None:
        splits["held_out"] = _load_pair("held_out_data", held_out_data)
    problem = ModuleProblem(module_fn, loss_fn, splits, minibatch)
    for split in problem.splits:
        _try_alone(problem, split)
    _try_batched(problem)
    return problem


class ModuleProblem:
    """A module to train; made by :func:`module_problem`, which checks what this takes for granted.

    Args:
        module_fn, loss_fn, minibatch: as there.
        splits: inputs and targets of ``"train"`` and, where there are such data, of ``"held_out"`` and ``"test"``.
    """

    def __init__(self, module_fn: ModuleFn, loss_fn: LossFn, splits: Mapping[str, Pair], minibatch: int) -> None:
        self.module_fn = module_fn
        self.loss_fn = loss_fn
        self.splits = splits
        self.minibatch = minibatch
        # Both hold the architecture only; tensors come from the instances.
        self.training_module = _without_running_statistics(_build(module_fn, 0))
        self.evaluation_module = copy.deepcopy(self.training_module).eval()
        parameters = dict(self.training_module.named_parameters())
        self.trainable = {name: p.shape for name, p in parameters.items() if p.requires_grad}
        self.frozen = {name: p.shape for name, p in parameters.items() if not p.requires_grad}
        self.buffers = {name: buffer.shape for name, buffer in self.training_module.named_buffers()}
        if not self.trainable:
            raise ValueError(
                f"the {type(self.training_module).__name__} that module_fn returns has no parameter that requires "
                "grad, so there is nothing to train"
            )
        self._copies: dict[torch.device, Mapping[str, Pair]] = {}
        self._repr = self._describe()

    def __repr__(self) -> str:
        return self._repr

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> ModuleInstances:
        """``batch_size`` modules to train, on ``device`` (``None`` is the CPU), with constants of their own.

        Raises:
            ValueError: if ``batch_size`` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        device = torch.device(device or "cpu")
        if device not in self._copies:
            self._copies[device] = {name: (x.to(device), y.to(device)) for name, (x, y) in self.splits.items()}
        constants = self.initialise({**self.frozen, **self.buffers}, batch_size, generator, device)
        instances = HeldOutModuleInstances if "held_out" in self.splits else ModuleInstances
        return instances(self, self._copies[device], constants, batch_size)

    def initialise(
        self,
        shapes: Mapping[str, torch.Size],
        batch_size: int,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Tensors ``[batch_size, *shape]`` on ``device``, by name, of as many freshly initialised modules.

        Raises:
            ValueError: if a module lacks one of them, or it has another shape.
        """
        if not shapes:
            return {}
        rows = []
        for seed in _draw_seeds(batch_size, generator):
            module = _build(self.module_fn, seed)
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            found = {name: tensors[name].shape for name in shapes if name in tensors}
            if found != shapes:
                raise ValueError(
                    "module_fn must build the same architecture at every call; "
                    f"it once gave {_format_shapes(shapes)} and now {_format_shapes(found)}"
                )
            rows.append([tensors[name].detach() for name in shapes])
        columns = zip(*rows, strict=True)
        return {name: torch.stack(column).to(device) for name, column in zip(shapes, columns, strict=True)}

    def _describe(self) -> str:
        """Which problem this is: in words, and as a digest of architecture and data."""
        digest = hashlib.sha256(_without_addresses(repr(self.training_module)).encode())
        for shapes in (self.trainable, self.frozen, self.buffers):
            digest.update(_format_shapes(shapes).encode())
        settings = []
        for split, pair in self.splits.items():
            for tensor in pair:
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
            settings.append(f"{split}={' -> '.join(map(_format_tensor, pair))}")
        coordinates = sum(shape.numel() for shape in self.trainable.values())
        return (
            f"module_problem({type(self.training_module).__qualname__} of {coordinates} coordinates, "
            f"{_name(self.loss_fn)}, {', '.join(settings)}, minibatch={self.minibatch}, "
            f"digest={digest.hexdigest()[:16]})"
        )


class ModuleInstances:
    """A batch of modules of one architecture; made by :meth:`ModuleProblem.sample`.

    Args:
        problem: architecture, loss and minibatch.
        splits: its data, on the device of the instances.
        constants: ``[batch, ...]`` each, buffers and frozen parameters.
        batch: how many modules.
    """

    def __init__(
        self, problem: ModuleProblem, splits: Mapping[str, Pair], constants: Mapping[str, Tensor], batch: int
    ) -> None:
        self.problem = problem
        self.batch = batch
        self._splits = splits
        self._constants = constants
        self._device = splits["train"][0].device

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Starting points, the trainable parameters of freshly initialised modules, by their names in the module."""
        return self.problem.initialise(self.problem.trainable, self.batch, generator, self._device)

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Losses ``[batch]`` in training mode, each module on a minibatch and with random numbers of its own.

        Raises:
            ValueError: if ``params`` are not those of the module, one row for each instance.
        """
        return self._loss_on("train", params, generator)

    def _loss_on(self, split: Split, params: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
        self._check_params(params)
        inputs, targets = self._splits[split]
        shape = (self.batch, self.problem.minibatch)
        chosen = torch.randint(len(inputs), shape, generator=generator, device=_source(generator)).to(self._device)
        (seed,) = _draw_seeds(1, generator)
        with _seeded(seed, self._device):
            return self._losses(self.problem.training_module, params, inputs[chosen], targets[chosen], 0)

    @torch.no_grad()
    def evaluate(self, params: Mapping[str, Tensor], split: Split | None = None) -> Tensor:
        """Losses ``[batch]`` on the same 8192 examples of a split (all, if it has fewer) for every module.

        In evaluation mode, so without dropout; but normalisation layers that normalise by the minibatch in ``loss``
        do so here, as there are no running statistics.

        Args:
            split: ``None`` is what counts: the held-out data, or where there are none those trained on.

        Raises:
            ValueError: if there is no such split, or ``params`` are not those of the module.
        """
        if split is None:
            split = "held_out" if "held_out" in self._splits else "train"
        if split not in self._splits:
            remedy = f"; give module_problem(..., {split}_data=...)" if split in ("test", "held_out") else ""
            raise ValueError(f"no split {split!r}; there is {', '.join(map(repr, self._splits))}{remedy}")
        self._check_params(params)
        inputs, targets = self._splits[split]
        # Mixed, because data may be sorted by class, and statistics of a chunk should be those of a minibatch.
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0), device="cpu")
        examples = order[:EVALUATED_EXAMPLES].to(self._device)
        # Never smaller than a minibatch, which statistics of a chunk would not survive.
        chunks = examples.tensor_split(max(1, len(examples) // self.problem.minibatch))
        weighted = []
        with _seeded(0, self._device):
            for chunk in chunks:
                module = self.problem.evaluation_module
                losses = self._losses(module, params, inputs[chunk], targets[chunk], None)
                weighted.append(losses * (len(chunk) / len(examples)))
        return torch.stack(weighted).sum(0)

    def _losses(
        self, module: nn.Module, params: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, data_dim: int | None
    ) -> Tensor:
        """``[batch]``, of data with the instances along ``data_dim`` or the same for all."""
        # A module may write into its buffers; into copies, or the next loss would depend on this one.
        constants = {
            name: tensor.clone() if name in self.problem.buffers else tensor for name, tensor in self._constants.items()
        }

        def loss(tensors: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return self.problem.loss_fn(functional_call(module, tensors, (inputs,)), targets)

        batched = vmap(loss, in_dims=(0, data_dim, data_dim), randomness="different")
        losses: Tensor = batched({**params, **constants}, inputs, targets)
        return losses

    def _check_params(self, params: Mapping[str, Tensor]) -> None:
        expected = {name: torch.Size((self.batch, *shape)) for name, shape in self.problem.trainable.items()}
        found = {name: tensor.shape for name, tensor in params.items()}
        if found != expected:
            raise ValueError(
                f"params must be {_format_shapes(expected)} for {self.batch} instances, got {_format_shapes(found)}"
            )


class HeldOutModuleInstances(ModuleInstances):
    """Those whose losses that count are on data that they are not trained on."""

    def outer_loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Losses ``[batch]`` in training mode, each module on a minibatch of held-out data of its own."""
        return self._loss_on("held_out", params, generator)


def _build(module_fn: ModuleFn, seed: int) -> nn.Module:
    """A module initialised with random numbers from ``seed``."""
    with _seeded(seed, torch.device("cpu")), torch.device("cpu"):
        module = module_fn()
    if not isinstance(module, nn.Module):
        raise TypeError(f"module_fn must return a torch.nn.Module, got {type(module).__name__}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{name} of the {type(module).__name__} that module_fn returns has no shape yet; "
                "use layers that are not lazy, or run the module once in module_fn"
            )
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} of the {type(module).__name__} that module_fn returns is on {tensor.device}; build it on the "
                "CPU, so that its values do not depend on the device, and give the device to sample"
            )
    return module


def _without_running_statistics(module: nn.Module) -> nn.Module:
    """A copy whose normalisation layers in training mode have no running statistics to update."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False
    return module


def _load_pair(name: str, data: object) -> Pair:
    """Inputs and targets as tensors of one length."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = _collate(name, data)
    if not isinstance(data, tuple | list):
        raise TypeError(
            f"{name} must be a tuple (inputs, targets) of tensors or a map-style data set, got {type(data).__name__}"
        )
    if len(data) != 2 or not all(isinstance(tensor, Tensor) for tensor in data):
        kinds = ", ".join(type(tensor).__name__ for tensor in data)
        raise TypeError(f"{name} must be two tensors, inputs and targets, got ({kinds})")
    inputs, targets = (tensor.detach() for tensor in data)
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"{name} must have the examples as leading dimension of inputs and targets, "
            f"got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if not len(inputs):
        raise ValueError(f"{name} is empty; give at least one example")
    return inputs, targets


def _collate(name: str, dataset: Dataset[Any]) -> object:
    """What a data loader would make of the whole data set."""
    try:
        items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]  # map-style
        return default_collate(items) if items else (torch.empty(0), torch.empty(0))
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"the items of {name}, a {type(dataset).__name__}, do not stack to two tensors: {error}; "
            "make every item a pair (input, target) of tensors, arrays or numbers, all of one shape"
        ) from error


def _try_alone(problem: ModuleProblem, split: str) -> None:
    """One module on one minibatch as its author would call it, so that its own errors are told from those of vmap."""
    inputs, targets = problem.splits[split]
    data = "" if split == "train" else f" of {split}_data"
    chosen = torch.arange(problem.minibatch, device=inputs.device) % len(inputs)
    inputs, targets = inputs[chosen].cpu(), targets[chosen].cpu()
    module = copy.deepcopy(problem.training_module)
    try:
        with torch.enable_grad(), _seeded(0, torch.device("cpu")):
            loss = problem.loss_fn(module(inputs), targets)
    except Exception as error:
        raise ValueError(
            f"module and loss_fn fail on a minibatch{data} of inputs {_format_tensor(inputs)} and "
            f"targets {_format_tensor(targets)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.dim():
        raise ValueError(
            f"loss_fn must return a scalar for a minibatch, got shape {tuple(loss.shape)}; take the mean over examples"
        )
    if not loss.requires_grad:
        raise ValueError("loss_fn returned a loss that does not depend on the parameters of the module")
    dtype = next(p.dtype for p in module.parameters() if p.requires_grad)
    if loss.dtype != dtype:
        raise TypeError(
            f"loss_fn returned {loss.dtype}{data and f' on a minibatch{data}'} but the parameters are {dtype}; convert "
            "data or module"
        )


def _try_batched(problem: ModuleProblem) -> None:
    """Two modules at once, twice."""
    instances = problem.sample(2, generator=torch.Generator().manual_seed(0))
    params = instances.init(generator=torch.Generator().manual_seed(1))
    leaves = {name: tensor.requires_grad_() for name, tensor in params.items()}
    try:
        with torch.enable_grad():
            loss = instances.loss(leaves, generator=torch.Generator().manual_seed(2))
            torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    except Exception as error:
        raise ValueError(
            "module and loss_fn work alone but not for several instances at once under torch.func.vmap; avoid "
            "control flow that depends on values, .item(), results whose shape depends on values, and operations "
            f"that vmap does not know: {type(error).__name__}: {error}"
        ) from error
    with torch.no_grad():
        again = instances.loss(leaves, generator=torch.Generator().manual_seed(2))
    if not torch.allclose(loss, again, rtol=1e-3, equal_nan=True):
        raise ValueError(
            f"the same parameters, minibatches and random numbers gave losses {loss.tolist()}, then {again.tolist()}; "
            "the module must keep no state between calls but its buffers, and draw random numbers from PyTorch only"
        )


def _source(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device


def _draw_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator, device=_source(generator)).tolist()
    return seeds


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, PyTorch's global random numbers on the CPU and on a CUDA ``device`` follow from ``seed``."""
    sources = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        sources.append(torch.cuda.default_generators[index])
    states = [source.get_state() for source in sources]
    try:
        # Not torch.manual_seed, which seeds all devices there are.
        for source in sources:
            source.manual_seed(seed)
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)


def _name(function: Callable[..., Any]) -> str:
    name: str | None = getattr(function, "__qualname__", None)
    return name or _without_addresses(repr(function))


def _without_addresses(text: str) -> str:
    """Without what differs from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _format_tensor(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _format_shapes(shapes: Mapping[str, torch.Size]) -> str:
    return "{" + ", ".join(f"{name}: {list(shape)}" for name, shape in shapes.items()) + "}"
