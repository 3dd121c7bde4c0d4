"""Meta-training: the unroll and the trainer."""
