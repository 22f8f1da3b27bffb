"""Qwen2.5-VL: window attention in the tower, biased queries, keys and values, chunked m-rope (arXiv 2502.13923)."""
