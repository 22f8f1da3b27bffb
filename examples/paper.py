"""What the recipes of published models have in common: the paper's run (arXiv 2601.00501) on ViRL39K.

A recipe says its model and its layout; all else is here. Models are looked for in models/, data in data/virl39k/, and
any field can be given on the command line. Rollouts are sampled by vLLM servers on the trainer's own GPUs.
"""

from __future__ import annotations

from megatron_cppo.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
    VllmConfig,
)

ROWS = 38_870
"""Of ViRL39K."""
PROMPTS, EPOCHS = 512, 2
INSTRUCTION = (
    "First think about the question, step by step, between <think> and </think>. Then give the final answer, and only "
    "it, inside \\boxed{}."
)


def paper_config(
    model: str,
    *,
    num_gpus: int,
    policy: PolicyConfig,
    engine_gpus: int,
    engine_share: float,
    updates_per_step: int = 8,
) -> Config:
    """CPPO as published for 3B and 7B: 512 prompts of 5 samples, 8 updates, beta and lambda 0.01, tau 0.1, T = 1.

    `engine_gpus` of a server, which takes `engine_share` of their memory while it is awake.
    """
    return Config(
        model=ModelConfig(path=f"models/{model}"),
        data=DataConfig(train=("data/virl39k/train.parquet",), instruction=INSTRUCTION, max_prompt_tokens=512),
        algorithm=AlgorithmConfig(objective="cppo", beta=0.01, clip_low=0.2, clip_high=0.2),
        perception=PerceptionConfig(coefficient=0.01, temperature=0.1, top_fraction=0.5),
        rollout=RolloutConfig(engine="vllm", samples_per_prompt=5, max_response_tokens=4096, temperature=1.0),
        vllm=VllmConfig(tensor_parallel=engine_gpus, arguments=(f"gpu-memory-utilization={engine_share}",)),
        policy=policy,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        trainer=TrainerConfig(
            run_dir=f"runs/{model}",
            num_gpus=num_gpus,
            num_steps=EPOCHS * ROWS // PROMPTS,
            prompts_per_step=PROMPTS,
            updates_per_step=updates_per_step,
            save_every_steps=10,
        ),
    )
