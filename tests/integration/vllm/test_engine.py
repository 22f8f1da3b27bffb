"""The vLLM engine against Hugging Face's model: log-probs, weights in flight, and what can be stale or wrong."""

from __future__ import annotations

import dataclasses
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.vllm import VllmEngine
from megatron_cppo.selfcheck import MAX_LOGP_GAP
from megatron_cppo.types import ImageKey
from tests.integration.vllm import rig

BOUND = 1e-4
"""Nats, of every single token, in fp32."""
WRONG = 100 * BOUND
"""What a mistake is at least."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> rig.World:
    return rig.make_world(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def shared(world: rig.World) -> Iterator[VllmEngine]:
    """One server for the tests that break nothing; each leaves it with the weights of the checkpoint."""
    with rig.engine(world) as engine:
        yield engine


@pytest.fixture
def engine(world: rig.World, shared: VllmEngine) -> Iterator[VllmEngine]:
    yield shared
    load(shared, world, world.weights(), version=0)


def load(engine: VllmEngine, world: rig.World, weights: dict[str, Tensor], *, version: int) -> None:
    """Have the engine load what the policy has from now on."""
    world.sent.clear()
    world.sent.update(weights)
    engine.load_weights(iter(weights.items()), version=version)


def short(engine: VllmEngine, world: rig.World, *, temperature: float = 1.0, salt: int = 0) -> list[rig.Sample]:
    return rig.samples_of(engine.generate(world.prompts, samples_per_prompt=4, temperature=temperature, salt=salt))


def in_short(gaps: Tensor) -> str:
    p99 = gaps.kthvalue(math.ceil(0.99 * len(gaps))).values
    return f"mean {gaps.mean():.1e}, p99 {p99:.1e}, max {gaps.max():.1e}"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(
    temperature: float, world: rig.World, engine: VllmEngine
) -> None:
    samples = short(engine, world, temperature=temperature)
    assert [(sample.prompt.row, sample.index) for sample in samples] == [
        (prompt.row, index) for prompt in world.prompts for index in range(4)
    ]
    gaps = rig.Truth(world, world.weights()).gaps(samples, temperature=temperature)
    print(f"fp32, T={temperature}: {len(gaps)} tokens, {in_short(gaps)}")
    assert gaps.max() <= BOUND
    assert all(sample.truncated == (len(sample.token_ids) == rig.MAX_RESPONSE_TOKENS) for sample in samples)
    assert len({sample.token_ids for sample in samples}) == len(samples), "two samples are the same"


def test_in_bf16_engine_and_model_round_otherwise(tmp_path: Path) -> None:
    """The same rounded weights on both sides: within the bound of the product's own check, and far from fp32's."""
    world = rig.make_world(tmp_path, dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in world.weights().items()}
    with rig.engine(world) as engine:
        load(engine, world, rounded, version=1)
        samples = short(engine, world)
    exact = {name: tensor.float() for name, tensor in rounded.items()}
    truths = {
        "the model in bf16": rig.Truth(world, rounded, dtype=torch.bfloat16),
        "the model in fp32": rig.Truth(world, exact),
    }
    for name, truth in truths.items():
        gaps = truth.gaps(samples)
        print(f"engine in bf16, {name}: {len(gaps)} tokens, {in_short(gaps)}")
        assert BOUND < gaps.mean() <= MAX_LOGP_GAP["bf16"]


def test_the_same_question_has_the_same_answer_in_any_company(world: rig.World, engine: VllmEngine) -> None:
    every = short(engine, world)
    alone = engine.generate(world.prompts[3:4], samples_per_prompt=2, temperature=1.0)[0].samples
    assert [sample.token_ids[:40] for sample in alone] == [sample.token_ids[:40] for sample in every[12:14]]
    assert short(engine, world, salt=1)[0].token_ids != every[0].token_ids


def test_greedy_answers_are_the_model_s(world: rig.World, engine: VllmEngine) -> None:
    truth = rig.Truth(world, world.weights())
    for sample in short(engine, world, temperature=0.0)[::9]:
        # Each sampled id has the largest log-prob: no other could be above it by more than rounding.
        assert (torch.tensor(sample.logp) - truth.logp(sample)).abs().max() <= BOUND
        assert sample.logp[0] >= -torch.log(torch.tensor(448.0))


def test_new_weights_are_all_there_and_no_cache_is_left(world: rig.World, engine: VllmEngine) -> None:
    changed = world.weights(changed=0.2)
    old, new = rig.Truth(world, world.weights()), rig.Truth(world, changed)
    short(engine, world)
    load(engine, world, changed, version=7)
    samples = short(engine, world)
    assert {sample.version for sample in samples} == {7}
    assert new.gaps(samples).max() <= BOUND
    assert old.gaps(samples).max() >= WRONG


@pytest.mark.parametrize("part", ["embed_tokens", "visual.", "self_attn", ".mlp.", "norm"])
def test_each_part_of_the_model_is_replaced(part: str, world: rig.World, engine: VllmEngine) -> None:
    changed = {name: tensor * 1.3 if part in name else tensor for name, tensor in world.weights().items()}
    load(engine, world, changed, version=1)
    samples = short(engine, world)[::4]
    assert rig.Truth(world, changed).gaps(samples).max() <= BOUND
    assert rig.Truth(world, world.weights()).gaps(samples).max() >= WRONG


def test_a_sync_does_not_wait_for_requests_that_are_on_their_way(
    world: rig.World, engine: VllmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """They reach the server after it was paused, which keeps them until it goes on."""
    changed = world.weights(changed=0.1)
    ticket = engine.submit(world.prompts, samples_per_prompt=4, temperature=1.0)
    start = time.monotonic()
    load(engine, world, changed, version=1)
    seconds = time.monotonic() - start
    samples = rig.samples_of(engine.collect(ticket))
    assert not [record for record in caplog.records if "is out" in record.getMessage()]
    assert seconds < 30, "it was waited for something"
    assert [len(sample.token_ids) > 0 for sample in samples] == [True] * 32
    late = [sample for sample in samples if not sample.earlier]
    assert late, "all were on the server already"
    assert rig.Truth(world, changed).gaps(late[::4]).max() <= BOUND


def test_answers_that_are_cut_by_new_weights_go_on_under_them(world: rig.World, engine: VllmEngine) -> None:
    changed = world.weights(changed=0.2)
    before = rig.num_sampled(engine)
    ticket = engine.submit(world.prompts, samples_per_prompt=4, temperature=1.0)
    while rig.num_sampled(engine) < before + 300:
        time.sleep(0.02)
    load(engine, world, changed, version=1)
    samples = rig.samples_of(engine.collect(ticket))
    cut = [sample for sample in samples if sample.earlier]
    print(f"{len(cut)} of {len(samples)} samples were cut, at {[sample.earlier[0][1] for sample in cut][:8]} ...")
    assert len(cut) >= 4, "nothing was cut: the test saw nothing"
    assert {sample.version for sample in samples} <= {0, 1}
    old, new = rig.Truth(world, world.weights()), rig.Truth(world, changed)
    for sample in cut:
        ((version, length),) = sample.earlier
        assert (version, sample.version) == (0, 1)
        assert 0 < length < len(sample.token_ids) <= rig.MAX_RESPONSE_TOKENS
        told = torch.tensor(sample.logp)
        assert (told - old.logp(sample))[:length].abs().max() <= BOUND
        assert (told - new.logp(sample))[length:].abs().max() <= BOUND
        assert (told - old.logp(sample))[length:].abs().max() >= WRONG


def _without(weights: dict[str, Tensor], name: str) -> list[tuple[str, Tensor]]:
    return [(other, tensor) for other, tensor in weights.items() if other != name]


def test_a_sync_of_wrong_weights_leaves_an_engine_that_refuses_and_then_recovers(
    world: rig.World, engine: VllmEngine
) -> None:
    weights = world.weights()
    first = next(iter(weights))
    wrong = {
        "are missing": _without(weights, first),
        "unknown to this model": [*weights.items(), ("model.extra.weight", torch.ones(2))],
        "sent twice": [*weights.items(), (first, weights[first])],
        "has shape": [(first, torch.ones(3)), *_without(weights, first)],
    }
    for says, tensors in wrong.items():
        with pytest.raises(EngineError, match=says):
            engine.load_weights(iter(tensors), version=3)
        with pytest.raises(EngineError, match="the weights are incomplete"):
            short(engine, world)
    load(engine, world, weights, version=4)
    samples = short(engine, world)
    assert {sample.version for sample in samples} == {4}
    assert rig.Truth(world, weights).gaps(samples).max() <= BOUND


@pytest.mark.parametrize("cache", ["encoder", "prefix"])
def test_a_stale_cache_would_be_seen(
    cache: str, world: rig.World, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches are kept on purpose: the same pictures, and the same beginnings, under other weights."""
    fleet = engine.fleet
    assert fleet is not None
    short(engine, world)
    call = fleet.connection.call

    async def kept(url: str, **how: Any) -> Any:
        if url.endswith("/pause"):
            how["query"] = how["query"] | {"clear_cache": "false"}
        return None if url.endswith(f"/reset_{cache}_cache") else await call(url, **how)

    monkeypatch.setattr(fleet.connection, "call", kept)
    changed = world.weights(changed=0.2)
    load(engine, world, changed, version=1)
    assert rig.Truth(world, changed).gaps(short(engine, world)).max() >= WRONG


