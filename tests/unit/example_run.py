"""A small made-up run of the two-digit task, written through RunLog: real files, plausible numbers, no training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_cppo.config import Config
from megatron_cppo.data.views import draw, preserving, removing
from megatron_cppo.runlog import RunLog
from megatron_cppo.types import ImageGrid, ImageKey, Prompt, Sample, SampleStatistics

PIECES = ["", "<think>", "</think>", "\n", " left", " digit", " is", " right", " so", " the", " sum", "\\boxed{", "}"]
PIECES += ["<|im_end|>", ",", "."]
PIECES += [f" {number}" for number in range(19)] + [str(number) for number in range(19)]
IDS = {piece: number for number, piece in enumerate(PIECES)}
GROUP = 5
ROWS = 4


def example_config(run_dir: Path, num_steps: int) -> Config:
    """The config that the made-up run claims."""
    base = Config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="checkpoints/digits-1m", min_pixels=784, max_pixels=1568),
        data=dataclasses.replace(base.data, train=("digits/train.parquet",), evaluation=("digits/test.parquet",)),
        rollout=dataclasses.replace(base.rollout, max_response_tokens=32),
        policy=dataclasses.replace(base.policy, device="cpu", tensor_parallel=2, precision="fp32"),
        trainer=dataclasses.replace(
            base.trainer,
            run_dir=str(run_dir),
            num_gpus=4,
            num_steps=num_steps,
            prompts_per_step=ROWS,
            keep_samples_every_steps=5,
        ),
    )


def digits(row: int) -> tuple[int, int]:
    """The two digits of a row's picture."""
    return (3 * row + 2) % 10, (7 * row + 5) % 10


