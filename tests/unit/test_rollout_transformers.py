"""The embedded engine against the plain module: log-probs, greedy answers, the distribution, and strict weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_cppo.rollout.engine import Engine, EngineError
from megatron_cppo.rollout.module_weights import disk_name, module_name
from megatron_cppo.rollout.sampling import drawn_tokens, sampling_logp, uniform_numbers
from megatron_cppo.rollout.transformers import TransformersEngine
from megatron_cppo.types import Group, ImageKey, Prompt, Sample
from tests.tiny_qwen import VISION_IDS, VOCAB_SIZE, TinyQwen, make_tiny_qwen, pixels

# A sixth of the ids end an answer: lengths differ widely, and the batch is compacted again and again.
MANY_END_IDS = tuple(range(0, 16))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("tiny"), end_ids=MANY_END_IDS)


@pytest.fixture(scope="module")
def plain(folder: Path) -> TinyQwen:
    return TinyQwen.load(folder)


@pytest.fixture(scope="module")
def prompts(plain: TinyQwen) -> list[Prompt]:
    """Ragged; with no, one, two and three images."""
    shapes = ((7, 1), (3, 0), (19, 2), (11, 1), (5, 3), (26, 0), (2, 1))
    return [plain.prompt(row, num_text_tokens=text, num_images=images) for row, (text, images) in enumerate(shapes)]


def make_engine(
    folder: Path,
    *,
    banned_ids: Sequence[int] = VISION_IDS,
    max_response_tokens: int = 12,
    max_sequences: int = 64,
    seed: int = 5,
    progress: Callable[[int], None] | None = None,
) -> TransformersEngine:
    return TransformersEngine(
        folder,
        pixels=pixels,
        banned_ids=banned_ids,
        decode=lambda ids: " ".join(map(str, ids)),
        max_response_tokens=max_response_tokens,
        max_sequences=max_sequences,
        seed=seed,
        group=None,
        progress=progress,
    )


def expected_logp(
    plain: TinyQwen, sample: Sample, *, temperature: float, banned_ids: Sequence[int] = VISION_IDS
) -> Tensor:
    logits = plain.logits(sample.prompt, sample.token_ids)
    logits[:, list(banned_ids)] = -torch.inf
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)


def check_logp(plain: TinyQwen, groups: Sequence[Group], *, temperature: float) -> None:
    for group in groups:
        for sample in group.samples:
            expected = expected_logp(plain, sample, temperature=temperature)
            torch.testing.assert_close(torch.tensor(sample.logp), expected, rtol=0, atol=1e-5)


def token_ids(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in group.samples] for group in groups]


@pytest.mark.parametrize(
    "rows", [(1, 5), (0, 2, 4), (0, 1, 2, 3, 4, 5, 6), (3,)], ids=["text", "images", "mixed", "one"]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logp_is_that_of_the_plain_forward(
    folder: Path, plain: TinyQwen, prompts: list[Prompt], rows: tuple[int, ...], temperature: float
) -> None:
    chosen = [prompts[row] for row in rows]
    groups = make_engine(folder).generate(chosen, samples_per_prompt=5, temperature=temperature)
    assert [group.prompt for group in groups] == chosen
    check_logp(plain, groups, temperature=temperature)
    lengths = {len(sample.token_ids) for group in groups for sample in group.samples}
    assert len(lengths) > 2, f"answers of one length compact nothing: {lengths}"


@pytest.mark.parametrize("banned_ids", [(), (*VISION_IDS, *range(30, 60))])
def test_greedy_is_that_of_the_plain_generate(
    folder: Path, plain: TinyQwen, prompts: list[Prompt], banned_ids: tuple[int, ...]
) -> None:
    engine = make_engine(folder, banned_ids=banned_ids, max_response_tokens=20)
    groups = engine.generate(prompts, samples_per_prompt=2, temperature=0.0)
    for prompt, group in zip(prompts, groups, strict=True):
        expected = plain.greedy(prompt, max_new_tokens=20, banned_ids=banned_ids)
        assert [list(sample.token_ids) for sample in group.samples] == [expected, expected]
        for sample in group.samples:
            logp = expected_logp(plain, sample, temperature=1.0, banned_ids=banned_ids)
            torch.testing.assert_close(torch.tensor(sample.logp), logp, rtol=0, atol=1e-5)


def test_samples_do_not_depend_on_the_batch(folder: Path, plain: TinyQwen, prompts: list[Prompt]) -> None:
    whole = make_engine(folder).generate(prompts, samples_per_prompt=4, temperature=1.0)
    for max_sequences in (1, 3, 9):
        # 3 is less than a group: its samples are then decoded in two ranges from one prefill.
        small = make_engine(folder, max_sequences=max_sequences).generate(
            prompts, samples_per_prompt=4, temperature=1.0
        )
        assert token_ids(small) == token_ids(whole)
        check_logp(plain, small, temperature=1.0)
    backwards = make_engine(folder).generate(prompts[::-2], samples_per_prompt=2, temperature=1.0)
    assert token_ids(backwards) == [answers[:2] for answers in token_ids(whole)[::-2]]
    longer = make_engine(folder, max_response_tokens=30).generate(prompts, samples_per_prompt=4, temperature=1.0)
    assert [[ids[:12] for ids in answers] for answers in token_ids(longer)] == token_ids(whole)


def test_what_changes_a_sample(folder: Path, prompts: list[Prompt]) -> None:
    engine = make_engine(folder)
    first = token_ids(engine.generate(prompts, samples_per_prompt=4, temperature=1.0))
    assert token_ids(engine.generate(prompts, samples_per_prompt=4, temperature=1.0)) == first
    assert token_ids(engine.generate(prompts, samples_per_prompt=4, temperature=1.0, salt=1)) != first
    assert token_ids(make_engine(folder, seed=6).generate(prompts, samples_per_prompt=4, temperature=1.0)) != first
    next_epoch = [replace(prompt, epoch=1) for prompt in (prompts[1], prompts[5])]
    assert token_ids(engine.generate(next_epoch, samples_per_prompt=4, temperature=1.0)) != [first[1], first[5]]
    assert all(len(set(answers)) > 1 for answers in first), "the samples of a group must differ"


def test_one_token_samples_follow_the_probabilities(folder: Path, plain: TinyQwen, prompts: list[Prompt]) -> None:
    temperature, num_samples = 0.7, 4000
    engine = make_engine(folder, max_response_tokens=1, max_sequences=num_samples)
    (group,) = engine.generate([prompts[2]], samples_per_prompt=num_samples, temperature=temperature)
    logits = plain.logits(prompts[2], [0])[0]
    logits[list(VISION_IDS)] = -torch.inf
    expected = (logits / temperature).softmax(-1) * num_samples
    observed = torch.bincount(torch.tensor([s.token_ids[0] for s in group.samples]), minlength=VOCAB_SIZE).double()
    frequent = expected >= 5
    cells = torch.stack([torch.cat([x[frequent], x[~frequent].sum()[None]]) for x in (observed, expected.double())])
    chi_square = float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
    degrees = cells.shape[1] - 1
    assert degrees >= 20
    # Mean and variance of the statistic are its degrees of freedom and twice that; four standard deviations.
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


def test_banned_ids_are_never_drawn(folder: Path, prompts: list[Prompt]) -> None:
    banned = tuple(range(20, VOCAB_SIZE))
    groups = make_engine(folder, banned_ids=banned).generate(prompts, samples_per_prompt=32, temperature=5.0)
    drawn = {token for group in groups for sample in group.samples for token in sample.token_ids}
    assert drawn <= set(range(20))
    assert len(drawn) > 15


def test_the_edges_of_the_unit_interval() -> None:
    below_one = 1 - 2**-53
    numbers = torch.tensor([0.0, 1 / 3 - 1e-6, 1 / 3 + 1e-6, 2 / 3 + 1e-6, below_one, 1.0], dtype=torch.float64)
    logp = sampling_logp(torch.zeros(len(numbers), 6), temperature=1.0, banned_K=torch.tensor([0, 3, 5]))
    assert drawn_tokens(logp, numbers).tolist() == [1, 1, 2, 4, 4, 1]
    # Ids whose probability underflows own nothing either, wherever they stand.
    logits = torch.tensor([-1e5, 0.0, -1e5]).expand(len(numbers), -1)
    logp = sampling_logp(logits, temperature=1.0, banned_K=torch.tensor([], dtype=torch.long))
    assert drawn_tokens(logp, numbers).tolist() == [1] * len(numbers)


def test_the_numbers_of_a_sample() -> None:
    numbers = uniform_numbers(20_000, 3, "train", 7)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert abs(numbers.mean() - 0.5) < 4 / (12 * 20_000) ** 0.5
    assert (uniform_numbers(5, 3, "train", 7) == numbers[:5]).all()
    assert (uniform_numbers(5, 3, "train", 8) != numbers[:5]).all()


def test_end_and_truncation(folder: Path, prompts: list[Prompt]) -> None:
    groups = make_engine(folder, max_response_tokens=6).generate(prompts, samples_per_prompt=16, temperature=1.0)
    samples = [sample for group in groups for sample in group.samples]
    assert {sample.truncated for sample in samples} == {True, False}
    for sample in samples:
        *before, last = sample.token_ids
        assert not set(before) & set(MANY_END_IDS)
        assert len(sample.token_ids) == 6 or last in MANY_END_IDS
        assert sample.truncated == (last not in MANY_END_IDS)
        assert len(sample.logp) == len(sample.token_ids)
        assert sample.text == " ".join(map(str, sample.token_ids))
    assert any(len(sample.token_ids) == 6 and not sample.truncated for sample in samples), "an end at the limit counts"
    assert [sample.index for sample in samples] == list(range(16)) * len(prompts)


def test_nothing_to_do(folder: Path) -> None:
    assert make_engine(folder).generate([], samples_per_prompt=4, temperature=1.0) == []


@pytest.mark.parametrize("tied", [True, False])
def test_weights_replace_those_of_the_checkpoint(
    tmp_path: Path, folder: Path, prompts: list[Prompt], tied: bool
) -> None:
    other = make_tiny_qwen(tmp_path / "other", seed=1, tied=tied, end_ids=MANY_END_IDS)
    start = make_tiny_qwen(tmp_path / "start", seed=0, tied=tied, end_ids=MANY_END_IDS)
    weights = load_file(other / "model.safetensors")
    assert ("lm_head.weight" in weights) == (not tied)
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= set(weights)
    engine: Engine = make_engine(start)
    before = engine.generate(prompts, samples_per_prompt=2, temperature=1.0)
    engine.load_weights(weights.items(), version=7)
    after = engine.generate(prompts, samples_per_prompt=2, temperature=1.0)
    assert after != before
    assert token_ids(after) == token_ids(make_engine(other).generate(prompts, samples_per_prompt=2, temperature=1.0))
    assert {sample.version for group in before for sample in group.samples} == {0}
    assert {sample.version for group in after for sample in group.samples} == {7}
    check_logp(TinyQwen.load(other), after, temperature=1.0)


def test_a_ticket_keeps_what_the_weights_of_its_submission_sampled(
    tmp_path: Path, folder: Path, prompts: list[Prompt]
) -> None:
    other = load_file(make_tiny_qwen(tmp_path / "other", seed=1, end_ids=MANY_END_IDS) / "model.safetensors")
    watched: list[int] = []
    engine: Engine = make_engine(folder, progress=watched.append)
    expected = engine.generate(prompts, samples_per_prompt=2, temperature=1.0, salt=1)
    assert watched == []
    first = engine.submit(prompts, samples_per_prompt=2, temperature=1.0, salt=1)
    second = engine.submit(prompts[:2], samples_per_prompt=3, temperature=1.0)
    assert sum(watched) == 2 * len(prompts) + 3 * 2
    engine.load_weights(other.items(), version=1)
    third = engine.submit(prompts, samples_per_prompt=2, temperature=1.0, salt=1)
    heard: list[int] = []
    after = engine.collect(third, advance=heard.append)
    assert sum(heard) == 2 * len(prompts)
    assert after == engine.generate(prompts, samples_per_prompt=2, temperature=1.0, salt=1)
    assert {sample.version for group in after for sample in group.samples} == {1}
    assert engine.collect(first) == expected != after
    assert [len(group.samples) for group in engine.collect(second)] == [3, 3]
    with pytest.raises(AssertionError, match="ticket"):
        engine.collect(first)
    engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        engine.submit(prompts, samples_per_prompt=2, temperature=1.0)


def test_names_on_disk_and_in_the_module(folder: Path, plain: TinyQwen) -> None:
    on_disk = set(load_file(folder / "model.safetensors"))
    in_module = {name for name, _ in plain.model.named_parameters()}
    assert {module_name(name) for name in on_disk} == in_module
    assert {disk_name(name) for name in in_module} == on_disk
    assert {module_name(name) for name in in_module} == in_module


def test_a_failed_load_is_never_used(folder: Path, prompts: list[Prompt]) -> None:
    weights = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    bad_loads = {
        "unknown": [*weights.items(), ("model.norm.scale", weights[norm])],
        "were not sent .model.norm.weight": [item for item in weights.items() if item[0] != norm],
        "has shape": [*(item for item in weights.items() if item[0] != norm), (norm, torch.ones(3))],
        "sent twice": [*weights.items(), (norm, weights[norm])],
        "'lm_head.weight' is unknown": [*weights.items(), ("lm_head.weight", weights["model.embed_tokens.weight"])],
    }
    engine = make_engine(folder)
    expected = token_ids(engine.generate(prompts, samples_per_prompt=2, temperature=1.0))
    for message, load in bad_loads.items():
        with pytest.raises(EngineError, match=message):
            engine.load_weights(load, version=1)
        with pytest.raises(EngineError, match="incomplete"):
            engine.generate(prompts, samples_per_prompt=2, temperature=1.0)
        engine.load_weights(weights.items(), version=2)
        assert token_ids(engine.generate(prompts, samples_per_prompt=2, temperature=1.0)) == expected


def test_sleep_and_wake(folder: Path, prompts: list[Prompt]) -> None:
    engine = make_engine(folder)
    expected = engine.generate(prompts, samples_per_prompt=2, temperature=1.0)
    engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        engine.generate(prompts, samples_per_prompt=2, temperature=1.0)
    engine.wake()
    assert engine.generate(prompts, samples_per_prompt=2, temperature=1.0) == expected


def test_each_image_is_read_once(folder: Path, prompts: list[Prompt]) -> None:
    asked: list[ImageKey] = []

    def counted(key: ImageKey) -> Tensor:
        asked.append(key)
        return pixels(key)

    engine = TransformersEngine(
        folder,
        pixels=counted,
        banned_ids=VISION_IDS,
        decode=str,
        max_response_tokens=3,
        max_sequences=5,
        seed=0,
        group=None,
    )
    engine.generate(prompts, samples_per_prompt=7, temperature=1.0)
    assert sorted(asked, key=repr) == sorted((key for p in prompts for key in p.images("original")), key=repr)


def test_errors_of_the_user(tmp_path: Path, folder: Path, prompts: list[Prompt]) -> None:
    with pytest.raises(EngineError, match="banned ids must be below the vocabulary size 96"):
        make_engine(folder, banned_ids=[VOCAB_SIZE])
    with pytest.raises(EngineError, match="names no eos_token_id"):
        make_engine(make_tiny_qwen(tmp_path, end_ids=()))
    with pytest.raises(EngineError, match="samples_per_prompt >= 1"):
        make_engine(folder).generate(prompts, samples_per_prompt=0, temperature=1.0)
