"""Model families: how a Hugging Face checkpoint and a Megatron one correspond."""
