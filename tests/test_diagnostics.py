"""``diagnose``: what it measures, against rules whose faults are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from l2l_fast import reference
from l2l_fast.meta.diagnostics import BINS, WATCHED, Diagnosis, diagnose
from l2l_fast.problems import ImageClassifier, Quadratic
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign, Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")


def make_rule(preprocess: Preprocess | None = None, output_scale: float = 0.1, seed: int = 0) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(preprocess=preprocess, output_scale=output_scale)


def downhill() -> CoordinatewiseLSTM:
    """Updates of a fixed sign against the gradient: units of both layers that pass a clipped input on."""
    rule = make_rule(LogAndSign())
    for weight in rule.parameters():
        nn.init.zeros_(weight)
    with torch.no_grad():
        for cell, feature in zip(rule.cells, (1, 0), strict=True):
            assert isinstance(cell, nn.LSTMCell)
            h = rule.spec.hidden_size
            cell.bias_ih[:h] = 5  # input gates open
            cell.bias_ih[h : 2 * h] = -5  # nothing remembered
            cell.bias_ih[3 * h :] = 5  # output gates open
            cell.weight_ih[2 * h : 3 * h, feature] = 1
        rule.output.weight[0, 0] = -0.5
    return rule


def healthy() -> Diagnosis:
    return diagnose(downhill(), Quadratic(dim=3), steps=10, truncation=4, functions=8)


def test_shapes() -> None:
    diagnosis = healthy()
    assert diagnosis.losses.shape == (11,)
    assert diagnosis.cosine.shape == diagnosis.relative_update.shape == (10,)
    assert diagnosis.meta_gradient_norms.shape == (3,)
    assert sorted(diagnosis.saturation) == ["1.f", "1.g", "1.i", "1.o", "2.f", "2.g", "2.i", "2.o"]
    assert [int(histogram.counts.sum()) for histogram in diagnosis.features] == [8 * 3 * 10] * 2
    assert all(len(histogram.edges) == BINS + 1 for histogram in diagnosis.features)


def test_a_rule_that_goes_downhill() -> None:
    diagnosis = healthy()
    assert (diagnosis.cosine > 0.5).all()
    assert diagnosis.losses[-1] < diagnosis.losses[0]
    assert diagnosis.saturation["1.g"] == 0
    # Input and output gates sit at sigmoid(5) = 0.993, forget gates at 0.007.
    assert all(diagnosis.saturation[f"1.{gate}"] == 1 for gate in "ifo")


def test_the_rule_stays_as_it_is() -> None:
    rule = make_rule()
    before = [weight.clone() for weight in rule.parameters()]
    first, second = (diagnose(rule, Quadratic(), steps=5, functions=4) for _ in range(2))
    assert torch.equal(first.losses, second.losses)
    assert all(torch.equal(*pair) for pair in zip(rule.parameters(), before, strict=True))
    assert all(weight.grad is None for weight in rule.parameters())


def test_verdict_on_raw_gradients_and_an_untrained_rule() -> None:
    verdict = diagnose(make_rule(), Quadratic(), steps=40, functions=16).verdict()
    assert "Feature 0 reaches" in verdict
    assert "try preprocess=LogAndSign()" in verdict


def test_large_features_are_no_finding_where_gates_are_not_saturated() -> None:
    saturated = diagnose(make_rule(), Quadratic(), steps=40, functions=16)
    few = {name: 0.05 if name.startswith("1.") else 0.3 for name in saturated.saturation}
    assert saturated.features[0].edges.abs().max() > 100
    assert "Feature 0 reaches" not in replace(saturated, saturation=few).verdict()
    assert "Feature 0 reaches" in replace(saturated, saturation={**few, "1.g": 0.2}).verdict()


def test_verdict_on_large_and_small_steps() -> None:
    small = diagnose(make_rule(LogAndSign(), 1e-6), Quadratic(), steps=5, functions=4)
    assert "times as long as the parameters: try a larger output_scale" in small.verdict()
    large = replace(small, relative_update=torch.full((5,), 3.0))
    assert "Updates are 3 times as long as the parameters: try a smaller output_scale" in large.verdict()
    assert "The loss does not fall" in diagnose(make_rule(LogAndSign(), 1e4), Quadratic(), steps=5).verdict()


@pytest.mark.parametrize("seed", range(6))
def test_verdict_on_rules_that_have_learned_nothing(seed: int) -> None:
    """The loss of some falls a little, by luck."""
    diagnosis = diagnose(make_rule(LogAndSign(), seed=seed), ImageClassifier("digits"), functions=2)
    assert "The loss " in diagnosis.verdict()
    lucky = replace(diagnosis, losses=torch.linspace(2.3024, 2.2985, 101))
    assert "The loss hardly falls: 2.3024 at the start, 2.2985 at the end" in lucky.verdict()


def test_verdict_on_a_rule_without_effect() -> None:
    rule = make_rule(output_scale=0.0)
    verdict = diagnose(rule, Quadratic(), steps=5, functions=4).verdict()
    assert "The loss does not fall" in verdict
    assert "The meta-gradient is zero" in verdict
    assert "hardly point downhill" in verdict


def test_verdict_on_divergence() -> None:
    rule = make_rule(output_scale=1e30)
    verdict = diagnose(rule, Quadratic(), steps=5, functions=4).verdict()
    assert "The runs diverge" in verdict
    assert "The meta-gradient is not finite" in verdict


def test_verdict_without_findings() -> None:
    quiet = dict.fromkeys(healthy().saturation, 0.0)
    plain = replace(healthy(), saturation=quiet)
    assert plain.verdict() == "Nothing out of the ordinary."
    assert "Gate 1.f is saturated in 80%" in replace(plain, saturation={"1.f": 0.8}).verdict()
    uneven = replace(plain, meta_gradient_norms=torch.tensor([1.0, 1000.0]))
    assert "ranges from 1 to 1e+03 over the segments" in uneven.verdict()


class Wide(Quadratic):
    """``|theta|^2`` of 20 000 coordinates, of which nobody can afford more than one."""

    def sample(self, batch_size: int, **options: object) -> WideInstances:  # type: ignore[override]
        return WideInstances(batch_size)


class WideInstances:
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        assert self.batch == 1
        return {"theta": torch.randn(self.batch, 20_000, generator=generator)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return params["theta"].square().sum(1)


def test_large_problems_are_watched_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer instances, and gates and features of some of their coordinates, however many there are."""
    looked_at: list[int] = []
    forward = reference._forward

    def counting(spec: object, weights: object, grad: Tensor, state: object) -> object:
        looked_at.append(len(grad))
        return forward(spec, weights, grad, state)  # type: ignore[arg-type]

    monkeypatch.setattr("l2l_fast.meta.diagnostics.reference._forward", counting)
    diagnosis = diagnose(make_rule(LogAndSign()), Wide(), steps=3, truncation=2)
    assert looked_at[:3] == [WATCHED] * 3
    assert [int(histogram.counts.sum()) for histogram in diagnosis.features] == [WATCHED * 3] * 2
    assert diagnosis.losses.shape == (4,)
    assert diagnosis.losses[0].item() == pytest.approx(20_000, rel=0.05)
    assert diagnose(make_rule(), Quadratic(), steps=2, functions=3).features[0].counts.sum() == 3 * 10 * 2
    assert diagnose(make_rule(), Quadratic(), steps=2).features[0].counts.sum() == 64 * 10 * 2


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="rule must be a CoordinatewiseLSTM, got Linear"):
        diagnose(nn.Linear(1, 1), Quadratic())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="functions must be at least 1, got 0"):
        diagnose(make_rule(), Quadratic(), functions=0)
