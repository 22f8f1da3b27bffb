"""What do rollouts by vLLM cost next to the embedded engine, a sync of weights next to a copy, each phase of a step?

    python -m benchmarks.rollouts [--python .venv-vllm/bin/python] [--repeats 5] [--parts samples sync phases]

One real vLLM server on this CPU (`make test-vllm` makes its environment), fp32, one thread each.

samples: samples/s on the demo's questions (random weights, so that answers are as long as they may be), the embedded
engine and vLLM taking turns; sequences decoded at once and longest answer as named.
sync: a model of --sync-mib MiB goes to the server through shared memory and by a gloo broadcast, for several bucket
sizes: seconds, bytes and buckets of a sync, next to a plain copy of the same tensors into one buffer that is in memory
(the floor: every byte is moved once). What a sync does besides moving bytes (pausing, emptying caches, checking the
version) is timed by a sync of the demo's model, which has next to no bytes.
phases: the demo's recipe from its warm start or, without one, from random weights, with every engine: the share of a
step that each phase takes.

Tables give medians [quartiles]; ratios are of two times of the same repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.stopwatch import machine
from examples import digits_demo
from examples.digits import make_data, make_model
from megatron_cppo.config import Config, VllmConfig
from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.data.tokenizer import vocabulary
from megatron_cppo.plan import resolve
from megatron_cppo.rollout.build import Needs, build, server_plan, vllm_engine
from megatron_cppo.rollout.engine import Engine
from megatron_cppo.rollout.vllm import VllmEngine
from megatron_cppo.types import Prompt

ARGUMENTS = ("max-num-batched-tokens=32768",)
Kind = Literal["embedded", "vllm"]
NUM_PROMPTS, SAMPLES_PER_PROMPT = 32, 8


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some repeats."""

    low: float
    median: float
    high: float

    def text(self, form: str) -> str:
        """For a table."""
        return f"{self.median:{form}} [{self.low:{form}}, {self.high:{form}}]"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(low, median, high)


