"""Qwen2.5-VL-72B on ViRL39K.

    python -m megatron_cppo.train examples/qwen2_5_vl_72b.py --vllm.python /path/to/vllm-env/bin/python \\
        --vllm.host 0.0.0.0

Hardware: 128 H100 (80 GB), sixteen machines. Layout: TP8 x PP4 x DP4, fewer layers on the first stage, which has the
vision tower; sixteen vLLM servers of eight GPUs. bf16; `policy.precision` below is where another goes.
GiB of a GPU: update 31.7–40.1, rollouts 61.4–66.0; 18% to spare (fake tensors and allowances, docs/sizing.md).
A step: 125 s or more (estimate, not measured).
The paper stops at 7B: its numbers are kept, but for four updates a step instead of eight, so that each has rows enough
to fill the pipeline.
"""

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig


def config() -> Config:
    """The run."""
    return paper_config(
        "Qwen2.5-VL-72B-Instruct",
        num_gpus=128,
        policy=PolicyConfig(
            tensor_parallel=8,
            sequence_parallel=True,
            pipeline_parallel=4,
            layers_per_stage=(17, 21, 21, 21),
            precision="bf16",
            recompute="full",
            recompute_vision=True,
            max_tokens_per_microbatch=16_384,
        ),
        engine_gpus=8,
        engine_share=0.31,
        updates_per_step=4,
    )
