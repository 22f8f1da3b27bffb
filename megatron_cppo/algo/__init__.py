"""The algorithm in plain tensors: statistics, mask, losses, advantages. Knows no model, no engine and no Megatron."""
