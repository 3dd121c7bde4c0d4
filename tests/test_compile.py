"""``torch.compile`` over a whole training step: the same bits, and nothing compiled anew as training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_loop import make_rule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

from l2l_fast import LearnedOptimizer
from l2l_fast.backends import Backend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The compiler's own: it uses what PyTorch has declared to be on its way out.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Training:
    """A model, its optimizer, and a training step as users write it."""

    def __init__(self, model: nn.Module, generator: torch.Generator, backend: str) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = LearnedOptimizer(self.model.parameters(), make_rule(generator), backend=backend)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss


def pair(generator: torch.Generator, backend: str) -> tuple[Training, Training]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    seed = generator.get_state()
    trainings = []
    for _ in range(2):
        generator.set_state(seed)
        trainings.append(Training(model, generator, backend))
    return trainings[0], trainings[1]


def assert_same(one: Training, other: Training) -> None:
    for left, right in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)
    states = [training.optimizer.state_dict()["state"] for training in (one, other)]
    assert all(torch.equal(states[0][key]["lstm"], states[1][key]["lstm"]) for key in states[1])


def batches(generator: torch.Generator, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 6, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)]


def test_a_whole_training_step(backend: Backend, generator: torch.Generator) -> None:
    """Traced by autograd but compiled by nothing, so that every bit has to agree."""
    plain, compiled = pair(generator, backend.name)
    counter = CompileCounterWithBackend("aot_eager")
    step: Any = torch.compile(compiled.step, backend=counter)
    scheduler = [lr_scheduler.StepLR(training.optimizer, 1, gamma=0.5) for training in (plain, compiled)]
    losses = []
    graphs = []
    for x, y in batches(generator, 4):
        losses.append((plain.step(x, y), step(x, y)))
        graphs.append(counter.frame_count)
        for one in scheduler:
            one.step()
    for left, right in losses:
        assert torch.equal(left, right)
    assert_same(plain, compiled)
    assert compiled.optimizer.param_groups[0]["lr"] == 0.0625
    # Something was compiled, the forward at least, and neither new gradients nor a new rate compile it anew.
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * 3


def test_by_the_default_compiler(generator: torch.Generator) -> None:
    """Generated code sums in another order, so the numbers agree up to that."""
    plain, compiled = pair(generator, "cpu")
    step: Any = torch.compile(compiled.step)
    for x, y in batches(generator, 3):
        torch.testing.assert_close(step(x, y), plain.step(x, y))
    for left, right in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)
