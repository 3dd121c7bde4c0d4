"""The coordinatewise LSTM as a module, and the file that holds one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_fast import autograd, hub, sonnet
from l2l_fast.files import load_tensors, save_atomically
from l2l_fast.spec import Preprocess, RuleSpec

FORMAT = "l2l_fast.rule.v1"

_DEFAULT = RuleSpec()
_FRESH_OUTPUT = 0.1  # output weights of a fresh rule, as a part of those of nn.Linear


class CoordinatewiseLSTM(nn.Module):
    """A learned update rule: a two-layer LSTM with weights shared over coordinates, state of its own for each.

    Args:
        hidden_size: units per layer, ``H``.
        preprocess: :class:`LogAndSign` or ``None`` for the gradient itself.
        output_scale: factor on the network's output.

    Attributes:
        spec: the :class:`RuleSpec`.
        card: JSON-compatible facts about how the rule was trained; saved with it.

    Source: Andrychowicz et al. 2016, section 2.1.
    """

    def __init__(
        self,
        hidden_size: int = _DEFAULT.hidden_size,
        preprocess: Preprocess | None = _DEFAULT.preprocess,
        output_scale: float = _DEFAULT.output_scale,
    ) -> None:
        super().__init__()
        self.spec = RuleSpec(hidden_size, preprocess, output_scale)  # type: ignore[arg-type]  # None is the identity
        self.card: dict[str, Any] = {}
        self.cells = nn.ModuleList(
            [nn.LSTMCell(self.spec.features, hidden_size), nn.LSTMCell(hidden_size, hidden_size)]
        )
        self.output = nn.Linear(hidden_size, 1)
        with torch.no_grad():
            # Whatever the gradients, the hidden units of a fresh network are about the same for all coordinates, and so
            # is its output. A hundred coordinates that feed one unit of a network and all drift one way saturate it
            # within a few steps, and nothing can be learned from there on.
            self.output.weight.mul_(_FRESH_OUTPUT)
            self.output.bias.zero_()

    def extra_repr(self) -> str:
        return f"preprocess={self.spec.preprocess}, output_scale={self.spec.output_scale}"

    def flat_weights(self) -> Tensor:
        """All weights as one vector ``[P]`` in the order of :attr:`RuleSpec.weight_shapes`; differentiable."""
        blocks: list[Tensor] = []
        for cell in self.cells:
            assert isinstance(cell, nn.LSTMCell)
            blocks += [cell.weight_ih.reshape(-1), cell.weight_hh.reshape(-1), cell.bias_ih + cell.bias_hh]
        return torch.cat([*blocks, self.output.weight.reshape(-1), self.output.bias])

    def init_state(
        self, n: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """State of ``n`` coordinates that have not been stepped yet: zeros ``[n, 2, 2, H]``."""
        device = self.output.weight.device if device is None else device
        return torch.zeros(n, 2, 2, self.spec.hidden_size, device=device, dtype=dtype)

    def forward(self, grad: Tensor, state: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """One step for a batch of coordinates; differentiable once.

        Args:
            grad: ``[*shape]``, floating point.
            state: ``[*shape, 2, 2, H]`` (layer; h, c; unit).
            backend: name of a backend, or ``None`` for the fastest that works.

        Returns:
            The update ``[*shape]`` in the dtype of ``grad`` and the new state in the dtype of ``state``.

        Raises:
            TypeError, ValueError: if an argument has the wrong kind, shape or device.
            RuntimeError: if the named backend can't run this.
        """
        _check(self, grad, state)
        weights = self.flat_weights()
        if weights.dtype != torch.float64:
            weights = weights.float()  # arithmetic is never in 16 bits
        update, new_state = autograd.step(
            self.spec,
            weights,
            grad.reshape(-1).to(weights.dtype),
            state.reshape(-1, *state.shape[-3:]).to(weights.dtype),
            backend,
        )
        return update.view(grad.shape).to(grad.dtype), new_state.view(state.shape).to(state.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, specification and card to a safetensors file, atomically.

        Raises:
            OSError: if the folder does not exist or can't be written; an existing file is left as it is.
        """
        metadata = {"format": FORMAT, "spec": json.dumps(self.spec.to_dict()), "card": json.dumps(self.card)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_atomically(tensors, metadata, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CoordinatewiseLSTM:
        """The rule in a file that :meth:`save` wrote, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated, of another format or holds other shapes.
        """
        tensors, metadata = load_tensors(path, FORMAT)
        try:
            spec = RuleSpec.from_dict(json.loads(metadata["spec"]))
            card = json.loads(metadata.get("card", "{}"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} has no readable rule specification: {error}") from error
        with torch.device("meta"):  # shapes alone, until the file is known to fit
            rule = cls(spec.hidden_size, spec.preprocess, spec.output_scale)
        rule.load_tensors(tensors, source=os.fspath(path))
        rule.card = card
        return rule

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Put the rule and a card made from :attr:`card` into a repository of the Hugging Face Hub, in one commit.

        A rule and a card that are there are replaced.

        Args:
            repo_id: ``"user/name"``; made if there is none.
            private: whether a repository that has to be made is private; ``None`` as the account is set.
            token: of an account that may write there; ``None`` for the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            ImportError: if huggingface_hub is not installed; ``pip install 'l2l_fast[hub]'``.
            ValueError: if ``repo_id`` is none, or a weight is not finite.
            PermissionError: if the account may not write there.
            ConnectionError: if the Hub can't be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, hub.FILE)
            self.save(file)
            self.load(file)  # what nobody could load is not published
            return hub.push(file, self.spec, self.card, repo_id, private=private, token=token)

    @classmethod
    def from_hub(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> CoordinatewiseLSTM:
        """The rule in a repository that :meth:`push_to_hub` wrote, or in a file or folder that is here; on the CPU.

        A path at which something lies is never looked up on the Hub. Nothing is unpickled.

        Args:
            source: ``"user/name"``, or the path of a file or of a folder that holds ``rule.safetensors``.
            revision: branch, tag or commit of a repository.
            token: of an account that may read it; ``None`` for the one that is logged in.

        Raises:
            FileNotFoundError: if nothing lies at the path, or there is no such repository, revision or file in it.
            PermissionError: if the repository asks for a consent that this account has not given.
            TypeError: if ``source`` is of another kind.
            ValueError: if ``source`` is neither a path nor the id of a repository, or the file holds no rule.
            ConnectionError: if the Hub can't be reached and the file has not been downloaded before.
            ImportError: if a repository is asked for and huggingface_hub is not installed.
        """
        return cls.load(hub.find(source, revision=revision, token=token))

    @classmethod
    def from_sonnet(
        cls,
        weights: Mapping[str, Any],
        preprocess: Preprocess | None = sonnet.PUBLISHED.preprocess,
        output_scale: float = sonnet.PUBLISHED.output_scale,
    ) -> CoordinatewiseLSTM:
        """The rule that a network of the code published with the paper computes, on the CPU.

        Files are not read, for they are pickles. Where that code runs, ``saved = networks.save(net, session)`` has the
        arrays and ``numpy.savez("cw.npz", **{m + "/" + v: a for m, d in saved.items() for v, a in d.items()})`` writes
        them; ``numpy.load("cw.npz")`` is then what to pass here.

        Args:
            weights: arrays or tensors ``lstm_1/w_gates [F + H, 4H]``, ``lstm_1/b_gates [4H]``,
                ``lstm_2/w_gates [2H, 4H]``, ``lstm_2/b_gates [4H]``, ``linear/w [H, 1]`` and ``linear/b [1]``; flat or
                nested, under any scope (``cw/lstm_1/w_gates:0``). All float64 make a float64 rule, else it is float32.
            preprocess: that of the network, with its ``k`` as ``p``; ``None`` for the gradient itself.
            output_scale: its ``scale``. Defaults are those of its networks for MNIST and CIFAR-10; that for
                quadratics has ``preprocess=None, output_scale=1.0``.

        Raises:
            TypeError: if a weight is no floating-point array, or ``preprocess`` or ``output_scale`` has the wrong kind.
            ValueError: if a name is missing, unexpected or there twice, a shape does not fit the others or
                ``preprocess``, or a weight is not finite.

        Source: google-deepmind/learning-to-learn, ``CoordinateWiseDeepLSTM``. Its log feature is
        ``max(log(|g| + eps) / k, -1)`` with float32's ``eps``: above ours by at most ``eps exp(k) / k``, 3.54e-6 for 5.
        """
        spec, tensors = sonnet.from_sonnet(weights, preprocess, output_scale)
        with torch.device("meta"):  # the weights are there already
            rule = cls(spec.hidden_size, spec.preprocess, spec.output_scale)
        rule.load_tensors(tensors, source="the Sonnet network")
        return rule

    def load_tensors(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Take the weights ``tensors``, in their dtype; nothing changes unless all of them fit.

        Raises:
            ValueError: if names or shapes differ from this rule's, the dtypes are not one floating dtype, or a
                weight is not finite; the message names ``source``.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            detail = "; ".join(
                f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
                for name in wrong
            )
            raise ValueError(f"{source} does not hold a rule of {self.spec}: {detail}")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
            raise ValueError(
                f"{source} holds weights of {', '.join(sorted(map(str, dtypes)))}; expected one floating dtype"
            )
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{source} holds weights that are not finite: its training has diverged")
        self.load_state_dict(dict(tensors), assign=True)
        self.requires_grad_(True)


def _check(rule: CoordinatewiseLSTM, grad: Tensor, state: Tensor) -> None:
    for name, tensor in (("grad", grad), ("state", state)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got layout {tensor.layout}; call .to_dense() first")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be real floating point, got {tensor.dtype}")
        if tensor.device != rule.output.weight.device:
            raise ValueError(
                f"{name} is on {tensor.device} but the rule is on {rule.output.weight.device}; move one of them"
            )
    expected = (*grad.shape, 2, 2, rule.spec.hidden_size)
    if tuple(state.shape) != expected:
        raise ValueError(
            f"state must have shape {expected} for a gradient of shape {tuple(grad.shape)}, got "
            f"{tuple(state.shape)}; rule.init_state(n) makes one"
        )


_WEIGHTS = files("l2l_fast") / "weights"


def available_rules() -> tuple[str, ...]:
    """Names of the rules that come with the package."""
    return tuple(
        sorted(
            entry.name.removesuffix(".safetensors")
            for entry in _WEIGHTS.iterdir()
            if entry.name.endswith(".safetensors")
        )
    )


def load_rule(name: str) -> CoordinatewiseLSTM:
    """The rule called ``name`` that comes with the package.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in available_rules():
        raise ValueError(
            f"unknown rule {name!r}; shipped rules: {', '.join(map(repr, available_rules())) or 'none'}. "
            "A rule in a file is named by a path that ends in .safetensors"
        )
    with as_file(_WEIGHTS / f"{name}.safetensors") as path:
        return CoordinatewiseLSTM.load(path)


def as_rule(rule: CoordinatewiseLSTM | str | os.PathLike[str]) -> CoordinatewiseLSTM:
    """``rule`` itself, or the rule that a shipped name or the path of a file stands for."""
    if isinstance(rule, CoordinatewiseLSTM):
        return rule
    if isinstance(rule, str) and os.sep not in rule and not rule.endswith(".safetensors"):
        return load_rule(rule)
    if isinstance(rule, str | os.PathLike):
        return CoordinatewiseLSTM.load(rule)
    raise TypeError(f"rule must be a CoordinatewiseLSTM, a shipped name or a path, got {type(rule).__name__}")