def image(key: ImageKey) -> Image.Image:
    """The picture of a row under a view."""
    picture = Image.fromarray(np.random.default_rng(key.row).integers(0, 40, (28, 56, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=24)
    for place, digit in enumerate(digits(key.row)):
        pen.text((7 + 28 * place, -2), str(digit), fill=(235, 235, 225), font=font)
    seed = (0, key.epoch, key.row, key.index)
    views = {"original": lambda: picture, "preserving": lambda: preserving(picture, seed)}
    return views.get(key.view, lambda: removing(picture, seed))()


def describe_view(key: ImageKey) -> str:
    """The perturbation that `image` applies."""
    return "" if key.view == "original" else draw(key.view, (0, key.epoch, key.row, key.index))


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def example_log(run_dir: Path, num_steps: int, *, rank: int = 0, clock: Callable[[], float] = perf_counter) -> RunLog:
    """The log of that run."""
    return RunLog(
        run_dir,
        rank=rank,
        config=example_config(run_dir, num_steps),
        plan_dict={"world_size": 4, "data_parallel": 2, "tokens_per_step": 320},
        total_steps=num_steps,
        decode_token=PIECES.__getitem__,
        describe_view=describe_view,
        clock=clock,
    )


def write_run(run_dir: Path, num_steps: int = 100) -> None:
    """Write the whole folder, an evaluation every 20 steps."""
    rng = np.random.default_rng(0)
    clock = Clock()
    log = example_log(run_dir, num_steps, clock=clock)
    log.evaluation(0, {"accuracy": 0.291, "reward": 0.33, "length": 16.4})
    for step in range(1, num_steps + 1):
        with log.step(step) as record:
            record.add(metrics(step / num_steps, rng))
            for name, spent in seconds(rng).items():
                with record.span(name):
                    clock.now += spent
            clock.now += 0.04
        if step % 5 == 0:
            samples, seen = answers(step, rng)
            log.samples(step, samples, seen)
        if step % 20 == 0:
            accuracy = 0.29 + 0.42 * (1 - math.exp(-3 * step / num_steps)) + rng.normal(0, 0.01)
            log.evaluation(step, {"accuracy": accuracy, "reward": 0.9 * accuracy + 0.1, "length": 15.2})
            with log.phase("evaluate", 60) as advance:
                clock.now += 4.2
                advance(60)
    log.close()


def seconds(rng: np.random.Generator) -> dict[str, float]:
    """Seconds per span of one step."""
    means = {"rollout": 0.61, "reward": 0.02, "batch": 0.03, "score": 0.22, "update": 1.13, "sync": 0.05}
    return {name: mean * rng.uniform(0.85, 1.25) for name, mean in means.items()}


def metrics(progress: float, rng: np.random.Generator) -> dict[str, float]:
    """Metrics of one step, at `progress` of the run in (0, 1]."""
    grown = 1 - math.exp(-3 * progress)
    accuracy = min(0.98, max(0.02, 0.3 + 0.4 * grown + rng.normal(0, 0.06)))
    return {
        "reward/mean": 0.9 * accuracy + 0.1 * (0.8 + 0.2 * grown),
        "reward/accuracy": accuracy,
        "reward/format": 0.8 + 0.2 * grown,
        "reward/std": 0.45,
        "response/length": 16.5 - 1.5 * grown + rng.normal(0, 0.3),
        "response/truncated_share": max(0.0, 0.06 - 0.06 * grown + rng.normal(0, 0.008)),
        "groups/informative_share": 0.7 - 0.3 * grown + rng.normal(0, 0.06),
        "samples/gated_share": 0.35 - 0.1 * grown + rng.normal(0, 0.03),
        "policy/loss": rng.normal(0, 0.004),
        "policy/entropy": 0.55 - 0.3 * grown + rng.normal(0, 0.015),
        "policy/kl": 0.012 * grown * (1 + rng.normal(0, 0.15)),
        "policy/clip_low_share": abs(rng.normal(0, 0.002)),
        "policy/clip_high_share": abs(rng.normal(0, 0.003)),
        "policy/logp_gap": 2e-6 * rng.uniform(0.7, 1.4),
        "policy/correction_weight": 1.0 - 0.002 * grown,
        "policy/correction_hit_share": 0.004 * grown,
        "perception/cpl": 0.69 - 0.28 * grown + rng.normal(0, 0.03),
        "perception/masked_share": 0.21 + 0.05 * grown + rng.normal(0, 0.015),
        "perception/entropy_shift": 0.15 + 0.4 * grown + rng.normal(0, 0.03),
        "perception/clamped_share": abs(rng.normal(0.01, 0.006)),
        "optim/grad_norm": float(rng.lognormal(0.0, 0.35)),
        "optim/learning_rate": 1e-4 * min(1.0, 10 * progress),
        "tokens/response": float(rng.integers(290, 340)),
        "tokens/segments": 2400.0,
        "tokens/vision": 1600.0,
        "rollout/logp_gap_image": 1e-6 * (1 + grown),
        "rollout/staleness_mean": 0.5 + 0.2 * grown,
        "rollout/staleness_max": 1.0,
        "rollout/cut_share": 0.3,
        "grading/right": 9.0,
    }


def answers(step: int, rng: np.random.Generator) -> tuple[list[Sample], list[SampleStatistics]]:
    """Groups of answers of four rows, with the statistics of the update."""
    samples: list[Sample] = []
    seen: list[SampleStatistics] = []
    for row in range(step, step + ROWS):
        left, right = digits(row)
        for index in range(GROUP):
            guess = right if index < 2 else (right + index) % 10
            pieces = _pieces(left, guess)
            sample = _sample(_prompt(row), index, pieces, right=guess == right, rng=rng)
            seen.append(_statistics(len(samples), sample, pieces, rng))
            samples.append(sample)
    return samples, seen


def _prompt(row: int) -> Prompt:
    left, right = digits(row)
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>What is the sum of the two "
        "digits? Think inside <think> </think>, then answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    grid = ImageGrid(frames=1, height=2, width=4, merge=2)
    return Prompt(
        split="train",
        row=row,
        epoch=0,
        data_source="digits/sum",
        ground_truth=str(left + right),
        text=text,
        token_ids=(1, 2),
        positions=((0, 1),) * 3,
        next_position=2,
        image_slots=(0, 1),
        grids=(grid,),
    )


def _pieces(left: int, right: int) -> list[str]:
    """An answer piece by piece."""
    head = ["<think>", " left", " digit", " is", f" {left}", ",", " right", " digit", " is", f" {right}", "\n", " so"]
    tail = [" the", " sum", " is", f" {left + right}", ".", "</think>", "\n", "\\boxed{", f"{left + right}", "}"]
    return head + tail + ["<|im_end|>"]


def _sample(prompt: Prompt, index: int, pieces: Sequence[str], *, right: bool, rng: np.random.Generator) -> Sample:
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=tuple(IDS[piece] for piece in pieces),
        logp=tuple(-rng.exponential(0.15, len(pieces))),
        text="".join(pieces),
        truncated=False,
        version=0,
        reward=1.0 if right else 0.1,
        rewards=(("accuracy", float(right)), ("format", 1.0)),
        grading="right" if right else "wrong",
        advantage=1.095 if right else -0.73,
    )


def _statistics(sample_id: int, sample: Sample, pieces: Sequence[str], rng: np.random.Generator) -> SampleStatistics:
    """Digits read off the image have a large shift; everything else has little, of either sign."""
    read = np.array([piece.strip().isdigit() for piece in pieces])
    entropy = np.where(read, rng.exponential(0.25, len(read)), rng.exponential(0.05, len(read)))
    after = entropy + np.where(read, rng.normal(1.1, 0.4, len(read)), rng.normal(0.0, 0.08, len(read)))
    after = np.maximum(after, 0.001)
    shift = after - entropy
    score = np.maximum(shift, 0) / (after + 1e-6)
    keep = max(1, int((shift > 0).sum() // 2))
    mask = (shift > 0) & (score >= np.sort(score)[-keep])
    return SampleStatistics(
        sample_id=sample_id,
        logp=sample.logp,
        entropy=tuple(entropy.tolist()),
        entropy_removing=tuple(after.tolist()) if sample.gated else None,
        mask=tuple(mask.tolist()) if sample.gated else None,
    )
