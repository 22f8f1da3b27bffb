"""From a plan to Megatron-Core's machinery: model, DDP, distributed optimizer, learning-rate schedule."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_cppo.plan import Plan
from megatron_cppo.policy import weights
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.model import VisionLanguageModel, decoder_config
from megatron_cppo.policy.quantized import forget_exact
from megatron_cppo.policy.vision import Pixels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, slots=True)
class Trained:
    """This rank's part of the model, wrapped for gradient reduction, and what updates it.

    A stage is one chunk, or several under a virtual pipeline, in the order of the model; the ranks of the first stage
    hold the vision tower in their first chunk, those of the last the head in their last.
    """

    chunks: tuple[VisionLanguageModel, ...]
    wrapped: tuple[DistributedDataParallel, ...]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler

    @property
    def groups(self) -> Groups:
        """The layout's process groups."""
        return self.chunks[0].groups

    @property
    def shape(self) -> ModelShape:
        """The model's numbers."""
        return self.chunks[0].shape

    @property
    def config(self) -> TransformerConfig:
        """Megatron-Core's config, which the chunks share."""
        return self.chunks[0].config

    @property
    def device(self) -> torch.device:
        """Where tensors are."""
        return self.chunks[0].device

    def forget_features(self) -> None:
        """Let go of what a frozen tower has encoded: at the end of a step."""
        for chunk in self.chunks:
            if chunk.kept is not None:
                chunk.kept.clear()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all chunks."""
        return itertools.chain.from_iterable(chunk.parameters() for chunk in self.chunks)


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
    """Build this rank's chunks, load the checkpoint into them, and make their optimizer. Called by all ranks."""
    chunks = make_chunks(plan, model=model, policy=policy, pixels=pixels, groups=groups, device=device)
    weights.load(chunks, model.path)
    return make_trained(plan, chunks, policy=policy, optimizer=optimizer)


def make_chunks(
    plan: Plan,
    *,
    model: ModelConfig,
    policy: PolicyConfig,
    pixels: Pixels,
    groups: Groups,
    device: torch.device,
) -> tuple[VisionLanguageModel, ...]:
    """This rank's chunks, with uninitialised weights. Called by all ranks."""
    config = decoder_config(plan.shape, policy, layers_per_chunk=plan.layers_per_chunk)
    return tuple(
        VisionLanguageModel(
            plan.shape,
            config=config,
            model=model,
            padded_vocab_size=plan.padded_vocab_size,
            pixels=pixels,
            groups=groups,
            device=device,
            chunk=number if policy.virtual_pipeline > 1 else None,
            recompute_vision=policy.recompute_vision,
            kernels=policy.device == "cuda" and policy.attention == "default",
        )
        for number in range(policy.virtual_pipeline)
    )


def make_trained(
    plan: Plan, chunks: tuple[VisionLanguageModel, ...], *, policy: PolicyConfig, optimizer: OptimizerConfig
) -> Trained:
    """The gradient buffers, optimizer and schedule of chunks whose weights are there. Called by all ranks."""
    config, groups = chunks[0].config, chunks[0].groups
    wrapped = tuple(
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                # The head's gradient never passes autograd (`policy/head.py`), which overlapping waits for.
                overlap_grad_reduce=False,
                use_distributed_optimizer=policy.distributed_optimizer,
                fp8_param_gather=config.fp8_param,
            ),
            chunk,
            pg_collection=groups.collection,
        )
        for chunk in chunks
    )
    adam = MegatronOptimizerConfig(**adam_settings(optimizer, policy, config))
    stepper = get_megatron_optimizer(
        adam,
        list(wrapped),
        config_overrides=get_standard_config_overrides(adam),
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    for chunk in chunks:
        forget_exact(chunk.parameters())
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
    return Trained(chunks=chunks, wrapped=wrapped, optimizer=stepper, schedule=schedule)


def adam_settings(optimizer: OptimizerConfig, policy: PolicyConfig, config: TransformerConfig) -> dict[str, Any]:
    """What Megatron-Core's OptimizerConfig is made of. In bf16, the moments are of Transformer Engine's Adam."""
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": optimizer.learning_rate,
        "min_lr": optimizer.min_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_eps": optimizer.epsilon,
        "clip_grad": optimizer.max_grad_norm,
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "use_distributed_optimizer": policy.distributed_optimizer,
        "fp8_recipe": config.fp8_recipe if config.fp8 else None,
    }
    if optimizer.state_precision == "fp32":
        return settings
    return settings | {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        # Else a master weight is the 16 bits that its bf16 weight lacks, and no checkpoint's number.
        "store_param_remainders": False,
    }
