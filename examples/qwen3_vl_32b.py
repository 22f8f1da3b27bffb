"""Qwen3-VL-32B on ViRL39K.

    python -m megatron_cppo.train examples/qwen3_vl_32b.py --vllm.python /path/to/vllm-env/bin/python \\
        --vllm.host 0.0.0.0

Hardware: 32 H100 (80 GB), four machines. Layout: TP8 x PP2 x DP2, fewer layers on the first stage, which has the
vision tower; four vLLM servers of eight GPUs.
GiB of a GPU: update 36.9–42.2, rollouts 62.8–66.0; 17% to spare (fake tensors and allowances, docs/sizing.md).
A step: 158 s or more (estimate, not measured).
The paper stops at 7B: its numbers are kept, but for four updates a step instead of eight, so that each has rows enough
to fill the pipeline.
"""

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig


def config() -> Config:
    """The run."""
    return paper_config(
        "Qwen3-VL-32B-Instruct",
        num_gpus=32,
        policy=PolicyConfig(
            tensor_parallel=8,
            sequence_parallel=True,
            pipeline_parallel=2,
            layers_per_stage=(29, 35),
            recompute="full",
            recompute_vision=True,
            max_tokens_per_microbatch=16_384,
        ),
        engine_gpus=8,
        engine_share=0.3,
        updates_per_step=4,
    )
