"""A LightningModule on scikit-learn's digits: python docs/examples/with_lightning.py (extras: cli, examples)."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import l2l_fast
from l2l_fast import datasets


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
        for param in self.layers.parameters():
            nn.init.normal_(param, std=0.01)  # as the rule was trained
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.layers(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return l2l_fast.LearnedOptimizer(self.parameters(), rule="digits")


lightning.seed_everything(0)
digits = datasets.load("digits")
data = TensorDataset(digits.train_images.flatten(1) / digits.largest, digits.train_labels)
model = Classifier()
trainer = lightning.Trainer(
    max_steps=100,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(model, DataLoader(data, batch_size=128, shuffle=True))

print(f"the loss fell from {model.losses[0]:.3f} to {model.losses[-1]:.3f} in {len(model.losses)} steps")
