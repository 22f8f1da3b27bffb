"""One module per model family: its vision tower, its decoder's config, and its mapping to Hugging Face names."""
