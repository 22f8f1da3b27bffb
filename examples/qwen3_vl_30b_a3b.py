"""Qwen3-VL-30B-A3B (128 experts, eight a token) on ViRL39K.

    python -m megatron_cppo.train examples/qwen3_vl_30b_a3b.py --vllm.python /path/to/vllm-env/bin/python \\
        --vllm.host 0.0.0.0

Hardware: 32 H100 (80 GB), four machines. Layout: TP4 x PP2 x DP4, EP8 within a machine, fewer layers on the first
stage, which has the vision tower; eight vLLM servers of four GPUs.
GiB of a GPU: update 34.4–41.3, rollouts 60.1–63.8; 20% to spare (fake tensors and allowances, docs/sizing.md).
A step: 76 s or more (estimate, not measured).
The paper has no such model: its numbers are kept, but for four updates a step instead of eight, so that each has rows
enough to fill the pipeline.
"""

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig


def config() -> Config:
    """The run."""
    return paper_config(
        "Qwen3-VL-30B-A3B-Instruct",
        num_gpus=32,
        policy=PolicyConfig(
            tensor_parallel=4,
            sequence_parallel=True,
            expert_parallel=8,
            pipeline_parallel=2,
            layers_per_stage=(23, 25),
            recompute="full",
            recompute_vision=True,
            max_tokens_per_microbatch=16_384,
        ),
        engine_gpus=4,
        engine_share=0.33,
        updates_per_step=4,
    )
