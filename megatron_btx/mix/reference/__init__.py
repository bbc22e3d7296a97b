"""The second implementation: every rule of a mix by plain loops, for ``btx verify``."""
