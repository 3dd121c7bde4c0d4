"""A program that trains, and trains again from a checkpoint half-way, in the framework that its argument names.

Apart from the tests, as frameworks warn and leave things in the process. Prints the largest difference of a parameter.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import l2l_fast

x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
y = x.sum(1, keepdim=True)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def make_optimizer(model: nn.Module) -> l2l_fast.LearnedOptimizer:
    return l2l_fast.LearnedOptimizer(model.parameters(), rule="digits", state_dtype=torch.float16)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def with_lightning(folder: Path, resume: bool) -> Tensor:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self)

    def fit(epochs: int, checkpoint: Path | None) -> Tensor:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16), ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / f"{epochs}.ckpt")
        return flat(module)

    if not resume:
        fit(1, None)
    return fit(2, folder / "1.ckpt" if resume else None)


def with_accelerate(folder: Path, resume: bool) -> Tensor:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = make_net()
    model, optimizer = accelerator.prepare(net, make_optimizer(net))
    if resume:
        accelerator.load_state(folder)
    for step in range(4 if resume else 0, 8):
        if step == 4 and not resume:
            accelerator.save_state(folder)
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    return flat(model)


def with_trainer(folder: Path, resume: bool) -> Tensor:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    model = Model()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=8, per_device_train_batch_size=16, save_steps=4, report_to="none", use_cpu=True
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        optimizers=(make_optimizer(model), None),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return flat(model)


FRAMEWORKS = {"lightning": with_lightning, "accelerate": with_accelerate, "trainer": with_trainer}

if __name__ == "__main__":
    run = FRAMEWORKS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as name:
        whole, resumed = (run(Path(name), resume) for resume in (False, True))
    moved = (whole - flat(make_net())).abs().max().item()
    assert moved > 0.01, f"the training moved the parameters by {moved} only"
    print((whole - resumed).abs().max().item())
