"""Qwen3-VL, dense: normed queries and keys, interleaved m-rope, deepstack features (arXiv 2511.21631)."""
