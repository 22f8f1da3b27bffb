"""Qwen3-VL-8B on ViRL39K, with the paper's hyper-parameters for 7B.

    python -m megatron_cppo.train examples/qwen3_vl_8b.py --vllm.python /path/to/vllm-env/bin/python

Hardware: 8 H100 (80 GB), one machine. Layout: TP4 x DP2; four vLLM servers of two GPUs.
GiB of a GPU: update 43.5, rollouts 66.9; 16% to spare (fake tensors and allowances, docs/sizing.md).
A step: 159 s or more (estimate, not measured).
"""

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig


def config() -> Config:
    """The run."""
    return paper_config(
        "Qwen3-VL-8B-Instruct",
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
