"""The policy network: vision tower and embedding on the first stage, Megatron-Core decoder, head's weight on the last.

Knows nothing of losses: it turns a packed row into hidden states (`head.py` turns those into token statistics).
Legend: T tokens of the row, C those of this context rank, L those of this rank between layers, H hidden size,
V vocabulary of this shard, F image tokens, K deepstack features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import warnings
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-Core warns at import that TE and Apex are absent; so they are
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cppo import families
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError, ModelConfig, PolicyConfig
from megatron_cppo.families import towers
from megatron_cppo.policy.attention import Deepstack, segments
from megatron_cppo.policy.groups import Groups, expert_tensor_parallel
from megatron_cppo.policy.layers import decoder_spec, rope_angles, where_rope_looks
from megatron_cppo.policy.quantized import is_quantized
from megatron_cppo.policy.split import Split
from megatron_cppo.policy.vision import Encoder, Handover, Kept, Pixels
from megatron_cppo.precision import PRECISIONS
from megatron_cppo.types import MicroBatch

_NOT_OVERRIDDEN = ("num_moe", "moe_", "mtp_", "fp4")
"""Losses and buffers of their own, which would be scaled by the cut of the rows, or be in no export."""


def _overrides(pairs: tuple[str, ...], taken: dict[str, Any]) -> dict[str, Any]:
    """Parse `policy.megatron_overrides`; raises ConfigError for an unknown name or one that is set elsewhere."""
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found or name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; perhaps {near[0]}" if near else ""
            raise ConfigError(f"policy.megatron_overrides: {pair!r} is no name=value of TransformerConfig{hint}")
        if name in taken:
            raise ConfigError(f"policy.megatron_overrides: {name} follows from other fields; set those instead")
        if name.endswith("_parallel_size") or name.startswith(_NOT_OVERRIDDEN):
            raise ConfigError(f"policy.megatron_overrides: {name} is not supported yet; leave it out")
        values[name] = _parse(text)
    return values


def _parse(text: str) -> object:
    """true, false, none, an integer, a number, else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def decoder_config(shape: ModelShape, policy: PolicyConfig, *, layers_per_chunk: tuple[int, ...]) -> TransformerConfig:
    """Megatron-Core's config of the decoder, for `policy`'s layout. Nothing but what correctness needs is switched."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[policy.precision].dtype)
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[policy.recompute]
    settings: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_size,
        "layernorm_epsilon": shape.norm_epsilon,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": policy.tensor_parallel,
        "context_parallel_size": policy.context_parallel,
        "expert_model_parallel_size": policy.expert_parallel,
        "expert_tensor_parallel_size": expert_tensor_parallel(policy),
        "pipeline_model_parallel_size": policy.pipeline_parallel,
        "pipeline_model_parallel_layout": _stages(layers_per_chunk),
        "sequence_parallel": policy.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        **_fp8(policy),
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # the default one refuses variable lengths, even without experts
        **_interleaved(policy),
        "calculate_per_token_loss": True,
        "use_cpu_initialization": policy.device == "cpu",
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        **recompute,
        **families.part(shape.family, "decoder").settings(shape),
    }
    return TransformerConfig(**settings, **_overrides(policy.megatron_overrides, settings))


def _fp8(policy: PolicyConfig) -> dict[str, Any]:
    """The decoder's layers multiply in FP8, but for the first and the last where the recipe allows it (one each, unless
    overridden); tower, embedding and head know nothing of it, and attention stays in bf16.
    """
    recipe = PRECISIONS[policy.precision].recipe
    if recipe is None:
        return {"fp8": None}
    settings: dict[str, Any] = {"fp8": recipe.format, "fp8_recipe": recipe.name}
    if recipe.bf16_ends:
        return settings | {"first_last_layers_bf16": True}
    # Rows differ: the largest number of many passes, not of the last one alone. Passes without gradient add none.
    return settings | {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}


def _interleaved(policy: PolicyConfig) -> dict[str, Any]:
    """What the interleaved schedule needs: with two stages the next is also the previous one, and in one batch of
    messages to it, which Megatron-Core sends by default, activations and gradients would be taken for each other.
    """
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False} if policy.virtual_pipeline > 1 else {}


def _stages(layers: tuple[int, ...]) -> list[list[str]] | None:
    """Megatron-Core's description of the stages or their chunks, in the order of the model; None for a single one."""
    if len(layers) == 1:
        return None
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


