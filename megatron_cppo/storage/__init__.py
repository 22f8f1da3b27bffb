"""Checkpoints as files: Hugging Face folders, Megatron's torch_dist folders, and what makes either whole or absent."""
