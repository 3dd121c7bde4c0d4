"""A small transformer in the Trainer of transformers: python docs/examples/with_trainer.py (extra: examples).

No shipped rule was trained on transformers, so lr shortens the updates; this shows the wiring and recommends nothing.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import l2l_fast

VOCABULARY, LENGTH = 32, 16

set_seed(0)
starts, strides = torch.randint(VOCABULARY, (2, 1024, 1))
tokens = (starts + strides % 4 * torch.arange(LENGTH)) % VOCABULARY  # to be continued: 3, 5, 7, ...
data = [{"input_ids": row, "labels": row} for row in tokens]

model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
)
optimizer = l2l_fast.LearnedOptimizer(model.parameters(), rule="mnist", lr=0.1)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=100,
            per_device_train_batch_size=32,
            logging_steps=10,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data,
        optimizers=(optimizer, None),  # the Trainer adds its linear schedule
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} in {trainer.state.global_step} steps")