class VisionLanguageModel(MegatronModule):
    """One stage of the policy, or one of a stage's chunks under a virtual pipeline: `language_model`, and on the first
    `visual`.

    With tied embeddings the last of several stages holds a copy, which Megatron-Core keeps equal: the copies'
    gradients are summed, and `shared` ones count once in the gradient norm.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        config: TransformerConfig,
        model: ModelConfig,
        padded_vocab_size: int,
        pixels: Pixels,
        groups: Groups,
        device: torch.device,
        chunk: int | None = None,
        recompute_vision: bool = False,
        kernels: bool = False,
    ) -> None:
        """`chunk` is the virtual pipeline's; None without one. `kernels`: attention is Transformer Engine's."""
        super().__init__(config)
        self.vp_stage = chunk  # the schedules compare it with theirs
        self.shape, self.groups, self.device = shape, groups, device
        last = (config.virtual_pipeline_model_parallel_size or 1) - 1
        self.pre_process = groups.is_first_stage and (chunk or 0) == 0
        self.post_process = groups.is_last_stage and (chunk is None or chunk == last)
        self.share_embeddings_and_output_weights = shape.tied
        self.model_type = ModelType.encoder_or_decoder
        self._kernels = kernels
        self._rope_axes = families.part(shape.family, "decoder").rope_axes(shape)
        self.kept = None if model.train_vision else Kept()
        """What a frozen tower has encoded in this step."""
        if self.pre_process:
            self.visual = families.part(shape.family, "vision").tower(model.path, device=device)
            self.visual.requires_grad_(model.train_vision)
            if recompute_vision:
                towers.recompute(self.visual)
            self._encoder = Encoder(
                tower=self.visual,
                pixels=pixels,
                ranks=groups.tensor_context,
                sharers=groups.tensor_context if config.sequence_parallel else groups.context,
                num_features=1 + len(shape.vision.deepstack_depths),
                kept=self.kept,
            )
        num_layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=groups.pipeline.rank())
        self.language_model = GPTModel(
            config,
            decoder_spec(config, num_layers, kernels=kernels),
            padded_vocab_size,
            max_sequence_length=0,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="none",
            pg_collection=groups.collection,
            vp_stage=chunk,
        )
        for parameter in self.parameters():
            # Parameters only: the towers' fp32 buffers (rotary frequencies) keep their precision.
            if not is_quantized(parameter):
                parameter.data = parameter.data.to(device=device, dtype=config.params_dtype)

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """The hidden states of the previous stage (called by Megatron-Core's schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight that tied stages share (called by Megatron-Core's embedding gradient all-reduce)."""
        return self.language_model.shared_embedding_or_output_weight()

    def head_weight(self) -> Tensor:
        """The head's weight shard [V, H], on the last stage."""
        if self.shape.tied:
            return self.language_model.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight

    def forward(self, row: MicroBatch) -> Tensor:
        """Hidden states [L, 1, H] of this rank's tokens of a packed row; on the last stage after the final norm.

        Communicates over TP and CP.
        """
        context, parallel = self.groups.context, self.config.sequence_parallel
        split = Split.of(row.cu_seqlens_S, self.groups, sequence_parallel=parallel)
        parameters = segments(row.cu_seqlens_S, row.max_seqlen, context, self.device, kernels=self._kernels)
        embedded_L1H = None
        if self.pre_process:
            embedded_L1H, parameters.deepstack = self._embed(row, split)
        angles = rope_angles(
            row.positions_3T[:, split.context_C].to(self.device),
            head_size=self.shape.head_size,
            theta=self.shape.rope_theta,
            axes=self._rope_axes,
        )
        return self.language_model.decoder(
            hidden_states=embedded_L1H,
            attention_mask=None,
            rotary_pos_emb=where_rope_looks(angles, context),
            packed_seq_params=parameters,
        )

    def _embed(self, row: MicroBatch, split: Split) -> tuple[Tensor, tuple[Deepstack, ...]]:
        """Embeddings [L, 1, H] of this rank's tokens, images in their places, and what later layers will add."""
        ids_1C = row.token_ids_T[split.context_C].to(self.device)[None]
        embedded_L1H = self.language_model.embedding(input_ids=ids_1C, position_ids=None)
        if not row.images:
            return embedded_L1H, ()
        features_FKH = self._encoder(row.images, row.grids)
        chosen, places = (index.to(self.device) for index in split.local(row.feature_slots_F))
        rows = row.feature_rows_F.to(self.device)[chosen]
        first_FH, *deeper = features_FKH.index_select(0, rows).to(embedded_L1H.dtype).unbind(1)
        embedded_L1H = embedded_L1H.index_copy(0, places, first_FH[:, None])
        if not deeper:
            return embedded_L1H, ()
        proxies = [features.detach().requires_grad_(features.requires_grad) for features in deeper]
        embedded_L1H = Handover.apply(embedded_L1H, proxies, *deeper)
        return embedded_L1H, tuple(Deepstack(places, proxy) for proxy in proxies)
