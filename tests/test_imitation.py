"""Learning from a teacher: the loss is what it says, its gradient is exact, and training knows what goes with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainings import SMALL, DigitsProblem, Stop, assert_same_training, make_rule, stop_after

from l2l_fast import CoordinatewiseLSTM, LogAndSign, unroll
from l2l_fast.baselines import descend
from l2l_fast.experiments.teacher import PowerMomentum
from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent, imitate
from l2l_fast.problems import Quadratic
from l2l_fast.problems.classification import digits

pytestmark = pytest.mark.usefixtures("one_thread")

ADAM = partial(torch.optim.Adam, lr=0.05)
STEPS = 7
WHOLE = replace(SMALL, truncation=SMALL.horizon)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Float64:
    """Two tensors of different size in float64, so that the reference backend computes."""

    def __init__(self, batch: int = 3) -> None:
        self.batch = batch
        self.targets = torch.randn(batch, 5, generator=seeded(1), dtype=torch.float64)

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {
            "a": torch.randn(self.batch, 5, generator=generator, dtype=torch.float64),
            "b": torch.randn(self.batch, 2, 2, generator=generator, dtype=torch.float64),
        }

    def loss(self, params: Any, *, generator: torch.Generator | None = None) -> Tensor:
        noise = 0.1 * torch.randn(self.batch, 5, generator=generator, dtype=torch.float64)
        a = (params["a"] - self.targets + noise).square().sum(1)
        total: Tensor = a + (params["b"].square().sum((1, 2)) * a).sqrt()
        return total


def rule64() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(3, LogAndSign(8.0)).double()


def step_by_step(rule: CoordinatewiseLSTM, teacher: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Tensor:
    """The loss by its definition, with autograd alone, the teacher driving."""
    instances, generator = Float64(), seeded(2)
    params = {name: tensor.requires_grad_() for name, tensor in instances.init(generator=generator).items()}
    optimizer = teacher(list(params.values()))
    states = {name: rule.init_state(tensor.numel(), dtype=torch.float64) for name, tensor in params.items()}
    total = torch.zeros((), dtype=torch.float64)
    roots = sum(math.sqrt(tensor.numel()) for tensor in params.values())
    for _ in range(STEPS):
        loss = instances.loss(params, generator=generator).sum()
        for tensor, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            tensor.grad = grad
        before = {name: tensor.detach().clone() for name, tensor in params.items()}
        optimizer.step()
        for name, tensor in params.items():
            assert tensor.grad is not None
            taught = tensor.detach() - before[name]
            update, states[name] = rule(tensor.grad.reshape(-1), states[name])
            error = (update.view_as(taught) - taught).square().mean() / taught.square().mean()
            total = total + error * math.sqrt(tensor.numel()) / roots / STEPS
    return total


def test_loss_and_gradient_are_those_of_the_definition() -> None:
    rule = rule64()
    run = imitate(rule, Float64(), ADAM, STEPS, generator=seeded(2))
    expected = step_by_step(rule, ADAM)
    torch.testing.assert_close(run.loss, expected, rtol=1e-10, atol=0)
    weights = list(rule.parameters())
    for found, grad in zip(torch.autograd.grad(run.loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_gradient_against_finite_differences(fraction: float) -> None:
    rule = rule64()

    def loss() -> Tensor:
        return imitate(rule, Float64(), ADAM, STEPS, coordinate_fraction=fraction, generator=seeded(2)).loss

    for weight, grad in zip(rule.parameters(), torch.autograd.grad(loss(), list(rule.parameters())), strict=True):
        direction = torch.randn(weight.shape, generator=seeded(3), dtype=torch.float64)
        with torch.no_grad():
            weight.add_(direction, alpha=1e-5)
            above = loss()
            weight.sub_(direction, alpha=2e-5)
            slope = (above - loss()) / 2e-5
            weight.add_(direction, alpha=1e-5)
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)


def test_the_teacher_drives() -> None:
    instances = Quadratic().sample(4, generator=seeded(1))
    run = imitate(make_rule(), instances, ADAM, STEPS, generator=seeded(2))
    expected = descend(instances, ADAM, STEPS, generator=seeded(2))
    torch.testing.assert_close(run.losses, expected.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.params["theta"], expected.params["theta"], rtol=1e-4, atol=1e-5)


def test_the_rule_drives() -> None:
    rule, instances = make_rule(), Quadratic().sample(4, generator=seeded(1))
    run = imitate(rule, instances, ADAM, STEPS, rule_drives=True, generator=seeded(2))
    with torch.no_grad():
        expected = unroll(rule, instances, STEPS, generator=seeded(2))
    assert torch.equal(run.losses, expected.losses)
    assert torch.equal(run.params["theta"], expected.params["theta"])
    assert torch.equal(run.state, expected.state)


def test_a_part_of_the_coordinates() -> None:
    rule, problem = CoordinatewiseLSTM(3), digits(hidden=5)
    instances = problem.sample(2, generator=seeded(1))
    excess = []
    for seed in range(40):
        whole = imitate(rule, instances, ADAM, STEPS, generator=seeded(seed))
        part = imitate(rule, instances, ADAM, STEPS, generator=seeded(seed), coordinate_fraction=0.1)
        assert torch.equal(part.losses, whole.losses)
        assert abs(len(part.state) - 0.1 * len(whole.state)) < 10
        excess.append((part.loss / whole.loss).item() - 1)
    spread = torch.tensor(excess).std().item()
    assert 0 < spread < 0.5
    assert abs(sum(excess) / 40) < 4 * spread / math.sqrt(40)  # right on average
    few = imitate(rule, instances, ADAM, STEPS, generator=seeded(2), coordinate_fraction=1e-6)
    assert len(few.state) == 4  # one of each tensor


def test_a_teacher_that_stands_still_teaches_nothing() -> None:
    rule = make_rule()
    run = imitate(rule, Quadratic().sample(2, generator=seeded(1)), partial(torch.optim.SGD, lr=0.0), STEPS)
    assert run.loss.item() == 0
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(run.loss, list(rule.parameters())))


def test_a_teacher_that_diverges_is_no_model(tmp_path: Path) -> None:
    wild = partial(torch.optim.SGD, lr=1e30)
    run = imitate(make_rule(), Quadratic().sample(2, generator=seeded(1)), wild, STEPS)
    assert run.loss.isnan()
    with pytest.raises(FloatingPointError, match="none of 12 meta-updates could be made"):
        MetaTrainer(make_rule(), Quadratic(), WHOLE, teacher=wild).fit()


def test_bad_arguments() -> None:
    instances = Quadratic().sample(2, generator=seeded(1))
    with pytest.raises(TypeError, match="only a CoordinatewiseLSTM can imitate, got Linear"):
        imitate(torch.nn.Linear(1, 1), instances, ADAM)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"teacher must return a torch.optim.Optimizer, got list"):
        imitate(make_rule(), instances, lambda params: params)
    with pytest.raises(TypeError, match="a teacher makes an optimizer when it is called, got 'adam'"):
        imitate(make_rule(), instances, "adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a teacher can't decay weights"):
        imitate(make_rule(), instances, partial(torch.optim.AdamW, lr=0.1))
    with pytest.raises(ValueError, match="steps must be a positive int, got 0"):
        imitate(make_rule(), instances, ADAM, 0)
    with pytest.raises(ValueError, match="coordinate_fraction must be above 0"):
        imitate(make_rule(), instances, ADAM, coordinate_fraction=0.0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        imitate(make_rule(), instances, ADAM)


def test_training_with_a_teacher_approaches_it() -> None:
    config = TrainConfig(
        updates=150, horizon=20, truncation=20, batch_size=16, lr=1e-2, validation_functions=32, validate_every=50
    )
    events: list[TrainEvent] = []
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(10, LogAndSign(5.0))
    result = MetaTrainer(rule, Quadratic(), config, teacher=ADAM).fit(on_update=events.append)
    losses = [event.loss for event in events]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    assert result.best_rule.card["teacher"] == repr(ADAM)  # type: ignore[index]


@pytest.mark.parametrize("problem", [Quadratic(), DigitsProblem()], ids=["quadratic", "digits"])
def test_training_with_a_teacher_resumes_exactly(tmp_path: Path, problem: Any) -> None:
    config = replace(WHOLE, coordinate_fraction=0.5)

    def trainer(folder: str) -> MetaTrainer:
        return MetaTrainer(make_rule(), problem, config, teacher=_named_teacher, folder=tmp_path / folder)

    trainer("whole").fit()
    with pytest.raises(Stop):
        trainer("cut").fit(on_update=stop_after(5))
    trainer("cut").fit(resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(ValueError, match=r"teacher is '_named_teacher' in the checkpoint but .*Adam"):
        MetaTrainer(make_rule(), problem, config, teacher=ADAM, folder=tmp_path / "cut").fit(resume=True)


def _named_teacher(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": SMALL.truncation}, "imitated over whole runs"),
        ({"objective": "log"}, "objective has no meaning with a teacher"),
        ({"loss_power": 1.0}, "loss_power has no meaning"),
        ({"second_derivatives": True}, "second_derivatives has no meaning"),
    ],
)
def test_settings_without_a_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaTrainer(make_rule(), Quadratic(), replace(WHOLE, **settings), teacher=ADAM)


def test_other_rules_can_not_be_taught() -> None:
    with pytest.raises(TypeError, match="only a CoordinatewiseLSTM can learn from a teacher, got Linear"):
        MetaTrainer(torch.nn.Linear(1, 1), Quadratic(), WHOLE, teacher=ADAM)


@pytest.mark.parametrize(("power", "like"), [(1.0, "adam"), (0.0, "momentum")])
def test_the_hand_made_teacher_has_known_relatives(power: float, like: str) -> None:
    """Adam, but for the correction of the mean's bias, and SGD with momentum are among its settings."""
    slow, momentum, memory, lr = 1e8, 0.9, 0.99, 0.03  # the gradient itself counts next to nothing
    settings = PowerMomentum(lr, power, slow, momentum, memory, agreement=1.0, decay=0.0, decay_time=1.0)
    mean, square, expected = torch.zeros(50), torch.zeros(50), torch.zeros(50)
    grads = torch.randn(20, 50, generator=seeded(1))
    for step, grad in enumerate(grads, start=1):
        mean = momentum * mean + (1 - momentum) * grad
        square = memory * square + (1 - memory) * grad**2
        rms = (square / (1 - memory**step)).sqrt()
        expected -= lr * mean / rms if like == "adam" else lr * mean / 0.05
    torch.testing.assert_close(_descended(settings, grads), expected, rtol=1e-4, atol=1e-5)


