"""Checkpoints as named tensors, and everything done to them as a plan."""