def wider_model(small: Path, folder: Path, mib: int) -> None:
    """A checkpoint like `small` with a decoder of about `mib` MiB in fp32."""
    make_model(folder, seed=0, tied=False)
    config = AutoConfig.from_pretrained(small)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 1024, 8, 4
    text.intermediate_size, text.tie_word_embeddings = 4096, False
    config.vision_config.out_hidden_size, config.tie_word_embeddings = 1024, False
    size = text.hidden_size // text.num_attention_heads  # rope's sections are of half a head
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [size // 8, 3 * size // 16, 3 * size // 16]}
    per_layer = 3 * 1024 * 4096 + 2 * 1024 * 1024 + 2 * 1024 * 512
    text.num_hidden_layers = max(1, round(mib * 2**20 / 4 / per_layer))
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    AutoModelForImageTextToText.from_config(config).float().save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Task:
    """A model's folder, the demo's questions, and the config that samples answers to them."""

    config: Config
    source: PromptSource

    @property
    def prompts(self) -> list[Prompt]:
        """The same ones each time."""
        return self.source.take(0, NUM_PROMPTS)


def make_task(folder: Path, model: Path, python: str, *, tokens: int, sequences: int, logs: Path) -> Task:
    """`folder` holds the data, `model` the checkpoint; answers end at `tokens`, `sequences` are decoded at once."""
    base = digits_demo.config(folder)
    config = replace(
        base,
        model=replace(base.model, path=str(model)),
        data=replace(base.data, train=(str(folder / "train.parquet"),), evaluation=()),
        rollout=replace(base.rollout, max_response_tokens=tokens, max_sequences=sequences),
        vllm=VllmConfig(python=python, arguments=ARGUMENTS),
        policy=replace(base.policy, tensor_parallel=1, max_tokens_per_microbatch=8192),
        trainer=replace(base.trainer, num_gpus=1, run_dir=str(logs)),
    )
    source = PromptSource(
        config.data.train,
        split="train",
        model_path=config.model.path,
        data=config.data,
        model=config.model,
        perception=config.perception,
        seed=0,
    )
    return Task(config, source)


@contextmanager
def engine_of(task: Task, kind: Kind, *, transport: str = "shm", bucket_bytes: int = 2**29) -> Iterator[Engine]:
    """An engine with the checkpoint's weights."""
    config = replace(task.config, rollout=replace(task.config.rollout, engine=kind))
    words = vocabulary(config.model.path)
    weights = checkpoint(config)
    needs = Needs(
        pixels=task.source.pixels,
        picture=task.source.png,
        decode=words.decode,
        weights=lambda: iter(weights.items()),
        beat=lambda: None,
        banned_ids=words.banned_ids,
        end_ids=words.eos_ids,
        max_images=1,
        key="",
        local_rank=0,
        environment=os.environ,
    )
    plan = resolve(config)
    if kind == "vllm":
        servers = replace(server_plan(config, max_images=1), transport=transport, bucket_bytes=bucket_bytes)
        made: Any = vllm_engine(config, plan, needs, None, servers=servers)
    else:
        made = build(config, plan, needs, group=None)
    with closing(made):
        made.load_weights(iter(weights.items()), version=0)
        yield made


def checkpoint(config: Config) -> dict[str, Tensor]:
    """All tensors of the model's folder."""
    files = sorted(Path(config.model.path).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def samples_table(folder: Path, python: str, repeats: int) -> Iterator[str]:
    """Samples and tokens a second of both engines."""
    yield "| at once | longest answer | engine | samples/s | tokens/s | vLLM / embedded |"
    yield "|---|---|---|---|---|---|"
    for sequences, tokens in ((16, 32), (256, 32), (16, 256), (256, 256)):
        task = make_task(folder, folder / "model", python, tokens=tokens, sequences=sequences, logs=folder / "logs")
        rates: dict[Kind, list[tuple[float, float]]] = {"embedded": [], "vllm": []}
        with engine_of(task, "embedded") as embedded, engine_of(task, "vllm") as vllm:
            for repeat in range(-1, repeats):  # the first warms up
                for kind, engine in (("embedded", embedded), ("vllm", vllm)):
                    start = time.perf_counter()
                    groups = engine.generate(
                        task.prompts, samples_per_prompt=SAMPLES_PER_PROMPT, temperature=1.0, salt=repeat + 1
                    )
                    took = time.perf_counter() - start
                    answers = [sample for group in groups for sample in group.samples]
                    if repeat >= 0:
                        rates[kind].append((len(answers) / took, sum(len(a.token_ids) for a in answers) / took))
        ratio = spread([v[0] / e[0] for e, v in zip(rates["embedded"], rates["vllm"], strict=True)])
        for kind, measured in rates.items():
            answers_s, tokens_s = (spread([pair[part] for pair in measured]) for part in (0, 1))
            last = ratio.text(".2f") if kind == "vllm" else "1"
            yield (f"| {sequences} | {tokens} | {kind} | {answers_s.text('.1f')} | {tokens_s.text(',.0f')} | {last} |")


def sync_table(folder: Path, python: str, repeats: int, mib: int) -> Iterator[str]:
    """Seconds of a sync by transport and bucket size, next to a copy of the same bytes."""
    wider_model(folder / "model", folder / "wide", mib)
    yield "| model | transport | bucket MiB | MiB | buckets | sync s | copy s | sync / copy |"
    yield "|---|---|---|---|---|---|---|---|"
    cases = [("model", "shm", 512)]
    cases += [("wide", transport, size) for transport in ("shm", "gloo") for size in (4, 16, 64, 128, 512)]
    for model, transport, size in cases:
        task = make_task(folder, folder / model, python, tokens=32, sequences=8, logs=folder / "logs")
        weights = checkpoint(task.config)
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        target = torch.zeros(num_bytes, dtype=torch.uint8)
        times, copies = [], []
        with engine_of(task, "vllm", transport=transport, bucket_bytes=size * 2**20) as made:
            assert isinstance(made, VllmEngine), made
            for repeat in range(repeats):
                start = time.perf_counter()
                _copy(weights, target)
                between = time.perf_counter()
                made.load_weights(iter(weights.items()), version=repeat + 1)
                copies.append(between - start)
                times.append(time.perf_counter() - between)
            sent, buckets = made.pushed
        ratios = spread([sync / copy for sync, copy in zip(times, copies, strict=True)])
        yield (
            f"| {'demo' if model == 'model' else 'wide'} | {transport} | {size} | {sent / 2**20:.1f} | {buckets} | "
            f"{spread(times).text('.3f')} | {spread(copies).text('.4f')} | {ratios.text('.1f')} |"
        )


def _copy(weights: dict[str, Tensor], target: Tensor) -> None:
    start = 0
    for tensor in weights.values():
        target[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        start += tensor.nbytes


def phases_table(folder: Path, python: str, steps: int) -> Iterator[str]:
    """The share of a step that each phase takes, in runs of the real command."""
    digits_demo.make_inputs(folder, seed=0)
    names = ("rollout", "reward", "batch", "score", "update", "sync")
    yield f"| engine | staleness | step s | {' | '.join(names)} | rest |"
    yield "|---" * (len(names) + 4) + "|"
    runs: tuple[tuple[Kind, int], ...] = (("embedded", 0), ("vllm", 0), ("vllm", 1))
    for kind, staleness in runs:
        base = digits_demo.config(folder, num_steps=steps)
        name = f"{kind}-{staleness}"
        digits_demo.run_stage(
            folder,
            name,
            replace(
                base,
                model=replace(base.model, path=str(folder / "model")),
                data=replace(base.data, evaluation=()),
                rollout=replace(base.rollout, engine=kind, max_staleness=staleness),
                vllm=VllmConfig(python=python, arguments=ARGUMENTS),
                trainer=replace(base.trainer, run_dir=str(folder / name), export=False, keep_samples_every_steps=0),
            ),
        )
        lines = [json.loads(line) for line in (folder / name / "timings.jsonl").read_text().splitlines()]
        told = [line for line in lines if line.get("step", 0) > 1 and "update" in line]  # the first compiles and checks
        totals = [line["total"] for line in told]
        shares = {n: statistics.fmean(line.get(n, 0.0) for line in told) / statistics.fmean(totals) for n in names}
        cells = [f"{share:.0%}" for share in (*shares.values(), 1 - sum(shares.values()))]
        yield f"| {kind} | {staleness} | {spread(totals).text('.2f')} | {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.path.abspath(".venv-vllm/bin/python"), help="an interpreter with vLLM")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of each run of `phases`")
    parser.add_argument("--sync-mib", type=int, default=512, help="weights of the wide model")
    parser.add_argument(
        "--parts", nargs="+", choices=["samples", "sync", "phases"], default=["samples", "sync", "phases"]
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", seed=3)
        make_data(folder, seed=3, num_train=256, num_warm=1, num_evaluation=1)
        tables = {
            "samples": lambda: samples_table(folder, given.python, given.repeats),
            "sync": lambda: sync_table(folder, given.python, given.repeats, given.sync_mib),
            "phases": lambda: phases_table(folder / "phases", given.python, given.steps),
        }
        for part in given.parts:
            print(f"\n### {part}\n", flush=True)
            for line in tables[part]():
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
