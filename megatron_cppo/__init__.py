"""megatron_cppo: perception-aware reinforcement learning of vision-language models on Megatron-Core.

Read in this order: `examples/digits_demo.py`, `loop.py`, `algo/objective.py`, then `policy/`.
"""

__version__ = "0.1.0"
