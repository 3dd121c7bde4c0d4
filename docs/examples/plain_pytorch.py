"""A plain training loop on scikit-learn's digits: python docs/examples/plain_pytorch.py (extra: cli)."""

import torch
from torch import nn

import l2l_fast
from l2l_fast import datasets

STEPS, MINIBATCH = 100, 128

torch.manual_seed(0)
digits = datasets.load("digits")
images = digits.train_images.flatten(1) / digits.largest
labels = digits.train_labels

model = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
for param in model.parameters():
    nn.init.normal_(param, std=0.01)  # as the rule was trained

optimizer = l2l_fast.LearnedOptimizer(model.parameters(), rule="digits")
losses = []
for _ in range(STEPS):
    batch = torch.randint(len(images), (MINIBATCH,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps")
