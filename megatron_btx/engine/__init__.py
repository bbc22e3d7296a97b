"""All that touches Megatron-Core."""
