"""Qwen2.5-VL-7B on ViRL39K, with the paper's hyper-parameters.

    python -m megatron_cppo.train examples/qwen2_5_vl_7b.py --vllm.python /path/to/vllm-env/bin/python

Hardware: 8 H100 (80 GB), one machine. Layout: TP4 x DP2; four vLLM servers of two GPUs.
GiB of a GPU: update 42.8, rollouts 65.7; 18% to spare (fake tensors and allowances, docs/sizing.md).
A step: 150 s or more (estimate, not measured).
"""

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig


def config() -> Config:
    """The run."""
    return paper_config(
        "Qwen2.5-VL-7B-Instruct",
        num_gpus=8,
        policy=PolicyConfig(
            tensor_parallel=4,
            sequence_parallel=True,
            recompute="full",
            recompute_vision=True,
            max_tokens_per_microbatch=16_384,
        ),
        engine_gpus=2,
        engine_share=0.3,
    )
