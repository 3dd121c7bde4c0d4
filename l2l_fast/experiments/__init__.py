"""What the command line runs: demonstrations, evaluations and the figures of the paper."""
