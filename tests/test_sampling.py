"""Meta-gradients from a part of the coordinates: no bias, the promised share, and no surprises at the edges."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from cases import make_weights
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, LogAndSign, RuleSpec, reference, unroll
from l2l_fast.backends import Backend
from l2l_fast.meta.objective import Objective
from l2l_fast.meta.sampling import TILE, sample_coordinates
from l2l_fast.problems import Quadratic
from l2l_fast.problems.quadratic import QuadraticInstances

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, DIM, STEPS = 7, 15, 2
N = BATCH * DIM
TILES = -(-N // TILE)
DRAWS = 800


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratics() -> QuadraticInstances:
    """Instances whose gradients are orders of magnitude apart."""
    instances = Quadratic(DIM).sample(BATCH, generator=seeded(1))
    scale = 10 ** torch.linspace(-2, 1, BATCH, dtype=torch.float64)
    return QuadraticInstances(instances.w.double() * scale.view(-1, 1, 1), instances.y.double() * scale.view(-1, 1))


def make_rule(hidden_size: int = 2) -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size, LogAndSign(5.0)).double()
    with torch.no_grad():
        rule.output.weight.mul_(10)  # updates of some size, where a fresh rule takes tiny ones
    return rule


def start() -> tuple[dict[str, Tensor], Tensor]:
    """Parameters and a state as another run left them."""
    state = 0.3 * torch.randn(N, 2, 2, 2, generator=seeded(3), dtype=torch.float64)
    return {"theta": torch.randn(BATCH, DIM, generator=seeded(2), dtype=torch.float64)}, state


def uneven_d_points() -> Tensor:
    return torch.randn(STEPS + 1, N, generator=seeded(4)) * 10 ** torch.linspace(-4, 0, N)


def meta_gradient(
    rule: CoordinatewiseLSTM, fraction: float, seed: int, objective: Objective = "loss", backend: str | None = None
) -> Tensor:
    """As one vector; the run is the same for every seed, the choice of coordinates is not."""
    params, state = start()
    run = unroll(
        rule,
        quadratics(),
        STEPS,
        params=params,
        state=state,
        generator=seeded(seed),
        objective=objective,
        coordinate_fraction=fraction,
        backend=backend,
    )
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(run.loss, list(rule.parameters()))])


# The choice


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.9])
def test_frequencies_are_what_the_factors_make_up_for(fraction: float) -> None:
    """Each tile is kept with the probability whose inverse is its factor, all together in the promised share."""
    generator, d_points, weights = seeded(0), uneven_d_points(), torch.ones(STEPS + 1)
    kept, probability = torch.zeros(TILES), torch.full((TILES,), float("nan"), dtype=torch.float64)
    for _ in range(DRAWS):
        index, factor = sample_coordinates(d_points, weights, fraction, generator)
        tiles = index[index % TILE == 0] // TILE
        kept[tiles] += 1
        probability[tiles] = 1 / factor[index % TILE == 0]
    assert (probability > 0).all()
    assert (probability <= 1).all()
    assert probability.sum().item() == pytest.approx(fraction * TILES, rel=1e-9)
    error = (probability * (1 - probability) / DRAWS).sqrt()
    assert ((kept / DRAWS - probability).abs() <= 4.5 * error).all()
    assert (kept[probability == 1] == DRAWS).all()


def test_what_matters_more_is_kept_more_often() -> None:
    """Probabilities follow the derivative by the updates, the sum of what comes after, not that of one point."""
    d_points = torch.zeros(3, 3 * TILE)
    d_points[1:, :TILE] = torch.tensor([[1.0], [-1.0]])  # the update before both of them moves nothing
    d_points[1:, TILE : 2 * TILE] = 1
    d_points[0] = 100  # the first point, that no update reaches
    probability = torch.zeros(3, dtype=torch.float64)
    for seed in range(100):
        index, factor = sample_coordinates(d_points, torch.ones(3), 1 / 3, seeded(seed))
        probability[index // TILE] = 1 / factor
    # Norms 1, sqrt(5) and 0 share nine tenths; the rest is shared evenly.
    expected = 0.9 * torch.tensor([1, 5**0.5, 0]) / (1 + 5**0.5) + 0.1 / 3
    torch.testing.assert_close(probability, expected.double(), rtol=1e-6, atol=0)


def test_loss_weights_weigh() -> None:
    d_points = torch.ones(3, 2 * TILE)
    d_points[2, :TILE] = 1e3
    index, factor = sample_coordinates(d_points, torch.tensor([1.0, 1.0, 0.0]), 0.999, seeded(0))
    assert len(set(factor[index < TILE].tolist()) | set(factor[index >= TILE].tolist())) == 1


def test_no_factor_is_large() -> None:
    """A tile with next to no gradient is not scaled up without bound where it is kept."""
    d_points = torch.ones(2, 50 * TILE)
    d_points[:, TILE:] = 1e-12
    factors = torch.cat([sample_coordinates(d_points, torch.ones(2), 0.2, seeded(seed))[1] for seed in range(50)])
    assert 1 <= factors.min() <= factors.max() <= 10 / 0.2 + 1e-9


@pytest.mark.parametrize("n", [1, TILE - 1, TILE, TILE + 1, N])
def test_tiles_are_whole_and_the_last_one_is_ragged(n: int) -> None:
    lasts = set()
    for seed in range(30):
        index, factor = sample_coordinates(torch.ones(2, n), torch.ones(2), 0.5, seeded(seed))
        assert index.shape == factor.shape
        tiles, counts = torch.unique(index // TILE, return_counts=True)
        size = torch.full_like(tiles, TILE)
        size[tiles == (n - 1) // TILE] = (n - 1) % TILE + 1
        assert torch.equal(counts, size)
        assert torch.equal(index, torch.unique(index))
        assert index.numel() == 0 or int(index.max()) < n
        lasts.add(bool((tiles == (n - 1) // TILE).any()))
    assert lasts == {False, True}


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_gradients_that_say_nothing_are_sampled_evenly(value: float) -> None:
    d_points = torch.randn(3, 8 * TILE, generator=seeded(0)) if value else torch.zeros(3, 8 * TILE)
    if value:
        d_points[1, 5] = value
    for seed in range(10):
        index, factor = sample_coordinates(d_points, torch.ones(3), 0.5, seeded(seed))
        torch.testing.assert_close(factor, torch.full_like(factor, 2.0))
        assert torch.equal(index, torch.unique(index))


def test_generator_advances_by_the_same_amount_whatever_is_chosen() -> None:
    states = []
    for d_points, fraction in ((uneven_d_points(), 0.3), (torch.zeros(2, N), 0.99), (torch.ones(9, N), 0.01)):
        generator = seeded(5)
        sample_coordinates(d_points, torch.ones(len(d_points)), fraction, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert not torch.equal(states[0], seeded(5).get_state())


def test_without_a_generator_the_global_one_chooses() -> None:
    chosen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        chosen.append(sample_coordinates(torch.ones(2, 40 * TILE), torch.ones(2), 0.5, None)[0].tolist())
    assert chosen[0] == chosen[1] != chosen[2]


# The meta-gradient


@pytest.mark.parametrize("objective", ["loss", "log"])
def test_no_bias(objective: Objective) -> None:
    """The mean of many lies within a few standard errors of the whole, in every weight and along the whole."""
    rule = make_rule()
    whole = meta_gradient(rule, 1.0, 0, objective)
    samples = torch.stack([meta_gradient(rule, 0.5, seed, objective) for seed in range(220)])
    along = torch.cat([samples, (samples @ whole / whole.norm()).unsqueeze(1)], dim=1)
    right = torch.cat([whole, whole.norm().view(1)])
    error = along.std(0) / len(along) ** 0.5
    assert (error > 0).all()
    assert ((along.mean(0) - right).abs() <= 4.5 * error).all()
    assert (error[-1] / right[-1]).item() < 0.05  # small enough for a bias to show


def test_whole_is_the_whole() -> None:
    """To the bit, and drawing nothing."""
    rule, (params, state) = make_rule(), start()
    generator = seeded(1)
    given = unroll(rule, quadratics(), STEPS, params=params, state=state, generator=generator, coordinate_fraction=1)
    assert torch.equal(generator.get_state(), seeded(1).get_state())
    left_out = unroll(rule, quadratics(), STEPS, params=params, state=state, generator=seeded(1))
    for one, two in zip(
        *(torch.autograd.grad(r.loss, list(rule.parameters())) for r in (given, left_out)), strict=True
    ):
        assert torch.equal(one, two)


def test_almost_the_whole_is_almost_the_whole() -> None:
    rule = make_rule()
    torch.testing.assert_close(meta_gradient(rule, 1 - 1e-9, 0), meta_gradient(rule, 1.0, 0), rtol=1e-6, atol=0)


def test_run_is_the_same_and_same_seed_same_gradient() -> None:
    rule, (params, state) = make_rule(), start()
    whole, part = (
        unroll(rule, quadratics(), STEPS, params=params, state=state, generator=seeded(1), coordinate_fraction=fraction)
        for fraction in (1.0, 0.3)
    )
    assert torch.equal(part.loss, whole.loss)
    assert torch.equal(part.losses, whole.losses)
    assert torch.equal(part.params["theta"], whole.params["theta"])
    assert torch.equal(part.state, whole.state)
    once, again, *others = (meta_gradient(rule, 0.3, seed) for seed in (1, 1, *range(2, 12)))
    assert torch.equal(once, again)
    assert not all(torch.equal(once, other) for other in others)


def test_backends_choose_alike(backend: Backend) -> None:
    """And each is given the tiles as they are, to sum up what is left of them."""
    spec = RuleSpec(20, LogAndSign(5.0))
    rule = CoordinatewiseLSTM(20, LogAndSign(5.0))
    parameters = [parameter for name, parameter in rule.named_parameters() if "bias_hh" not in name]
    weights = make_weights(spec, seeded(0))
    with torch.no_grad():
        for parameter, part in zip(parameters, torch.split(weights, [p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))
    instances = Quadratic(DIM).sample(BATCH, generator=seeded(1))
    gradients = []
    for name in (backend.name, "reference"):
        run = unroll(rule, instances, 2, generator=seeded(1), coordinate_fraction=0.4, backend=name)
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(run.loss, parameters)]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * gradients[1].abs().max().item())


def test_nothing_chosen_is_no_gradient(backend: Backend) -> None:
    rule = CoordinatewiseLSTM(20, LogAndSign(5.0))
    instances = Quadratic(DIM).sample(2, generator=seeded(1))
    run = unroll(rule, instances, 2, generator=seeded(0), coordinate_fraction=1e-6, backend=backend.name)
    gradients = torch.autograd.grad(run.loss, list(rule.parameters()))
    assert all((gradient == 0).all() for gradient in gradients)


def test_what_is_kept_shrinks_with_the_share() -> None:
    rule, instances = CoordinatewiseLSTM(2), Quadratic(2).sample(1000, generator=seeded(1))

    def kept(fraction: float) -> int:
        saved = []

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel() if tensor.dim() == 2 and len(tensor) == 21 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            unroll(rule, instances, 20, generator=seeded(2), coordinate_fraction=fraction)
        return sum(saved)

    assert kept(1.0) == 21 * 2000
    assert 0 < kept(0.1) < 0.2 * 2 * 21 * 2000  # gradients, and the derivatives by the points apart from them


class Plain(nn.Module):
    """A rule of unknown make."""

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        super().__init__()
        self.rule = rule

    def init_state(self, n: int) -> Tensor:
        return self.rule.init_state(n, dtype=torch.float64)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.step(self.rule.spec, self.rule.flat_weights(), grad, state)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan"), True, "half", None])
def test_bad_fraction(fraction: object) -> None:
    with pytest.raises(ValueError, match="coordinate_fraction must be above 0 and at most 1, got"):
        unroll(make_rule(), quadratics(), 2, coordinate_fraction=fraction)  # type: ignore[arg-type]


def test_refused_where_coordinates_need_each_other() -> None:
    rule, (params, state) = make_rule(), start()
    with pytest.raises(ValueError, match="needs a CoordinatewiseLSTM and first-order meta-gradients"):
        unroll(rule, quadratics(), 2, coordinate_fraction=0.5, second_derivatives=True)
    with pytest.raises(ValueError, match="needs a CoordinatewiseLSTM and first-order meta-gradients"):
        unroll(Plain(rule), quadratics(), 2, coordinate_fraction=0.5)
    wanting: list[tuple[Mapping[str, Tensor], Tensor]] = [
        ({"theta": params["theta"].clone().requires_grad_()}, state),
        (params, state.clone().requires_grad_()),
    ]
    for start_params, start_state in wanting:
        with pytest.raises(ValueError, match="gives no derivatives by params and state; detach them"):
            unroll(rule, quadratics(), 2, params=start_params, state=start_state, coordinate_fraction=0.5)
        with torch.no_grad():
            unroll(rule, quadratics(), 2, params=start_params, state=start_state, coordinate_fraction=0.5)
