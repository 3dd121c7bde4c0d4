"""Accelerate with accumulated, clipped gradients: python docs/examples/with_accelerate.py (extras: cli, examples)."""

import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import l2l_fast
from l2l_fast import datasets

STEPS, PARTS = 100, 2

set_seed(0)
digits = datasets.load("digits")
data = TensorDataset(digits.train_images.flatten(1) / digits.largest, digits.train_labels)
model = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
for param in model.parameters():
    nn.init.normal_(param, std=0.01)  # as the rule was trained

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
optimizer = l2l_fast.LearnedOptimizer(model.parameters(), rule="digits")
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=STEPS)
loader = DataLoader(data, batch_size=128 // PARTS, shuffle=True, drop_last=True)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

batches = (batch for _ in itertools.count() for batch in loader)
losses: list[float] = []
while len(losses) < STEPS:
    images, labels = next(batches)
    with accelerator.accumulate(model):
        loss = nn.functional.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps")
