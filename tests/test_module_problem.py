"""Problems made of a module: against plain loops over instances, replayed, differentiated twice, and refused."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import make_rule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, mse_loss
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import l2l_fast
from l2l_fast.meta.log import TrainEvent
from l2l_fast.problems.module import ModuleInstances, module_problem

BATCH, EXAMPLES, MINIBATCH = 3, 20, 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``[20, 2, 4, 4]`` and labels of three classes."""
    inputs = torch.randn(EXAMPLES, 2, 4, 4, generator=seeded(7), dtype=dtype)
    return inputs, torch.randint(3, (EXAMPLES,), generator=seeded(8))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def conv_net(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3), norm(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def leaves(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}


def chosen_examples(seed: int) -> Tensor:
    """The minibatches of a loss: its first draw from the generator."""
    return torch.randint(EXAMPLES, (BATCH, MINIBATCH), generator=seeded(seed))


@pytest.mark.parametrize("module_fn", [mlp, conv_net])
def test_losses_and_gradients_are_those_of_a_plain_loop(module_fn: Callable[[], nn.Module]) -> None:
    inputs, targets = images()
    problem = module_problem(module_fn, cross_entropy, (inputs, targets), minibatch=MINIBATCH)
    instances = problem.sample(BATCH, generator=seeded())
    params = leaves(instances.init(generator=seeded(1)))
    losses = instances.loss(params, generator=seeded(2))
    grads = torch.autograd.grad(losses.sum(), list(params.values()))
    chosen = chosen_examples(2)
    for b in range(BATCH):
        module = module_fn()
        module.load_state_dict({name: tensor[b].detach() for name, tensor in params.items()}, strict=False)
        loss = cross_entropy(module(inputs[chosen[b]]), targets[chosen[b]])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(losses[b], loss, rtol=1e-12, atol=0)
        for grad, parameter in zip(grads, module.parameters(), strict=True):
            torch.testing.assert_close(grad[b], parameter.grad, rtol=1e-10, atol=1e-14)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 40)
        self.dropout = nn.Dropout(0.25)
        self.last = nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.dropout(torch.tanh(self.first(x.flatten(1)))))
        return out


