"""Checkpoints as named tensors, and everything done to them as a plan.

A source answers "give me this box of that tensor"; an expression says what a tensor is made of; a
plan gives every target its expression and accounts for every source tensor; a sink takes boxes.
Nothing is imported here: a manifest is read without torch.
"""
