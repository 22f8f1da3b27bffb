"""An independent CPPO: Hugging Face's own model, one sample and one view at a time, autograd, the vocabulary whole.

Written from the paper's equations, with Python loops, nothing shared with `megatron_cppo.algo`. All three views of
every sample are computed; the gate multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from megatron_cppo.types import Sample, View
from tests.distributed import tiny_model


def load(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def response_logits(model: Any, sample: Sample, view: View) -> Tensor:
    """Logits [tokens, V] that predict the response, from Hugging Face's full forward pass."""
    prompt = sample.prompt
    ids = torch.tensor([prompt.token_ids + sample.token_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if prompt.grids:
        is_image = torch.zeros_like(ids)
        is_image[0, list(prompt.image_slots)] = 1
        inputs |= {
            "pixel_values": torch.cat([tiny_model.pixels(key) for key in prompt.images(view)]).to(model.dtype),
            "image_grid_thw": torch.tensor([(g.frames, g.height, g.width) for g in prompt.grids]),
            "mm_token_type_ids": is_image,
        }
    return model(**inputs).logits[0, len(prompt.token_ids) - 1 : -1]


def log_softmax(logits: Tensor, banned: Sequence[int]) -> Tensor:
    masked = logits.clone()
    masked[:, list(banned)] = -math.inf
    return masked.log_softmax(-1)


def _statistics(model: Any, sample: Sample, view: View) -> tuple[Tensor, Tensor, Tensor]:
    logp_NV = log_softmax(response_logits(model, sample, view), tiny_model.BANNED)
    logp_N = logp_NV.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    finite = torch.where(logp_NV.isinf(), torch.zeros_like(logp_NV), logp_NV)
    return logp_N, -(logp_NV.exp() * finite).sum(1), finite


def _constant(statistics: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logp_N, entropy_N, logp_NV = statistics
    return logp_N.detach(), entropy_N.detach(), logp_NV.detach()


def _k3(original: Tensor, view: Tensor) -> Tensor:
    d = (view - original).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def _divergence(kind: str, original: tuple[Tensor, Tensor, Tensor], view: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    if kind == "exact":
        keep = torch.ones(original[2].shape[1], dtype=torch.bool)
        keep[list(tiny_model.BANNED)] = False
        p, q = original[2][:, keep], view[2][:, keep]
        return (p.exp() * (p - q)).sum(1)
    if kind == "k1":
        return (original[0] - view[0]).clamp(-10, 10)
    return _k3(original[0], view[0])


def _mask(h: Tensor, h_removing: Tensor, settings: PerceptionConfig) -> list[int]:
    shift = [b - a for a, b in zip(h.tolist(), h_removing.tolist(), strict=True)]
    candidates = [t for t, value in enumerate(shift) if value > settings.min_entropy_shift]
    if not candidates:
        return []
    score = [
        max(value, 0.0) / (b + 1e-6) if settings.rank_by == "relative" else max(value, 0.0)
        for value, b in zip(shift, h_removing.tolist(), strict=True)
    ]
    k = max(1, math.floor(settings.top_fraction * len(candidates)))
    threshold = sorted((score[t] for t in candidates), reverse=True)[k - 1]
    return [t for t in candidates if score[t] >= threshold]


def _correction(old: Tensor, engine: Tensor, settings: AlgorithmConfig) -> list[float]:
    gaps = [a - b for a, b in zip(old.tolist(), engine.tolist(), strict=True)]
    level, cut = settings.correction.split("_")
    weights = [math.exp(sum(gaps) if level == "sequence" else gap) for gap in gaps]
    bound = settings.correction_bound
    if cut == "truncate":
        return [min(weight, bound) for weight in weights]
    return [weight if 1 / bound <= weight <= bound else 0.0 for weight in weights]


def objective(
    model: Any,
    samples: Sequence[Sample],
    algorithm: AlgorithmConfig,
    perception: PerceptionConfig,
    old_logp: Sequence[Tensor] | None = None,
    reference_logp: Sequence[Tensor] | None = None,
    engine_logp: Sequence[Tensor] | None = None,
) -> Tensor:
    """The whole loss of a mini-batch (token mean; CPL per gated sample), differentiable."""
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    gated = [sample.advantage > 0 and bool(sample.prompt.grids) for sample in samples]
    total = torch.zeros((), dtype=model.dtype)
    masked_tokens = []
    for index, sample in enumerate(samples):
        original = _statistics(model, sample, "original")
        removing = _statistics(model, sample, "removing")
        preserving = _statistics(model, sample, "preserving")
        if perception.stop_gradient_views:
            removing, preserving = _constant(removing), _constant(preserving)
        old = original[0].detach() if old_logp is None else old_logp[index].to(model.dtype)
        ratio = (original[0] - old).exp()
        clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        gain = torch.minimum(sample.advantage * ratio, sample.advantage * clipped)
        if engine_logp is not None:
            gain = gain * torch.tensor(_correction(old, engine_logp[index], algorithm), dtype=model.dtype)
        total = total - gain.sum() / num_tokens
        if reference_logp is not None:
            total = total + algorithm.beta * _k3(original[0], reference_logp[index].to(model.dtype)).sum() / num_tokens
        mask = _mask(original[1], removing[1], perception)
        d = _divergence(perception.divergence, original, preserving) - _divergence(
            perception.divergence, original, removing
        )
        tokens = torch.nn.functional.softplus(d / perception.temperature)[mask]
        if gated[index] and mask:
            masked_tokens.append(tokens)
    if masked_tokens:
        if perception.aggregation == "global":
            cpl = torch.cat(masked_tokens).mean()
        else:
            cpl = torch.stack([tokens.mean() for tokens in masked_tokens]).sum() / sum(gated)
        total = total + perception.coefficient * cpl
    return total


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of `loss` under official checkpoint names, an expert's matrices each by itself."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(by_official_name(found))


def by_official_name(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Copies of a Hugging Face module's tensors as the policy names them; experts are unstacked as transformers 5 has
    them: gate over up [2I, H], and down [H, I]."""
    from megatron_cppo.storage.hf_folder import disk_name

    for name, tensor in tensors.items():
        name = disk_name(name)
        layer, _, kind = name.rpartition(".")
        if not layer.endswith(".experts"):
            yield name, tensor.clone()
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if kind == "gate_up_proj":
                rows = matrix.shape[0] // 2
                parts = {"gate_proj": matrix[:rows], "up_proj": matrix[rows:]}
            for part, value in parts.items():
                yield f"{layer}.{expert}.{part}.weight", value.clone()