def test_dropout_draws_a_mask_for_every_instance_from_the_generator() -> None:
    inputs, targets = images()
    problem = module_problem(
        lambda: WithDropout().double(), lambda output, target: output.mean(), (inputs, targets), minibatch=1
    )
    instances = problem.sample(BATCH, generator=seeded())
    params = leaves(instances.init(generator=seeded(1)))
    losses = instances.loss(params, generator=seeded(2))
    grads = dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values())), strict=True))
    chosen = torch.randint(EXAMPLES, (BATCH, 1), generator=seeded(2))
    # The loss is linear in the units that dropout left, so the gradient of their weights shows which these are.
    masks = grads["last.weight"][:, 0] != 0
    assert 0.5 < masks.double().mean() < 0.95
    assert not torch.equal(masks[0], masks[1])
    for b in range(BATCH):
        row = {name: tensor[b].detach().requires_grad_() for name, tensor in params.items()}
        hidden = torch.tanh(inputs[chosen[b]].flatten(1) @ row["first.weight"].T + row["first.bias"])
        loss = (hidden * masks[b] / 0.75 @ row["last.weight"].T + row["last.bias"]).mean()
        torch.testing.assert_close(losses[b], loss, rtol=1e-12, atol=0)
        for name, expected in zip(row, torch.autograd.grad(loss, list(row.values())), strict=True):
            torch.testing.assert_close(grads[name][b], expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(instances.loss(params, generator=seeded(2)), losses)
    assert not torch.equal(instances.loss(params, generator=seeded(3)), losses)


class Counting(nn.Module):
    """Scales by a buffer that it doubles at every call, beside a frozen random projection."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.rand(()) + 1)
        self.projection = nn.Linear(32, 4).requires_grad_(False)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.mul_(2)
        out: Tensor = self.calls * self.last(self.projection(x.flatten(1)))
        return out


def test_buffers_and_frozen_parameters_are_constants_of_an_instance() -> None:
    problem = module_problem(Counting, cross_entropy, images(torch.float32), minibatch=MINIBATCH)
    instances = problem.sample(BATCH, generator=seeded())
    params = instances.init(generator=seeded(1))
    assert list(params) == ["last.weight", "last.bias"]
    first = instances.loss(params, generator=seeded(2))
    assert torch.equal(instances.loss(params, generator=seeded(2)), first)
    again = problem.sample(BATCH, generator=seeded())
    assert torch.equal(again.loss(params, generator=seeded(2)), first)
    other = problem.sample(BATCH, generator=seeded(9))
    assert (other.loss(params, generator=seeded(2)) != first).all()


def test_batch_norm_keeps_no_running_statistics() -> None:
    module = conv_net()
    before = copy.deepcopy(module.state_dict())
    problem = module_problem(lambda: module, cross_entropy, images(), minibatch=MINIBATCH)
    instances = problem.sample(BATCH, generator=seeded())
    params = instances.init(generator=seeded(1))
    first = instances.loss(params, generator=seeded(2))
    for seed in range(3, 6):
        instances.loss(params, generator=seeded(seed))
    assert torch.equal(instances.loss(params, generator=seeded(2)), first)
    # The module of the user is read and not changed.
    assert module.training
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_submodule_in_evaluation_mode_stays_in_it() -> None:
    inputs, targets = images()

    def frozen_statistics() -> nn.Module:
        module = conv_net()
        assert isinstance(module, nn.Sequential)
        norm = module[1].eval()
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        norm.running_mean.uniform_(-1, 1)
        return module

    problem = module_problem(frozen_statistics, cross_entropy, (inputs, targets), minibatch=MINIBATCH)
    instances = problem.sample(BATCH, generator=seeded())
    params = instances.init(generator=seeded(1))
    # Only if examples do not see each other is the mean over all of them that of each alone.
    alone = [
        module_problem(frozen_statistics, cross_entropy, (x[None], y[None]), minibatch=1)
        .sample(BATCH, generator=seeded())
        .loss(params)
        for x, y in zip(inputs, targets, strict=True)
    ]
    torch.testing.assert_close(instances.evaluate(params), torch.stack(alone).mean(0), rtol=1e-12, atol=0)


def test_initialisations_come_from_the_generator_and_leave_the_global_one_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    instances = module_problem(mlp, cross_entropy, images(), minibatch=MINIBATCH).sample(4, generator=seeded())
    params = instances.init(generator=seeded(1))
    instances.loss(params, generator=seeded(2))
    instances.evaluate(params)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = instances.init(generator=seeded(1))
    other = instances.init(generator=seeded(3))
    assert params["1.weight"].shape == (4, 4, 32)
    assert all(torch.equal(again[name], params[name]) for name in params)
    assert not torch.equal(other["1.weight"], params["1.weight"])
    assert not torch.equal(params["1.weight"][0], params["1.weight"][1])
    assert params["1.weight"].abs().max() <= 32**-0.5  # nn.Linear's own initialisation


def test_without_a_generator_the_global_one_is_used() -> None:
    problem = module_problem(mlp, cross_entropy, images(), minibatch=MINIBATCH)

    def losses(seed: int) -> Tensor:
        torch.manual_seed(seed)
        instances = problem.sample(BATCH)
        return instances.loss(instances.init())

    assert torch.equal(losses(0), losses(0))
    assert not torch.equal(losses(0), losses(1))


def test_evaluate_is_the_mean_over_a_split_without_dropout() -> None:
    inputs, _ = images()
    regression = (inputs, inputs.mean((1, 2, 3), keepdim=True)[:, 0, 0])
    held_out = (inputs[:7] + 1, regression[1][:7])
    problem = module_problem(lambda: WithDropout().double(), mse_loss, regression, minibatch=3, test_data=held_out)
    instances = problem.sample(BATCH, generator=seeded())
    params = {name: tensor.requires_grad_() for name, tensor in instances.init(generator=seeded(1)).items()}
    for split, (x, y) in (("train", regression), ("test", held_out)):
        losses = instances.evaluate(params, split)  # type: ignore[arg-type]
        assert not losses.requires_grad
        for b in range(BATCH):
            module = WithDropout().double().eval()
            module.load_state_dict({name: tensor[b].detach() for name, tensor in params.items()})
            torch.testing.assert_close(losses[b], mse_loss(module(x), y).detach(), rtol=1e-12, atol=0)


def test_evaluate_takes_8192_examples_and_is_not_random() -> None:
    counts = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        counts.append(len(output))
        return mse_loss(dropout(output), target)

    data = torch.linspace(-1, 1, 9000)[:, None]
    problem = module_problem(lambda: nn.Linear(1, 1), loss, (data, data), minibatch=3000)
    instances = problem.sample(BATCH, generator=seeded())
    params = instances.init(generator=seeded(1))
    counts.clear()
    losses = instances.evaluate(params)
    assert counts == [4096, 4096]
    assert torch.equal(instances.evaluate(params), losses)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, functools.partial(nn.InstanceNorm2d, track_running_stats=True)])
def test_evaluate_normalises_as_in_training(norm: Callable[[int], nn.Module]) -> None:
    problem = module_problem(lambda: conv_net(norm), cross_entropy, images(), minibatch=EXAMPLES)
    instances = problem.sample(BATCH, generator=seeded())
    params = instances.init(generator=seeded(1))
    for b in range(BATCH):
        module = conv_net(norm)
        module.load_state_dict({name: tensor[b] for name, tensor in params.items()}, strict=False)
        inputs, targets = images()
        expected = cross_entropy(module(inputs), targets).detach()  # in training mode
        torch.testing.assert_close(instances.evaluate(params)[b], expected, rtol=1e-12, atol=0)


def test_second_derivatives() -> None:
    problem = module_problem(conv_net, cross_entropy, images(), minibatch=MINIBATCH)
    instances = problem.sample(2, generator=seeded())
    params = leaves(instances.init(generator=seeded(1)))

    def loss(*tensors: Tensor) -> Tensor:
        return instances.loss(dict(zip(params, tensors, strict=True)), generator=seeded(2))

    assert torch.autograd.gradgradcheck(loss, tuple(params.values()), fast_mode=True)


@pytest.mark.parametrize("second_derivatives", [False, True])
def test_unroll(second_derivatives: bool) -> None:
    problem = module_problem(WithDropout, lambda output, target: output.square().mean(), images(torch.float32))
    instances = problem.sample(2, generator=seeded())
    rule = make_rule(seeded(3), hidden_size=4)
    run = l2l_fast.unroll(
        rule,
        instances,
        steps=3,
        generator=seeded(1),
        second_derivatives=second_derivatives,
        backend="reference",
    )
    run.loss.backward()  # type: ignore[no-untyped-call]
    assert run.losses.shape == (4, 2)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in rule.parameters())


def test_meta_training_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    """The constants of a run were drawn with its instances, and must come back with them."""

    class Stopped(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if event.update == 2:
            raise Stopped

    def trainer(folder: str) -> l2l_fast.MetaTrainer:
        problem = module_problem(Counting, cross_entropy, images(torch.float32), minibatch=MINIBATCH)
        config = l2l_fast.TrainConfig(
            updates=5, horizon=6, truncation=2, batch_size=2, validation_functions=2, checkpoint_every=1
        )
        rule = make_rule(seeded(3), hidden_size=4)
        return l2l_fast.MetaTrainer(rule, problem, config, folder=tmp_path / folder)

    whole = trainer("whole")
    whole.fit()
    with pytest.raises(Stopped):
        trainer("halves").fit(on_update=stop)
    resumed = trainer("halves")
    assert resumed.fit(resume=True).updates == 5
    for expected, weight in zip(whole.rule.parameters(), resumed.rule.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_it_says_which_one_it_is() -> None:
    def text(module_fn: Callable[[], nn.Module] = mlp, inputs: Tensor | None = None, **settings: Any) -> str:
        data = (images()[0] if inputs is None else inputs, images()[1])
        return repr(module_problem(module_fn, cross_entropy, data, **settings))

    assert text().startswith(
        "module_problem(Sequential of 147 coordinates, cross_entropy, train=[20, 2, 4, 4] float64 -> [20] int64, "
        "minibatch=128, digest="
    )
    assert text() == text()
    different = {
        text(),
        text(minibatch=4),
        text(inputs=images()[0] + 1),
        text(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 3)).double()),
        text(test_data=images()),
    }
    assert len(different) == 5
    smoothed = functools.partial(cross_entropy, label_smoothing=0.1)
    named = repr(module_problem(mlp, smoothed, images()))
    assert "functools.partial(<function cross_entropy>, label_smoothing=0.1)" in named


class Listed(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize("numpy", [False, True])
def test_data_sets_are_read_into_tensors(numpy: bool) -> None:
    inputs, targets = images()
    expected = module_problem(mlp, cross_entropy, (inputs, targets))
    items = [(x.numpy() if numpy else x, int(y)) for x, y in zip(inputs, targets, strict=True)]
    assert repr(module_problem(mlp, cross_entropy, Listed(items))) == repr(expected)
    assert repr(module_problem(mlp, cross_entropy, TensorDataset(inputs, targets))) == repr(expected)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2), 0)])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.ones(3, 2), TypeError, r"data must be a tuple \(inputs, targets\).*, got Tensor"),
        (Stream(), TypeError, r"data must be a tuple \(inputs, targets\).*, got Stream"),
        ((torch.ones(3), [1, 2, 3]), TypeError, r"two tensors, inputs and targets, got \(Tensor, list\)"),
        ((torch.ones(3),), TypeError, r"two tensors, inputs and targets, got \(Tensor\)"),
        ((torch.ones(3, 2), torch.ones(4)), ValueError, r"leading dimension .* shapes \(3, 2\) and \(4,\)"),
        ((torch.ones(()), torch.ones(())), ValueError, r"leading dimension .* shapes \(\) and \(\)"),
        ((torch.ones(0, 2), torch.ones(0)), ValueError, "data is empty; give at least one example"),
        (Listed([]), ValueError, "data is empty; give at least one example"),
        (Listed([(torch.ones(2), 0), (torch.ones(3), 0)]), ValueError, "a Listed, do not stack .* all of one shape"),
        (Listed([(torch.ones(2), object())]), ValueError, "a Listed, do not stack .* all of one shape"),
        (Listed([{"x": 1}]), TypeError, "got dict"),
    ],
)
def test_rejects_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module_problem(mlp, cross_entropy, data)
    with pytest.raises(error, match=f"test_{message}" if message.startswith("data") else message):
        module_problem(mlp, cross_entropy, images(), test_data=data)


class Forward(nn.Module):
    """A linear layer, and then what a test wants."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 3)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0].sum().expand_as(x),
    ],
)
def test_explains_what_vmap_cannot_do(then: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"work alone but not for several instances at once .* vmap") as e:
        module_problem(lambda: Forward(then), cross_entropy, images(torch.float32))
    assert isinstance(e.value.__cause__, RuntimeError)


