"""From a plan to Megatron-Core's machinery: model, DDP, distributed optimizer, learning-rate schedule."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from megatron_cppo.config import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_cppo.plan import Plan
from megatron_cppo.policy import weights
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.model import VisionLanguageModel, decoder_config
from megatron_cppo.policy.vision import Pixels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, slots=True)
class Trained:
    """The model, wrapped for gradient reduction, and what updates it."""

    model: VisionLanguageModel
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def build(
    plan: Plan,
    *,
    model: ModelConfig,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    pixels: Pixels,
    groups: Groups,
    device: torch.device,
) -> Trained:
    """Build this rank's stage, load the checkpoint into it, and make its optimizer. Called by all ranks."""
    network = VisionLanguageModel(
        plan.shape,
        config=decoder_config(plan.shape, policy, layers_per_stage=plan.layers_per_stage),
        model=model,
        padded_vocab_size=plan.padded_vocab_size,
        pixels=pixels,
        groups=groups,
        device=device,
    )
    weights.load(network, model.path)
    wrapped = DistributedDataParallel(
        network.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=policy.distributed_optimizer,
        ),
        network,
        pg_collection=groups.collection,
    )
    adam = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.max_grad_norm,
        bf16=network.config.bf16,
        params_dtype=network.config.params_dtype,
        use_distributed_optimizer=policy.distributed_optimizer,
    )
    stepper = get_megatron_optimizer(
        adam,
        [wrapped],
        config_overrides=get_standard_config_overrides(adam),
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    schedule = OptimizerParamScheduler(
        stepper,
        init_lr=0.0,
        max_lr=optimizer.learning_rate,
        min_lr=min(optimizer.min_learning_rate, optimizer.learning_rate),
        lr_warmup_steps=optimizer.warmup_updates,
        lr_decay_steps=plan.num_updates + 1,  # the last update still has a rate above the minimum
        lr_decay_style=optimizer.decay,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=plan.num_updates,
        wd_incr_style="constant",
        override_opt_param_scheduler=False,
    )
    return Trained(model=network, wrapped=wrapped, optimizer=stepper, schedule=schedule)