def test_every_route_but_health_asks_for_the_key(world: rig.World, engine: VllmEngine) -> None:
    assert engine.fleet is not None
    url = engine.fleet.servers[0].url
    for path in ("/v1/models", "/weight_info", "/metrics", "/is_paused", "/openapi.json", "/is_sleeping"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url + path, timeout=10)
        assert refused.value.code == 401, path
        right = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {engine._key}"})
        assert urllib.request.urlopen(right, timeout=10).status == 200, path
    assert urllib.request.urlopen(url + "/health", timeout=10).status == 200
    written = [path.read_text(errors="replace") for path in (world.folder / "run" / "logs").iterdir()]
    assert written
    assert not any(engine._key in text for text in written)
    processes = [path / "cmdline" for path in Path("/proc").glob("[0-9]*")]
    lines = [path.read_bytes() for path in processes if path.exists()]
    assert any(b"megatron_cppo_in_vllm" in line for line in lines)
    assert not any(engine._key.encode() in line for line in lines)


def test_a_wrong_picture_would_be_seen(world: rig.World, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [prompt.row for prompt in world.prompts]
    true = world.source.png

    def another(key: ImageKey) -> bytes:
        return true(dataclasses.replace(key, row=rows[(rows.index(key.row) + 1) % len(rows)]))

    monkeypatch.setattr(world.source, "png", another)
    assert rig.Truth(world, world.weights()).gaps(short(engine, world)).max() >= WRONG
