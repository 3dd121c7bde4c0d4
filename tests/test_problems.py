"""Problems: what they draw, from which generator, and what their losses are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from images import write_mnist

from l2l_fast.problems import PROBLEMS, Quadratic
from l2l_fast.problems.quadratic import QuadraticInstances


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path))


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_problem_protocol(name: str) -> None:
    instances = PROBLEMS[name]().sample(3, generator=seeded(), device="cpu")
    params = instances.init(generator=seeded(1))
    assert params
    assert {tensor.shape[0] for tensor in params.values()} == {3}
    leaves = {key: tensor.requires_grad_() for key, tensor in params.items()}
    loss = instances.loss(leaves, generator=seeded(2))
    assert loss.shape == (3,)
    # Instances are independent: the loss of the first one has no gradient elsewhere.
    grads = torch.autograd.grad(loss[0], list(leaves.values()))
    assert all(grad[0].abs().sum() > 0 and grad[1:].abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_same_generator_same_problem(name: str) -> None:
    def losses(seed: int) -> torch.Tensor:
        source = seeded(seed)
        instances = PROBLEMS[name]().sample(4, generator=source)
        return instances.loss(instances.init(generator=source), generator=source)

    assert torch.equal(losses(0), losses(0))
    assert not torch.equal(losses(0), losses(1))


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_same_point_and_minibatch_same_loss(name: str) -> None:
    """Second-order meta-gradients ask again."""
    instances = PROBLEMS[name]().sample(3, generator=seeded())
    params = instances.init(generator=seeded(1))
    first, other, again = (instances.loss(params, generator=seeded(seed)) for seed in (2, 3, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "quadratic")


def test_quadratic_loss_is_the_squared_residual() -> None:
    source = seeded()
    w = torch.randn(5, 3, 3, generator=source, dtype=torch.float64)
    y, theta = torch.randn(2, 5, 3, generator=source, dtype=torch.float64)
    expected = torch.stack([(w[b] @ theta[b] - y[b]).pow(2).sum() for b in range(5)])
    torch.testing.assert_close(QuadraticInstances(w, y).loss({"theta": theta}), expected, rtol=1e-14, atol=0)


def test_quadratic_zero_at_the_solution() -> None:
    instances = Quadratic(dim=2).sample(8, generator=seeded())
    theta = torch.linalg.solve(instances.w.double(), instances.y.double())
    exact = QuadraticInstances(instances.w.double(), instances.y.double())
    assert exact.loss({"theta": theta}).max() < 1e-20


def test_quadratic_gaussian_statistics() -> None:
    instances = Quadratic().sample(2000, generator=seeded())
    theta = instances.init(generator=seeded(1))["theta"]
    for values in (instances.w, instances.y, theta):
        assert abs(values.mean()) < 0.03
        assert abs(values.std() - 1) < 0.03
    # E f(theta_0) = dim * (dim + 1) for iid standard Gaussian W, y and theta_0.
    assert instances.loss({"theta": theta}).mean() == pytest.approx(110, rel=0.05)


def test_quadratic_deepmind_statistics() -> None:
    instances = Quadratic(variant="deepmind").sample(2000, generator=seeded())
    theta = instances.init(generator=seeded(1))["theta"]
    for values in (instances.w, instances.y):
        assert values.min() >= 0
        assert values.max() < 1
        assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert theta.std() == pytest.approx(0.01, rel=0.03)


def test_quadratic_says_which_one_it_is() -> None:
    assert repr(Quadratic(dim=3, variant="deepmind")) == "Quadratic(dim=3, variant='deepmind')"


def test_quadratic_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        Quadratic(dim=0)
    with pytest.raises(TypeError, match="dim must be an int, got float"):
        Quadratic(dim=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown variant 'cubic'; known variants: 'gaussian', 'deepmind'"):
        Quadratic(variant="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Quadratic().sample(0)
