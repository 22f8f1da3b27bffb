"""One rank of a large run in one process without its memory: fake tensors in a fake process group.

Owns what makes the policy's own modules run so. Weights, activations and gradients are shapes without values; rows'
bookkeeping (integers: ids, places, lengths) is real. What reads values is stood in for here, and for a GPU's recipe so
are the kernels that a CPU does not have. Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_cppo.policy import platform

_ATEN = torch.ops.aten
_COUNTERS = (_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step, _ATEN.full.default)
"""Factories whose dtype follows from their numbers."""


@contextlib.contextmanager
def world(rank: int, num_ranks: int) -> Iterator[None]:
    """This process as `rank` of so many, whose collectives give back what was put in. One at a time."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_cppo.policy import groups

    platform.activate("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        groups.destroy()
        dist.destroy_process_group()


@contextlib.contextmanager
def tensors(*, gpu: bool, kernels: bool = True, top_fraction: float = 1.0) -> Iterator[None]:
    """Within this context floats are fake, and integers real. `gpu`: kernels keep and make what a GPU's do.

    `kernels`: the decoder's attention is Transformer Engine's there; else PyTorch's, which is as it is on a CPU.
    `top_fraction`: that share of a row's tokens is what the perception mask picks.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_RealBookkeeping())
        stack.enter_context(_replaced(_values(top_fraction) | (_kernels(attention=kernels) if gpu else {})))
        yield


class _RealBookkeeping(TorchDispatchMode):
    """Runs for real what has only real tensors, and makes integers real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func in (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default):
                args = (args[0], _numbered(args[1]), *args[2:])
            if func is _ATEN.masked_select.default:
                func, args = _ATEN.index.Tensor, (args[0], _numbered(args[1:]))
            return func(*args, **kwargs)
        if given or _counts(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _counts(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a factory makes integers."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    return func in _COUNTERS and all(isinstance(number, int) for number in args if not isinstance(number, list))


def _numbered(indices: Any) -> Any:
    """Indices in which masks, whose number of hits a fake operation cannot know, are the places of their hits."""
    found = []
    for index in indices:
        masks = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype is torch.bool
        if masks:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


@contextlib.contextmanager
def _replaced(values: dict[tuple[Any, str], Any]) -> Iterator[None]:
    before = {(owner, name): owner.__dict__[name] for owner, name in values}
    for (owner, name), value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def _values(top_fraction: float) -> dict[tuple[Any, str], Any]:
    """What reads values: the router's choice of experts, the perception mask, and objects that are sent as bytes; and
    the reduction of gradients, which is in place."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_cppo.algo import objective

    routing = TopKRouter.routing

    def evenly(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probabilities, chosen = routing(self, logits, *args, **kwargs)
        with unset_fake_temporarily():
            tokens, experts = chosen.shape
            first_T1 = torch.arange(tokens)[:, None] * self.topk
            chosen = torch.zeros(tokens, experts, dtype=torch.bool)
            chosen.scatter_(1, (first_T1 + torch.arange(self.topk)) % experts, True)
        return probabilities, chosen

    def mask(entropy_N: Tensor, *_: Any, **__: Any) -> Tensor:
        with unset_fake_temporarily():
            return torch.arange(1, len(entropy_N) + 1) <= top_fraction * len(entropy_N)

    def gather_object(into: list[Any], mine: Any, *_: Any, **__: Any) -> None:
        into[:] = [mine] * len(into)

    return {
        (TopKRouter, "routing"): evenly,
        (objective, "perception_mask"): mask,
        (dist, "all_gather_object"): gather_object,
        # Coalesced, which fake tensors do not know; in place.
        (_ParamAndGradBucketGroup, "finish_grad_sync"): lambda *_, **__: None,
    }


def _kernels(*, attention: bool) -> dict[tuple[Any, str], Any]:
    """What runs otherwise on a GPU: the decoder's `attention`, the tower's, norms, the head's passes over a tile of
    logits."""
    from dataclasses import replace

    from megatron_cppo.algo import linear_products, linear_tiles, vocab_parallel
    from megatron_cppo.algo.kernels import Kernels
    from megatron_cppo.families import towers
    from megatron_cppo.policy import layers

    head = Kernels(
        view_sums=lambda views, targets_N, _: views[0].new_empty(len(views), 4, len(targets_N)),
        view_gradients=lambda *_: None,  # in place of the logits
    )
    backends = {name: replace(one, kernels=lambda _: head) for name, one in vocab_parallel.BACKENDS.items()}
    return {
        **({(layers, "PackedAttention"): _Attention} if attention else {}),
        (towers, "build"): _with_attention(towers.build),
        (nn.functional, "rms_norm"): lambda x, _, weight, eps: _Norm.apply(x, weight),
        (vocab_parallel, "BACKENDS"): backends,
        (linear_tiles, "MOST_COLUMNS"): dict.fromkeys(("cpu", "cuda"), linear_tiles.MOST_COLUMNS["cuda"]),
        (linear_products, "project"): _project,
        (linear_products, "add_gradients_"): _add_gradients_,
    }


def _project(hidden_NH: Tensor, head_CH: Tensor) -> Tensor:
    return hidden_NH.new_empty(len(hidden_NH), len(head_CH), dtype=torch.float32)


def _add_gradients_(totals: Any, weight_total_CH: Any, gradients: Any, hiddens: Any, head_CH: Tensor) -> None:
    """The same products, with 16-bit operands and float32 results, as tensors."""
    for total_NH, gradient_NC, _ in zip(totals, gradients, hiddens, strict=True):
        if total_NH is None or gradient_NC is None:
            continue
        rounded_NC = gradient_NC.to(head_CH.dtype)
        total_NH += torch.empty_like(total_NH)
        if weight_total_CH is not None:
            weight_total_CH += torch.empty_like(weight_total_CH)
        del rounded_NC


class _Kept(torch.autograd.Function):
    """Attention as flash kernels do it: query, key, value, output and float32 sums of exponentials are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore[bad-override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Attention(nn.Module):
    """The decoder's: as Transformer Engine's, under context parallelism with keys and values of one more rank."""

    def __init__(self, *_: Any, pg_collection: Any = None, **__: Any) -> None:
        super().__init__()
        self.context: dist.ProcessGroup = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [C, h, d], key and value [C, h_kv, d] -> [C, h * d]."""
        travelling = [torch.empty_like(torch.stack([key, value])) for _ in range(min(2, self.context.size() - 1))]
        out = _Kept.apply(query, key, value)
        del travelling
        return out.flatten(1)


class _Norm(torch.autograd.Function):
    """RMS norm as one kernel: its input and a float32 number of each token are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _with_attention(build: Any) -> Any:
    """Towers whose attention takes all images and windows at once, and keeps what PyTorch's kernels keep of each."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        # Of one window after another, hence put together after.
        return _Kept.apply(query, key, value).transpose(1, 2).clone(), None

    name = "flash_attention_of_shapes"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)

    def made(*args: Any, **kwargs: Any) -> nn.Module:
        tower: Any = build(*args, **kwargs)
        tower.config._attn_implementation = name
        return tower

    return made
