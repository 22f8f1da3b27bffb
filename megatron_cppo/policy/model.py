"""The policy network: vision tower and embedding on the first stage, Megatron-Core decoder, head rows on the last.

Knows nothing of losses: it turns a packed row into hidden states, and hidden states into token statistics.
Legend: T tokens of the row, H hidden size, V vocabulary of this shard, N rows asked for, F image tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-Core warns at import that TE and Apex are absent; so they are
    from megatron.core import tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cppo.algo.vocab_parallel import linear_divergence, linear_statistics
from megatron_cppo.architecture import ModelShape
from megatron_cppo.config import ConfigError, ModelConfig, PolicyConfig
from megatron_cppo.policy import vision
from megatron_cppo.policy.groups import Groups
from megatron_cppo.policy.layers import decoder_spec, rope_angles, segments
from megatron_cppo.types import MicroBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def family(shape: ModelShape) -> Any:
    """The module of `shape`'s model family: RULES, DECODER, vision_tower."""
    return importlib.import_module(f"megatron_cppo.policy.models.{shape.family}")


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
        if name.endswith("_parallel_size") or name.startswith("num_moe"):
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


def decoder_config(shape: ModelShape, policy: PolicyConfig, *, layers_per_stage: tuple[int, ...]) -> TransformerConfig:
    """Megatron-Core's config of the decoder, for `policy`'s layout. Nothing but what correctness needs is switched."""
    dtype = DTYPES[policy.precision]
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
        "pipeline_model_parallel_size": policy.pipeline_parallel,
        "pipeline_model_parallel_layout": _stages(layers_per_stage),
        "sequence_parallel": policy.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # the default one refuses variable lengths, even without experts
        "calculate_per_token_loss": True,
        "use_cpu_initialization": policy.device == "cpu",
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        **recompute,
        **family(shape).DECODER,
    }
    return TransformerConfig(**settings, **_overrides(policy.megatron_overrides, settings))


def _stages(layers: tuple[int, ...]) -> list[list[str]] | None:
    """Megatron-Core's description of the stages; None for a single one."""
    if len(layers) == 1:
        return None
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


class VisionLanguageModel(MegatronModule):
    """One stage of the policy: `visual` (first stage) and `language_model`.

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
        pixels: vision.Pixels,
        groups: Groups,
        device: torch.device,
    ) -> None:
        super().__init__(config)
        self.shape, self.groups, self.pixels, self.device = shape, groups, pixels, device
        self.train_vision = model.train_vision
        self.pre_process = groups.is_first_stage
        self.post_process = groups.is_last_stage
        self.share_embeddings_and_output_weights = shape.tied
        self.model_type = ModelType.encoder_or_decoder
        if self.pre_process:
            self.visual = family(shape).vision_tower(model.path, device=device)
            self.visual.requires_grad_(model.train_vision)
        self.language_model = GPTModel(
            config,
            decoder_spec(get_num_layers_to_build(config, pp_rank=groups.pipeline.rank())),
            padded_vocab_size,
            max_sequence_length=0,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups.collection,
        )
        for parameter in self.parameters():
            # Parameters only: the towers' fp32 buffers (rotary frequencies) keep their precision.
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
        """Hidden states [T, 1, H] of a packed row after the final norm ([T / TP, 1, H] under sequence parallelism)."""
        embedded = self._embed(row) if self.pre_process else None
        angles = rope_angles(
            row.positions_3T.to(self.device),
            head_size=self.shape.head_size,
            theta=self.shape.rope_theta,
            section=self.shape.mrope_section,
        )
        return self.language_model.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=segments(row.cu_seqlens_S, row.max_seqlen, self.device),
        )

    def _embed(self, row: MicroBatch) -> Tensor:
        ids_1T = row.token_ids_T.to(self.device)[None]
        embedded_T1H = self.language_model.embedding(input_ids=ids_1T, position_ids=None)
        if row.images:
            features_FH = vision.encode(
                self.visual,
                row.images,
                row.grids,
                pixels=self.pixels,
                group=self.groups.tensor,
                trainable=self.train_vision,
            )
            features_FH = features_FH.index_select(0, row.feature_rows_F.to(self.device)).to(embedded_T1H.dtype)
            slots_F = row.feature_slots_F.to(self.device)
            embedded_T1H = embedded_T1H.index_copy(0, slots_F, features_FH[:, None])
        if self.config.sequence_parallel:
            embedded_T1H = tensor_parallel.scatter_to_sequence_parallel_region(embedded_T1H, group=self.groups.tensor)
        return embedded_T1H


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What turns logits into the distribution that was sampled from, and what computes with it."""

    temperature: float
    banned_ids: tuple[int, ...]
    backend: str


class Head:
    """Token statistics from the hidden states of one row, on vocabulary shards; what an objective calls.

    The hidden states enter the TP region once: its backward sums the ranks' partial gradients, by one collective.
    """

    def __init__(self, model: VisionLanguageModel, hidden_T1H: Tensor, settings: HeadSettings) -> None:
        group = model.groups.tensor
        if model.config.sequence_parallel:
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(hidden_T1H, group=group)
        else:
            hidden_T1H = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_T1H, group=group)
        self.hidden_TH = hidden_T1H[:, 0]
        self.weight_VH = model.head_weight()
        common: dict[str, Any] = {
            "group": group,
            "vocab_size": model.shape.vocab_size,
            "temperature": settings.temperature,
            "banned_ids": settings.banned_ids,
            "backend": settings.backend,
        }
        self._statistics = partial(linear_statistics, **common)
        self._divergence = partial(linear_divergence, **common)

    def statistics(self, rows_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of `targets_N` and entropies, [N] fp32, predicted at positions `rows_N` of the row."""
        return self._statistics(self.hidden_TH.index_select(0, rows_N), self.weight_VH, targets_N)

    def divergence(self, rows_N: Tensor, other_rows_N: Tensor, *, stop_gradient_other: bool) -> Tensor:
        """Exact KL [N] between the distributions at `rows_N` and at `other_rows_N`."""
        p_NH, q_NH = self.hidden_TH.index_select(0, rows_N), self.hidden_TH.index_select(0, other_rows_N)
        return self._divergence(p_NH, q_NH, self.weight_VH, stop_gradient_q=stop_gradient_other)
