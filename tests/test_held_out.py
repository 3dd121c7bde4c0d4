"""Losses that count on other data than the gradients: the unroll with them, its meta-gradients, and the problems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_cli import error_of
from test_cli import run as run_command
from test_unroll import Wrapped
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import l2l_fast
from l2l_fast import CoordinatewiseLSTM, LogAndSign, unroll
from l2l_fast.datasets import load
from l2l_fast.meta import MetaTrainer, TrainConfig, graph
from l2l_fast.meta.mirror import mirrored
from l2l_fast.problems import Evaluates, HeldOut, ImageClassifier, Replayable, module_problem
from l2l_fast.problems.classification import digits

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_rule(preprocess: LogAndSign | None = None) -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=5, preprocess=preprocess).double()
    rule.output.reset_parameters()
    return rule


class Regression:
    """Instances that learn from one noise and are judged with another."""

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"w": torch.randn(2, 3, generator=generator, dtype=torch.float64)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        return ((x @ params["w"].unsqueeze(-1)).squeeze(-1).tanh() - x[..., 0]).square().mean(1)

    def outer_loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
        return ((x @ params["w"].unsqueeze(-1)).squeeze(-1).sigmoid() - x[..., 1]).square().mean(1)


def by_hand(rule: CoordinatewiseLSTM, params: dict[str, Tensor], weights: Tensor, log: bool, second: bool) -> Tensor:
    """The meta-loss, written out."""
    instances, generator = Regression(), seeded(3)
    theta, total = params["w"], torch.zeros((), dtype=torch.float64)
    state = rule.init_state(6, dtype=torch.float64).view(2, 3, 2, 2, 5)
    for t in range(STEPS + 1):
        if t < STEPS:
            point = theta if theta.requires_grad else theta.clone().requires_grad_()
            inner = instances.loss({"w": point}, generator=generator)
            (grad,) = torch.autograd.grad(inner.sum(), point, create_graph=second, retain_graph=True)
        outer = instances.outer_loss({"w": theta}, generator=generator)
        total = total + weights[t] * (outer.log() if log else outer).mean()
        if t < STEPS:
            update, state = rule(grad if second else grad.detach(), state, backend="reference")
            theta = theta + update
    return total


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_meta_gradient_is_that_of_the_held_out_losses(second: bool, log: bool, wrapped: bool) -> None:
    rule, reference = make_rule(), make_rule()
    params, weights = Regression().init(generator=seeded(2)), torch.rand(STEPS + 1, generator=seeded(5)).double()
    expected = by_hand(reference, params, weights, log, second)
    run = unroll(
        Wrapped(rule) if wrapped else rule,
        Regression(),
        STEPS,
        params=params,
        generator=seeded(3),
        loss_weights=weights,
        objective="log" if log else "loss",
        second_derivatives=second,
    )
    assert run.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    expected_grads = torch.autograd.grad(expected, list(reference.parameters()))
    for found, right in zip(torch.autograd.grad(run.loss, list(rule.parameters())), expected_grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-12)


def test_losses_are_the_same_without_a_meta_gradient() -> None:
    rule, instances = make_rule(), Regression()
    params = instances.init(generator=seeded(2))
    run = unroll(rule, instances, STEPS, params=params, generator=seeded(3))
    with torch.no_grad():
        alone = unroll(rule, instances, STEPS, params=params, generator=seeded(3))
    torch.testing.assert_close(run.losses, alone.losses, rtol=0, atol=0)
    torch.testing.assert_close(run.params["w"], alone.params["w"], rtol=0, atol=0)


def test_images_are_either_trained_on_or_held_out() -> None:
    problem = digits(held_out=0.25, minibatch=7)
    instances = problem.sample(3)
    assert isinstance(instances, HeldOut)
    assert isinstance(instances, Evaluates)
    assert not isinstance(digits().sample(3), HeldOut)
    data = load("digits")
    kept, held = (instances._splits[name][0] for name in ("train", "held_out"))
    assert len(held) == round(0.25 * len(data.train_images))
    both = torch.unique(torch.cat([kept, held]), dim=0, return_counts=True)
    every = torch.unique(data.train_images.flatten(1), dim=0, return_counts=True)
    for one, other in zip(both, every, strict=True):
        assert torch.equal(one, other)
    params = {name: 50 * tensor for name, tensor in instances.init(generator=seeded(1)).items()}
    # What counts is the held-out loss: a large minibatch of it is near what evaluate says, which is that by default.
    sample = digits(held_out=0.25, minibatch=4000).sample(3)
    assert isinstance(sample, HeldOut)
    outer = sample.outer_loss(params, generator=seeded(2))
    torch.testing.assert_close(outer, instances.evaluate(params), rtol=0.1, atol=0)
    assert not torch.equal(instances.evaluate(params), instances.evaluate(params, "train"))
    assert torch.equal(instances.evaluate(params), instances.evaluate(params, "held_out"))
    with pytest.raises(ValueError, match="no split 'held_out'"):
        digits().sample(1).evaluate(params, "held_out")


@pytest.mark.parametrize(
    ("share", "error"), [(1.0, ValueError), (-0.1, ValueError), ("half", TypeError), (True, TypeError)]
)
def test_bad_shares(share: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="held_out must be a"):
        ImageClassifier("digits", held_out=share)  # type: ignore[arg-type]


def test_module_problem_with_held_out_data() -> None:
    x, y = torch.randn(40, 4, generator=seeded(1)), torch.randn(40, 1, generator=seeded(2))
    other = (x + 1, y)
    problem = module_problem(lambda: nn.Linear(4, 1), mse_loss, (x, y), minibatch=8, held_out_data=other)
    instances = problem.sample(2, generator=seeded(3))
    assert isinstance(instances, HeldOut)
    params = instances.init(generator=seeded(4))
    plain = module_problem(lambda: nn.Linear(4, 1), mse_loss, other, minibatch=8).sample(2, generator=seeded(3))
    torch.testing.assert_close(
        instances.outer_loss(params, generator=seeded(5)), plain.loss(params, generator=seeded(5)), rtol=0, atol=0
    )
    torch.testing.assert_close(instances.evaluate(params), plain.evaluate(params), rtol=0, atol=0)
    assert "held_out=" in repr(problem)


def test_a_rule_trained_on_held_out_losses_is_validated_on_them() -> None:
    torch.manual_seed(0)
    config = TrainConfig(updates=2, horizon=5, truncation=5, batch_size=1, validate_every=2, validation_functions=2)
    losses = {}
    for share in (0.0, 0.5):
        problem = digits(hidden=(5,), held_out=share)
        result = MetaTrainer(l2l_fast.CoordinatewiseLSTM(), problem, config).fit()
        instances = problem.sample(2, generator=(generator := seeded(config.validation_seed)))
        with torch.no_grad():
            run = unroll(result.best_rule, instances, 5, generator=generator)
        losses[share] = result.best_validation_loss
        best = instances.evaluate(run.params).double().mean().item()
        assert best == pytest.approx(result.best_validation_loss, rel=1e-6)
    assert losses[0.0] != losses[0.5]


def test_mirrored_instances_have_held_out_losses_too() -> None:
    instances = digits(held_out=0.5).sample(1)
    assert isinstance(mirrored(instances, 1), HeldOut)
    assert not isinstance(mirrored(instances, 1), Replayable)


def test_no_graph_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_DEVICE_TYPE", "cpu")
    graph.check_capturable(l2l_fast.CoordinatewiseLSTM(), digits().sample(1))
    with pytest.raises(TypeError, match="has losses on held-out data, which no CUDA graph holds"):
        graph.check_capturable(l2l_fast.CoordinatewiseLSTM(), digits(held_out=0.5).sample(1))


def test_errors_name_what_is_at_fault() -> None:
    x, y = torch.randn(40, 4, generator=seeded(1)), torch.randn(40, 1, generator=seeded(2))
    for wrong in ((x[:, :3], y), (x.double(), y.double())):
        with pytest.raises(ValueError, match="of held_out_data of inputs"):
            module_problem(lambda: nn.Linear(4, 1), mse_loss, (x, y), minibatch=8, held_out_data=wrong)

    class Scalar(Regression):
        def outer_loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
            return super().outer_loss(params, generator=generator).mean()

    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=r"instances\.outer_loss must return one loss"),
        ):
            unroll(make_rule(), Scalar(), STEPS, generator=seeded(3))


def test_a_problem_from_the_command_line(tmp_path: Path) -> None:
    options = ["--set", "held_out=0.5", "--updates", "1", "--horizon", "3", "--truncation", "3"]
    assert run_command("train", "digits", *options, "--validation-functions", "1", "--out", tmp_path / "out")[0] == 0
    card = CoordinatewiseLSTM.load(tmp_path / "out" / "best.safetensors").card
    assert "held_out=0.5" in card["problem"]
    message = error_of("train", "digits", "--set", "held_out=1.5", "--out", tmp_path / "none")
    assert "held_out must be a share of the images" in message
