"""The files of a run folder: what is written, by whom, and what a resumed run leaves of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import logging
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cppo.config import ConfigError
from megatron_cppo.progress import Progress, duration
from megatron_cppo.resume import refuse_other_config
from megatron_cppo.runlog import RunLog, read_lines
from megatron_cppo.types import Sample, SampleStatistics
from tests.unit.example_run import Clock, answers, example_config, example_log, write_run


def log_steps(run_dir: Path, first: int, last: int, *, clock: Clock | None = None, resume: int | None = None) -> None:
    log = example_log(run_dir, 10, clock=clock or Clock())
    if resume is not None:
        log.resume(resume)
    for step in range(first, last + 1):
        with log.step(step) as record:
            record.add({"reward/mean": step / 7, "policy/entropy": math.exp(-step)})
            log.samples(step, [], [])
        if step % 2 == 0:
            log.evaluation(step, {"accuracy": step / 10})
    log.close()


def test_a_step_is_one_line_with_sorted_keys_that_can_be_tailed(tmp_path: Path) -> None:
    log = example_log(tmp_path, 10)
    with log.step(1) as record:
        record.add({"reward/mean": 0.1 + 0.2})
        record.add({"policy/entropy": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"policy/entropy": 1.0, "reward/mean": 0.30000000000000004, "step": 1}\n'
    )
    log.evaluation(1, {"accuracy": 0.5})
    assert read_lines(tmp_path / "metrics.jsonl")[1] == {"step": 1, "evaluation/accuracy": 0.5}


def test_metrics_hold_nothing_that_a_clock_said(tmp_path: Path) -> None:
    class Slow(Clock):
        def __call__(self) -> float:
            self.now += 3.7
            return self.now

    log_steps(tmp_path / "a", 1, 4)
    log_steps(tmp_path / "b", 1, 4, clock=Slow())
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert (tmp_path / "a/timings.jsonl").read_bytes() != (tmp_path / "b/timings.jsonl").read_bytes()


def test_spans_are_summed_and_a_phase_between_steps_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    log = example_log(tmp_path, 10, clock=clock)
    with log.step(1) as record:
        for seconds in (1.0, 0.5):
            with record.span("update"):
                clock.now += seconds
        with record.span("sync"), log.phase("send", 3) as advance:
            clock.now += 0.25
            advance(3)
        clock.now += 0.125
    with log.phase("evaluate", 8):
        clock.now += 2.0
    text = (tmp_path / "timings.jsonl").read_text()
    assert text == '{"step": 1, "update": 1.5, "sync": 0.25, "total": 1.875}\n{"step": 1, "evaluate": 2.0}\n'


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path: Path) -> None:
    log = example_log(tmp_path, 10)
    with log.step(1) as record:
        record.add({"a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"a": "nan", "b": "inf", "c": "-inf", "step": 1}
    assert float(json.loads(text)["c"]) == -math.inf


def test_a_metric_is_a_plain_number_and_is_added_once(tmp_path: Path) -> None:
    with example_log(tmp_path, 10).step(1) as record:
        record.add({"reward/mean": 1.0})
        with pytest.raises(AssertionError, match="reward/mean was added twice"):
            record.add({"reward/mean": 1.0})
        with pytest.raises(AssertionError, match="policy/loss must be a plain number, got Tensor"):
            record.add({"policy/loss": torch.tensor(1.0)})  # pyrefly: ignore
        with pytest.raises(AssertionError, match="span name total is taken"), record.span("total"):
            pass


def test_a_step_that_fails_leaves_no_line(tmp_path: Path) -> None:
    def fail() -> None:
        with example_log(tmp_path, 10).step(1) as record:
            record.add({"reward/mean": 1.0})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_rank_0_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    clock = Clock()
    log = example_log(run_dir, 10, rank=1, clock=clock)
    log.resume(0)
    with log.step(1) as record:
        record.add({"reward/mean": 1.0})
    log.evaluation(1, {"accuracy": 1.0})
    log.samples(1, [], [])
    with log.phase("evaluate", 100) as advance:
        clock.now += 60
        advance(50)
    log.close()
    assert not run_dir.exists()
    assert capfd.readouterr().err == ""


def test_the_readable_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = example_log(tmp_path, 100, clock=clock)
    with caplog.at_level(logging.INFO, "megatron_cppo"):
        log.evaluation(0, {"accuracy": 0.25, "length": 1234.4})
        for step in (1, 2):
            with log.step(step) as record:
                record.add({"response/length": 15.12, "policy/kl": 3e-4, "reward/mean": 0.41234, "tokens/vision": 8.0})
                with record.span("rollout"):
                    clock.now += 0.6
                with record.span("update"):
                    clock.now += 0.9
    assert caplog.messages[0] == "step 0/100  evaluation  accuracy 0.25  length 1234"
    assert caplog.messages[2] == "step 2/100  reward 0.412  kl 0.0003  len 15.1 | rollout 0.6 update 0.9 s  eta 2m27s"


def test_a_sample_line_says_everything_with_six_digits(tmp_path: Path) -> None:
    write_run(tmp_path, num_steps=5)
    lines = read_lines(tmp_path / "samples" / "step_000005.jsonl")
    gated = next(line for line in lines if line["advantage"] > 0)
    assert gated["preserving"][0] in ("color_jitter", "perspective", "rotation")
    assert gated["removing"][0] in ("occlusion", "zoom_crop")
    assert "".join(gated["tokens"]) == gated["response"]
    assert len({len(gated[name]) for name in ("tokens", "token_ids", "engine_logp", "logp", "entropy", "mask")}) == 1
    assert all(float(f"{value:.6g}") == value for value in gated["entropy_removing"])
    assert [line["sample_id"] for line in lines] == list(range(len(lines)))
    closed = next(line for line in lines if line["advantage"] <= 0)
    assert closed["mask"] is closed["entropy_removing"] is None
    assert set(gated) == set(closed)
    assert {"step", "split", "row", "epoch", "index", "data_source", "prompt", "ground_truth"} <= set(gated)
    assert {"truncated", "version", "earlier", "reward", "rewards", "grading", "num_images"} <= set(gated)


def some_answers() -> tuple[list[Sample], list[SampleStatistics]]:
    return answers(1, np.random.default_rng(0))


def test_samples_without_statistics_are_written_and_wrong_statistics_refused(tmp_path: Path) -> None:
    log = example_log(tmp_path, 10)
    samples, seen = some_answers()
    log.samples(1, samples, seen[3:])
    lines = read_lines(tmp_path / "samples" / "step_000001.jsonl")
    assert [line["logp"] is None for line in lines[:4]] == [True, True, True, False]
    with pytest.raises(AssertionError, match="two statistics of one sample"):
        log.samples(2, samples, [seen[0], seen[0]])
    with pytest.raises(AssertionError, match="statistics of unknown samples"):
        log.samples(2, samples[:2], seen)
    with pytest.raises(AssertionError, match="sample 0: 23 tokens"):
        log.samples(2, samples, [dataclasses.replace(seen[0], entropy=(1.0,))])
    assert not (tmp_path / "samples" / "step_000002.jsonl").exists()


def test_text_of_any_kind_survives(tmp_path: Path) -> None:
    samples, _ = some_answers()
    odd = 'a\u2028b\x85"\ud800 数'
    example_log(tmp_path, 10).samples(1, [dataclasses.replace(samples[0], text=odd)], [])
    assert read_lines(tmp_path / "samples" / "step_000001.jsonl")[0]["response"] == odd


@pytest.mark.parametrize("kept", [0, 3, 4])
def test_a_resumed_run_has_the_files_of_an_unbroken_one(tmp_path: Path, kept: int) -> None:
    log_steps(tmp_path / "unbroken", 1, 8)
    log_steps(tmp_path / "broken", 1, 5)
    for name in ("metrics.jsonl", "timings.jsonl"):
        with (tmp_path / "broken" / name).open("a") as file:
            file.write('{"policy/entropy": 0.00')
    log_steps(tmp_path / "broken", kept + 1, 8, resume=kept)
    assert (tmp_path / "broken/metrics.jsonl").read_bytes() == (tmp_path / "unbroken/metrics.jsonl").read_bytes()
    assert len(read_lines(tmp_path / "broken/timings.jsonl")) == 8
    assert len((tmp_path / "broken/command.txt").read_text().splitlines()) == 2


def test_resume_deletes_later_samples_and_starts_over_at_0(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 5)
    log = example_log(tmp_path, 10)
    log.resume(3)
    log.close()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"step_00000{i}.jsonl" for i in (1, 2, 3)]
    log = example_log(tmp_path, 10)
    log.evaluation(0, {"accuracy": 0.1})
    log.close()
    example_log(tmp_path, 10).resume(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not list((tmp_path / "samples").iterdir())


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    log = example_log(tmp_path, 10)
    with pytest.raises(ConfigError, match=r"another process is running in .*; wait for it"):
        example_log(tmp_path, 10)
    log.close()
    example_log(tmp_path, 10).close()


def test_a_folder_whose_run_never_started_may_be_used_again(tmp_path: Path) -> None:
    example_log(tmp_path, 10).close()
    config = example_config(tmp_path, 10)
    other = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=11))
    refuse_other_config(tmp_path, other)
    log_steps(tmp_path, 1, 1)
    with pytest.raises(ConfigError, match=r"trainer.num_steps: 10 there, 11 here"):
        refuse_other_config(tmp_path, other)


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON .* fix or delete this line"):
        read_lines(path)


def test_a_folder_of_another_config_is_refused_with_the_fields(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 1)
    config = example_config(tmp_path, 10)
    other = dataclasses.replace(
        config,
        perception=dataclasses.replace(config.perception, coefficient=0.5, removing=("occlusion",)),
        trainer=dataclasses.replace(config.trainer, run_dir="elsewhere"),
    )
    with pytest.raises(ConfigError) as caught:
        RunLog(tmp_path, rank=0, config=other, plan_dict={}, total_steps=10, decode_token=str)
    text = str(caught.value)
    assert "perception.coefficient: 0.01 there, 0.5 here" in text
    assert "perception.removing: ['occlusion', 'zoom_crop'] there, ['occlusion'] here" in text
    assert "fix: choose another --trainer.run_dir" in text
    assert "trainer.run_dir:" not in text, "the folder's own name is no difference"
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 1, "a refused start writes nothing"
    example_log(tmp_path, 10)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_a_config_error(tmp_path: Path) -> None:
    config = example_config(tmp_path, 10)
    with pytest.raises(ConfigError, match=r"wandb is not installed; fix: pip install wandb, or leave"):
        RunLog(tmp_path, rank=0, config=config, plan_dict={}, total_steps=10, decode_token=str, wandb_project="cppo")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = example_config(tmp_path, 10)
    for start in (0, 2):
        log = RunLog(
            tmp_path, rank=0, config=config, plan_dict={}, total_steps=10, decode_token=str, wandb_project="cppo"
        )
        log.resume(start)
        for step in (start + 1, start + 2):
            with log.step(step) as record:
                record.add({"reward/mean": 0.5})
        log.close()
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))) >= 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_tensorboard_has_the_curves_and_hides_what_a_resume_forgot(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 5)
    log_steps(tmp_path, 3, 6, resume=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[5][1] == pytest.approx(6 / 7, rel=1e-6)
    assert len(events.Scalars("seconds/total")) == 6
    assert [event.step for event in events.Scalars("evaluation/accuracy")] == [2, 4, 6]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_on(stream: io.StringIO, seconds: float) -> str:
    clock = Clock()
    progress = Progress("evaluate", 200, stream, clock)
    for _ in range(200):
        clock.now += seconds / 200
        progress.advance(1)
    progress.close()
    return stream.getvalue()


def test_progress_is_quiet_for_short_phases() -> None:
    assert progress_on(io.StringIO(), 2.9) == progress_on(Terminal(), 2.9) == ""


def test_progress_in_a_file_is_a_line_every_ten_seconds() -> None:
    lines = progress_on(io.StringIO(), 50.0).splitlines()
    assert lines[0] == "evaluate 12/200  4/s  eta 47s"
    assert [line.split()[1] for line in lines] == ["12/200", "52/200", "92/200", "132/200", "172/200", "200/200"]
    assert lines[-1] == "evaluate 200/200 in 50s"


def test_progress_on_a_terminal_redraws_one_line() -> None:
    text = progress_on(Terminal(), 40.0)
    assert text.count("\n") == 1
    assert text.endswith("\revaluate 200/200 in 40s\x1b[K\n")
    assert text.count("\r") > 100


def test_durations() -> None:
    seconds = (0.4, 59.4, 59.6, 130, 3599.7, 11100, 90000, 187300)
    assert [duration(value) for value in seconds] == [
        *("0s", "59s", "1m00s", "2m10s", "1h00m", "3h05m", "1d01h", "2d04h"),
    ]


def test_the_folder_says_how_it_was_made(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 1)
    assert (tmp_path / "command.txt").read_text() == shlex.join(sys.orig_argv) + "\n"
    assert json.loads((tmp_path / "plan.json").read_text())["world_size"] == 4
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["run_dir"] == os.fspath(tmp_path)
