"""Qwen2.5-VL-3B on ViRL39K, with the paper's hyper-parameters.

    python -m megatron_cppo.train examples/qwen2_5_vl_3b.py --vllm.python /path/to/vllm-env/bin/python

Hardware: 8 H100 (80 GB), one machine. Layout: DP8; each GPU has a whole model, and a vLLM server beside it.
GiB of a GPU: update 49.1, rollouts 67.1; 16% to spare (fake tensors and allowances, docs/sizing.md).
A step: 76 s or more (estimate, not measured).
"""

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig


def config() -> Config:
    """The run."""
    return paper_config(
        "Qwen2.5-VL-3B-Instruct",
        num_gpus=8,
        policy=PolicyConfig(recompute="full", recompute_vision=True, max_tokens_per_microbatch=16_384),
        engine_gpus=1,
        engine_share=0.35,
    )
