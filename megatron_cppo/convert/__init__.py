"""Offline conversion and comparison of checkpoints, Hugging Face's and Megatron's: no model, no process group."""