def _descended(settings: PowerMomentum, grads: Tensor) -> Tensor:
    """Where ``grads [T, N]`` lead to from 0."""
    param = torch.zeros_like(grads[0])
    optimizer = settings([param])
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param


def test_steps_of_the_hand_made_teacher_are_short_where_gradients_disagree() -> None:
    """By the power ``agreement`` of how much they do; where they are alike it makes no difference."""
    grads = 0.05 * torch.tensor([[1.0, -1.0, 1.0, 0.0], [1.0, -1.0, -0.5, 0.0]])
    plain = PowerMomentum(1.0, 1.0, 0.0, 0.0, 0.5, agreement=1.0, decay=0.0, decay_time=1.0)
    first, last = _descended(plain, grads[:1]), _descended(plain, grads)
    assert first.tolist() == pytest.approx([-1, 1, -1, 0], abs=1e-5)
    lengths = (last - first).abs()
    assert lengths[:2].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert lengths[2].item() == pytest.approx(0.5 / math.sqrt(0.5), rel=1e-5)
    sharper = replace(plain, agreement=3.0)
    assert _descended(sharper, grads[:1]).tolist() == pytest.approx(first.tolist(), abs=1e-5)
    moved = _descended(sharper, grads) - _descended(sharper, grads[:1])
    torch.testing.assert_close(moved, (last - first).sign() * lengths**3, rtol=1e-4, atol=1e-5)


