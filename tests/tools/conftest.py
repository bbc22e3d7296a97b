"""The CPU must stand in for CUDA before any module of Megatron is imported."""

from megatron_btx.engine import cpu

cpu.install()