def test_rejects_hidden_state_and_foreign_random_numbers() -> None:
    source = random.Random(0)
    with pytest.raises(ValueError, match=r"keep no state between calls .* random numbers from PyTorch only"):
        module_problem(lambda: Forward(lambda x: x * source.random()), cross_entropy, images(torch.float32))


@pytest.mark.parametrize(
    ("module_fn", "error", "message"),
    [
        (None, TypeError, "module_fn must be a function, got NoneType"),
        (nn.Linear(2, 2), TypeError, "a function that builds a module, got a Linear itself; pass lambda"),
        (lambda: 3, TypeError, "must return a torch.nn.Module, got int"),
        (nn.Flatten, ValueError, "the Flatten that module_fn returns has no parameter that requires grad"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), ValueError, "has no parameter that requires grad"),
        (lambda: nn.LazyLinear(2), ValueError, "weight of the LazyLinear that module_fn returns has no shape yet"),
        (lambda: nn.Linear(2, 2, device="meta"), ValueError, "is on meta; build it on the CPU"),
        (
            lambda: nn.Linear(5, 3),
            ValueError,
            r"fail on a minibatch of inputs \[128, 2, 4, 4\] float64 .* RuntimeError",
        ),
    ],
)
def test_rejects_modules(module_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module_problem(module_fn, cross_entropy, images())


def test_rejects_another_architecture_at_each_call() -> None:
    widths = iter(range(3, 10))
    with pytest.raises(ValueError, match=r"same architecture at every call; it once gave \{1.weight: \[3, 32\]"):
        module_problem(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, next(widths))).double(), cross_entropy, images()
        )


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        ("mse", TypeError, "loss_fn must be a function, got str"),
        (lambda output, target: 1.0, TypeError, "loss_fn must return a tensor, got float"),
        (
            lambda output, target: output.mean(1),
            ValueError,
            r"scalar for a minibatch, got shape \(128,\); take the mean",
        ),
        (lambda output, target: output.detach().mean(), ValueError, "does not depend on the parameters of the module"),
        (lambda output, target: output.float().mean(), TypeError, "returned torch.float32 but the parameters are .*64"),
        (lambda output, target: mse_loss(output, target), ValueError, "module and loss_fn fail on a minibatch"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_rejects_losses(loss_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module_problem(mlp, loss_fn, images())


def test_rejects_other_nonsense() -> None:
    with pytest.raises(TypeError, match=r"minibatch must be an int, got 2\.5"):
        module_problem(mlp, cross_entropy, images(), minibatch=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minibatch must be at least 1, got 0"):
        module_problem(mlp, cross_entropy, images(), minibatch=0)
    problem = module_problem(mlp, cross_entropy, images())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        problem.sample(0)
    instances = problem.sample(2)
    params = instances.init()
    with pytest.raises(ValueError, match="no split 'test'; there is 'train'; give module_problem"):
        instances.evaluate(params, "test")
    weight = params.pop("1.weight")
    for call in (ModuleInstances.loss, ModuleInstances.evaluate):
        with pytest.raises(
            ValueError, match=r"params must be \{1.weight: \[2, 4, 32\].* for 2 instances, got \{1.bias"
        ):
            call(instances, params)
    with pytest.raises(ValueError, match=r"got \{1.weight: \[1, 4, 32\]"):
        instances.loss({"1.weight": weight[:1], **params})