def test_steps_of_the_hand_made_teacher_in_full() -> None:
    """All settings at work, against the formula step by step in float64."""
    settings = PowerMomentum(0.1, 0.8, 3.0, 0.8, 0.6, 1.7, decay=0.5, decay_time=4.0, settled=0.4, settle_at=3.0)
    grads = 0.1 * torch.randn(8, 40, generator=seeded(2), dtype=torch.float64)
    mean, square, expected = (torch.zeros(40, dtype=torch.float64) for _ in range(3))
    for step, grad in enumerate(grads):
        mean, square = 0.8 * mean + 0.2 * grad, 0.6 * square + 0.4 * grad**2
        rms = (square / (1 - 0.6 ** (step + 1))).sqrt() + 1e-8
        agreed = (grad + 3 * mean) / (4 * rms)
        shorter = (1 + step / 4) ** -0.5 * (0.4 + 0.6 * torch.sigmoid(torch.tensor(3.0 - step).double()))
        expected -= 0.1 * shorter * (rms / 0.05) ** 0.2 * agreed.sign() * agreed.abs() ** 1.7
    torch.testing.assert_close(_descended(settings, grads), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.0, 0.9, 1.2, 2.0])
def test_steps_of_the_hand_made_teacher_stay_finite(power: float, dtype: torch.dtype) -> None:
    settings = PowerMomentum(1e-3, power, 4.0, 0.5, 0.5, agreement=1.5, decay=0.0, decay_time=1.0)
    most = torch.finfo(dtype).max
    grads = torch.tensor([[0.0, most, -most, 1e-3]] * 3, dtype=dtype)
    moved = _descended(settings, grads)
    assert moved.isfinite().all()
    assert moved[0] == 0
    assert moved[3] < 0


def test_steps_of_the_hand_made_teacher_in_half_precision() -> None:
    """With squares that only wider numbers can hold."""
    settings = PowerMomentum(0.1, 0.9, 4.0, 0.7, 0.8, agreement=1.5, decay=0.0, decay_time=1.0)
    grads = torch.tensor([[300.0, 1e-3, 2e-4, -1e-5]], dtype=torch.float16).expand(6, -1)
    torch.testing.assert_close(
        _descended(settings, grads).double(), _descended(settings, grads.double()), rtol=0.02, atol=0
    )


def test_a_step_of_the_hand_made_teacher_by_a_closure() -> None:
    param, idle = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = PowerMomentum(0.1, 1.0, 0.0, 0.0, 0.0, agreement=1.0, decay=0.0, decay_time=1.0)([param, idle])

    def closure() -> float:
        loss = (param**2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 2
    torch.testing.assert_close(param.detach(), torch.full((2,), 0.9))
    assert torch.equal(idle, torch.ones(2))


def test_steps_of_the_hand_made_teacher_grow_shorter() -> None:
    settings = PowerMomentum(1.0, 1.0, 0.0, 0.9, 0.9, agreement=1.0, decay=0.5, decay_time=10.0)
    assert settings.length(0) == pytest.approx(1.0)
    assert settings.length(30) == pytest.approx(0.5)
    settled = replace(settings, settled=0.2, settle_at=30.0)
    assert settled.length(30) == pytest.approx(0.5 * 0.6)
