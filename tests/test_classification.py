"""Image classifiers: against a plain module for each network, their minibatches, and bad settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
import torch
from images import write_mnist
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, LogAndSign, unroll
from l2l_fast.datasets import Dataset, load
from l2l_fast.problems import Evaluates, ImageClassifier
from l2l_fast.problems import classification as module
from l2l_fast.problems.classification import Activation, ImageClassifierInstances, digits, mnist

BATCH = 3
ACTIVATIONS: dict[str, nn.Module] = {"sigmoid": nn.Sigmoid(), "relu": nn.ReLU(), "tanh": nn.Tanh(), "elu": nn.ELU()}

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(problem: ImageClassifier, params: Mapping[str, Tensor]) -> list[nn.Sequential]:
    """One plain module for each instance, with its parameters."""
    modules = []
    for b in range(len(params["w1"])):
        layers: list[nn.Module] = []
        for k in range(1, len(problem.hidden) + 2):
            weight, bias = params[f"w{k}"][b], params[f"b{k}"][b]
            linear = nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype)
            linear.weight.data, linear.bias.data = weight.t().contiguous(), bias.clone()
            layers += [linear, ACTIVATIONS[problem.activation]]
        modules.append(nn.Sequential(*layers[:-1]))
    return modules


def pixels(images: Tensor, data: Dataset) -> Tensor:
    return images.flatten(1).double() / data.largest


def start(instances: ImageClassifierInstances, seed: int = 1) -> dict[str, Tensor]:
    """Starting points in float64, a hundred times as large as they are, so that the networks do something."""
    return {name: 100 * tensor.double() for name, tensor in instances.init(generator=seeded(seed)).items()}


SETTINGS = [
    *(ImageClassifier("digits", hidden=(6,), activation=activation) for activation in get_args(Activation)),
    ImageClassifier("digits", hidden=(5, 4, 3)),
    ImageClassifier("digits", hidden=()),
    ImageClassifier("digits", minibatch=1),
]


@pytest.mark.parametrize("problem", SETTINGS, ids=str)
def test_losses_and_gradients_of_plain_modules(problem: ImageClassifier) -> None:
    data, instances = load("digits"), problem.sample(BATCH)
    params = {name: tensor.requires_grad_() for name, tensor in start(instances).items()}
    losses = instances.loss(params, generator=seeded(2))
    grads = dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values())), strict=True))
    # The only random numbers drawn are which images, with replacement, every network its own.
    chosen = torch.randint(len(data.train_images), (BATCH, problem.minibatch), generator=seeded(2))
    for b, network in enumerate(networks(problem, params)):
        images, labels = data.train_images[chosen[b]], data.train_labels[chosen[b]]
        loss = nn.functional.cross_entropy(network(pixels(images, data)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(losses[b], loss, rtol=1e-12, atol=0)
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        for k, linear in enumerate(linears, start=1):
            assert linear.weight.grad is not None
            torch.testing.assert_close(grads[f"w{k}"][b], linear.weight.grad.t(), rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(grads[f"b{k}"][b], linear.bias.grad, rtol=1e-10, atol=1e-14)


def test_every_network_has_a_minibatch_of_its_own_and_each_call_another() -> None:
    instances = digits(minibatch=8).sample(BATCH)
    alike = {name: tensor[:1].expand_as(tensor).contiguous() for name, tensor in start(instances).items()}
    generator = seeded(0)
    first, second = (instances.loss(alike, generator=generator) for _ in range(2))
    assert len({round(loss, 9) for loss in [*first.tolist(), *second.tolist()]}) == 2 * BATCH


def test_minibatches_are_drawn_from_all_training_images_evenly() -> None:
    """Each network's loss is that of its images alone, so many minibatches of them average to the loss on all."""
    instances = digits(minibatch=512).sample(20)
    params = {name: tensor[:1].expand(20, *tensor.shape[1:]) for name, tensor in start(instances).items()}
    losses = torch.stack([instances.loss(params, generator=seeded(seed)) for seed in range(10)]).view(-1)
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - instances.evaluate(params)[0]) < 4 * error
    assert error < 0.01 * losses.mean()


