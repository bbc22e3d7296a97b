"""Branch-Train-MiX (arXiv 2403.07816) on Megatron-Core."""

__version__ = "0.1.0"
