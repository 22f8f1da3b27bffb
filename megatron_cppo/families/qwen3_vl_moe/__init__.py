"""Qwen3-VL with experts in every layer; all else is that of the dense one (arXiv 2511.21631)."""
