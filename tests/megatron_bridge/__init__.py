"""Megatron-Bridge's directories: rebuilt for the suite (made.py), and the real thing (real.py)."""