@pytest.mark.parametrize("evaluated", [8192, 1030, 1024, 7])
@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluate_is_the_plain_mean_over_fixed_images(
    split: str, evaluated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the images are one chunk, several, or end in a ragged one."""
    monkeypatch.setattr(module, "EVALUATED_IMAGES", evaluated)
    problem = digits(hidden=(6,))
    data, instances = load("digits"), problem.sample(BATCH)
    assert isinstance(instances, Evaluates)
    params = {name: tensor.requires_grad_() for name, tensor in start(instances).items()}
    images, labels = (
        (data.train_images, data.train_labels) if split == "train" else (data.test_images, data.test_labels)
    )
    losses = instances.evaluate(params, split=split)  # type: ignore[arg-type]
    assert not losses.requires_grad
    expected = [
        nn.functional.cross_entropy(network(pixels(images[:evaluated], data)), labels[:evaluated]).detach()
        for network in networks(problem, params)
    ]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)
    assert torch.equal(losses, instances.evaluate(params, split=split))  # type: ignore[arg-type]


def test_evaluate_takes_the_training_images_by_default() -> None:
    instances = digits().sample(BATCH)
    params = instances.init(generator=seeded(1))
    assert torch.equal(instances.evaluate(params), instances.evaluate(params, split="train"))
    assert not torch.equal(instances.evaluate(params), instances.evaluate(params, split="test"))
    with pytest.raises(ValueError, match="no split 'validation'; there is 'train', 'test'"):
        instances.evaluate(params, split="validation")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_in_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    instances = digits().sample(BATCH)
    params = {name: tensor.to(dtype) for name, tensor in instances.init(generator=seeded(1)).items()}
    exact = instances.loss({name: tensor.double() for name, tensor in params.items()}, generator=seeded(2))
    for losses in (instances.loss(params, generator=seeded(2)), instances.evaluate(params)):
        assert losses.dtype == dtype
        assert losses.shape == (BATCH,)
    torch.testing.assert_close(instances.loss(params, generator=seeded(2)).double(), exact, rtol=1e-6, atol=0)


def test_images_are_left_as_they_are() -> None:
    data, instances = load("digits"), digits().sample(BATCH)
    before = data.train_images.clone()
    instances.loss(instances.init(), generator=seeded(0))
    instances.evaluate(instances.init())
    assert torch.equal(data.train_images, before)


def test_starting_points() -> None:
    """Iid Gaussian of the standard deviation asked for; those of the same generator are the same."""
    instances = digits(hidden=(40, 30), init_std=0.2).sample(50)
    params = instances.init(generator=seeded(1))
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    assert shapes == {
        "w1": (50, 64, 40),
        "b1": (50, 40),
        "w2": (50, 40, 30),
        "b2": (50, 30),
        "w3": (50, 30, 10),
        "b3": (50, 10),
    }
    for values in params.values():
        assert values.dtype == torch.float32
        assert abs(values.mean()) < 5 * 0.2 / values.numel() ** 0.5
        assert values.std() == pytest.approx(0.2, rel=5 / (2 * values.numel()) ** 0.5)
    again, other = (instances.init(generator=seeded(seed)) for seed in (1, 2))
    assert all(torch.equal(again[name], tensor) for name, tensor in params.items())
    assert not torch.equal(other["w1"], params["w1"])
    # Networks do not start alike, and default to the published standard deviation.
    assert not torch.equal(params["w1"][0], params["w1"][1])
    assert digits().sample(BATCH).init(generator=seeded(1))["w1"].std() == pytest.approx(0.01, rel=0.1)


def test_first_loss_is_that_of_a_guess() -> None:
    instances = digits().sample(BATCH)
    losses = instances.evaluate(instances.init(generator=seeded(0)))
    torch.testing.assert_close(losses, torch.full((BATCH,), 10.0).log(), rtol=0.01, atol=0)


def test_mnist_has_28_by_28_pixels_and_values_up_to_255(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path))
    data, problem = load("mnist"), mnist(hidden=7)
    instances = problem.sample(2)
    params = start(instances)
    assert params["w1"].shape == (2, 784, 7)
    chosen = torch.randint(12, (2, 128), generator=seeded(3))  # there are 12 images, drawn with replacement
    expected = [
        nn.functional.cross_entropy(network(data.train_images[rows].flatten(1) / 255.0), data.train_labels[rows])
        for network, rows in zip(networks(problem, {k: v.float() for k, v in params.items()}), chosen, strict=True)
    ]
    losses = instances.loss(params, generator=seeded(3)).float()
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)


def test_unroll_of_it() -> None:
    instances = digits(hidden=(5,)).sample(BATCH)
    rule = CoordinatewiseLSTM(2, LogAndSign(5.0))
    run = unroll(rule, instances, 3, generator=seeded(1), second_derivatives=True, backend="reference")
    run.loss.backward()  # type: ignore[no-untyped-call]
    assert run.losses.shape == (4, BATCH)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in rule.parameters())


@pytest.mark.parametrize(("given", "hidden"), [(5, (5,)), ((5,), (5,)), ([5, 4], (5, 4)), ((), ())])
def test_hidden_layers_as_a_number_or_a_sequence(given: object, hidden: tuple[int, ...]) -> None:
    problem = ImageClassifier("digits", hidden=given)  # type: ignore[arg-type]
    assert problem.hidden == hidden
    assert problem == ImageClassifier("digits", hidden=hidden)
    assert repr(problem).startswith(f"ImageClassifier(dataset='digits', hidden={hidden}, activation='sigmoid'")


def test_device() -> None:
    """Everything is made on it, with the random numbers of the generator's own device."""
    instances = digits().sample(BATCH, device="meta")
    params = instances.init(generator=seeded(0))
    assert {tensor.device.type for tensor in params.values()} == {"meta"}
    assert instances.loss(params, generator=seeded(0)).device.type == "meta"
    assert instances.evaluate(params).device.type == "meta"


def test_a_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        instances = digits().sample(BATCH, device="cpu")
        params = instances.init(generator=seeded(0))
        loss = instances.loss(params, generator=seeded(1))
    assert loss.device.type == "cpu"
    assert loss.isfinite().all()


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known data sets: 'mnist', 'digits'"):
        ImageClassifier("cifar")
    for hidden, said in ((0, "0"), ((20, -1), "-1")):
        with pytest.raises(ValueError, match=f"hidden must be at least 1, got {said}"):
            ImageClassifier("digits", hidden=hidden)  # type: ignore[arg-type]
    for wrong, said in ((2.5, "2.5"), ("20", "'20'"), ((20, True), "True"), (None, "None")):
        with pytest.raises(TypeError, match=f"hidden must be an int, got {said}"):
            ImageClassifier("digits", hidden=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minibatch must be at least 1, got 0"):
        digits(minibatch=0)
    with pytest.raises(TypeError, match=r"minibatch must be an int, got 1\.5"):
        digits(minibatch=1.5)
    known = "'sigmoid', 'relu', 'tanh', 'elu'"
    with pytest.raises(ValueError, match=f"unknown activation 'gelu'; known activations: {known}"):
        digits(activation="gelu")
    for number in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"init_std must be finite and positive, got {number}"):
            digits(init_std=number)
    with pytest.raises(TypeError, match="init_std must be a number, got '1'"):
        digits(init_std="1")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        digits().sample(0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden'"):
        digits(hiden=3)
