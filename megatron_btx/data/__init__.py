"""From text to Megatron's datasets."""
