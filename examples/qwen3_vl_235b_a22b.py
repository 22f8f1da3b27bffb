"""Qwen3-VL-235B-A22B (128 experts, eight a token) on ViRL39K.

    python -m megatron_cppo.train examples/qwen3_vl_235b_a22b.py --vllm.addresses http://node17:8000 ... http://node24:8000

Hardware: 128 H100 (80 GB), sixteen machines, and eight for the vLLM servers (tools/serve_rollouts.py): in bf16 a
server of eight GPUs has 55 GiB of weights on each, which does not go beside the trainer. Rollouts are one step ahead.
Layout: TP4 x PP8 x DP4, EP16 over two machines, fewer layers on the first stage, which has the
vision tower.
GiB of a GPU: update 42.2–63.2, rollouts on other machines; 21% to spare (fake tensors and allowances, docs/sizing.md).
A step: 154 s or more (estimate, not measured).
The paper has no such model: its numbers are kept, but for two updates a step instead of eight, so that each has rows
enough to fill the pipeline.
"""

from dataclasses import replace

from examples.paper import paper_config
from megatron_cppo.config import Config, PolicyConfig, VllmConfig


def config() -> Config:
    """The run."""
    colocated = paper_config(
        "Qwen3-VL-235B-A22B-Instruct",
        num_gpus=128,
        policy=PolicyConfig(
            tensor_parallel=4,
            sequence_parallel=True,
            expert_parallel=16,
            pipeline_parallel=8,
            layers_per_stage=(11, 12, 12, 12, 12, 12, 12, 11),
            recompute="full",
            recompute_vision=True,
            max_tokens_per_microbatch=16_384,
        ),
        engine_gpus=8,
        engine_share=0.85,
        updates_per_step=2,
    )
    return replace(
        colocated,
        rollout=replace(colocated.rollout, max_staleness=1),
        vllm=VllmConfig(addresses=tuple(f"http://node{number}:8000" for number in range(17, 25)), tensor_parallel=8),
    )
