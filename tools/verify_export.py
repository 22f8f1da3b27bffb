"""Does the exported folder answer like the policy that was trained?

    python tools/verify_export.py RUN_DIR [--prompts 32]

Restores the run's newest checkpoint into Megatron-Core, in the run's own layout, streams its weights into the rollout
engine, and lets it answer held-out prompts greedily; then plain transformers loads RUN_DIR/export and answers the same
prompts. The answers must be equal token for token, and the policy's log-probs of them the engine's to 1e-4.
Exit status 1 when they are not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from megatron_cppo import launch
from megatron_cppo.config import Config
from megatron_cppo.plan import resolve
from megatron_cppo.ranks import leave
from megatron_cppo.train import quiet_libraries, read_config

MAX_GAP = 1e-4


def answer_as_trained(config: Config, num_prompts: int, output: Path) -> None:
    """On every rank of the run's layout: the trained policy's greedy answers; rank 0 writes them."""
    import torch.distributed as dist

    from megatron_cppo.assembly import build_run
    from megatron_cppo.data.packing import build_batch
    from megatron_cppo.policy import platform
    from megatron_cppo.train import join_ranks

    quiet_libraries(logging.NullHandler())
    platform.activate(config.policy.device)
    join_ranks(config.policy.device)
    plan = resolve(config)
    with build_run(config, plan, os.environ) as run:
        progress = run.policy.restore(Path(config.trainer.run_dir) / "checkpoints")
        assert progress is not None, f"{config.trainer.run_dir} holds no checkpoint; let the run finish first"
        assert run.evaluation is not None, f"{config.trainer.run_dir} has no evaluation rows"
        run.engine.load_weights(run.policy.weights(), version=progress["step"])
        groups = run.engine.generate(run.evaluation.prompts[:num_prompts], samples_per_prompt=1, temperature=0.0)
        batch = build_batch(
            groups,
            views_for=lambda _: ("original",),
            num_updates=1,
            packing=plan.packing,
            score=True,
        )
        scores = run.policy.score(batch, old=True, reference=False).old_logp or ()
        pairs = zip(batch.samples, scores, strict=True)
        gap = max(abs(a - b) for sample, logp in pairs for a, b in zip(sample.logp, logp.tolist(), strict=True))
        if dist.get_rank() == 0:
            answers = [sample.token_ids for sample in batch.samples]
            output.write_text(json.dumps({"step": progress["step"], "gap": gap, "answers": answers}))
    dist.destroy_process_group()


def answer_from_export(config: Config, num_prompts: int) -> list[list[int]]:
    """Greedy answers of plain transformers, from the exported folder alone."""
    import torch
    from transformers import AutoModelForImageTextToText

    from megatron_cppo.data.damage import leave_out_damaged
    from megatron_cppo.data.prompts import PromptSource
    from megatron_cppo.data.tokenizer import vocabulary

    folder = str(Path(config.trainer.run_dir) / "export")
    quiet_libraries(logging.NullHandler())
    words = vocabulary(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    source = PromptSource(
        config.data.evaluation,
        split="evaluation",
        model_path=folder,
        data=config.data,
        model=config.model,
        perception=config.perception,
        seed=config.trainer.seed,
        max_rows=config.trainer.evaluation_rows,
    )
    leave_out_damaged(source, group=None)  # as the run does
    answers = []
    for prompt in source.take(0, min(num_prompts, len(source))):
        ids = torch.tensor([prompt.token_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.grids:
            inputs |= {
                "pixel_values": torch.cat([source.pixels(key) for key in prompt.images("original")]),
                "image_grid_thw": torch.tensor([(g.frames, g.height, g.width) for g in prompt.grids]),
                "mm_token_type_ids": (ids == words.image_token_id).long(),
            }
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=config.rollout.max_response_tokens,
            suppress_tokens=list(words.banned_ids),
            repetition_penalty=1.0,  # real checkpoints' generation_config.json asks for one
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def main(arguments: list[str]) -> int:
    """Compare and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts to answer")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # what a rank of this tool is told
    given = parser.parse_args(arguments)
    config = read_config(str(given.run_dir / "config.json"), ["--trainer.run-dir", str(given.run_dir)])
    if given.write is not None:
        answer_as_trained(config, given.prompts, given.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.json"
        command = [sys.executable, __file__, *arguments, "--write", str(output)]
        environment = dict(os.environ) | launch.loopback_interface() | {"OMP_NUM_THREADS": "1"}
        status = launch.run_ranks(command, num_ranks=config.trainer.num_gpus, environment=environment)
        if status:
            return status
        trained = json.loads(output.read_text())
    exported = answer_from_export(config, given.prompts)
    equal = sum(a == b for a, b in zip(trained["answers"], exported, strict=True))
    tokens = sum(len(answer) for answer in exported)
    print(
        f"step {trained['step']}: {equal} of {len(exported)} greedy answers equal token for token ({tokens} tokens); "
        f"Megatron-Core policy against engine: largest |log-prob difference| {trained['gap']:.1e}"
    )
    return 0 if equal == len(exported) and trained["gap"] <= MAX_GAP else 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
