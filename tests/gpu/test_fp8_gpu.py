"""FP8 against bf16 by every recipe that the GPU has, as a table; a training step in each; moments in bf16.

    pytest tests/gpu/test_fp8_gpu.py -rP

Skipped without a CUDA device or Transformer Engine: it has not run on a machine with both. The measuring code is that
of tests/distributed/test_precision_gap.py, which has.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_cppo import selfcheck
from megatron_cppo.config import OptimizerConfig
from megatron_cppo.precision import PRECISIONS, usable, version
from tests import precision_gap
from tests.precision_gap import Seen, gap, table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine, which computes FP8"
    ),
]
NUM_STEPS = 200
RECIPES = [name for name, entry in PRECISIONS.items() if entry.recipe]


def available() -> list[str]:
    """The recipes of this GPU."""
    found = usable(torch.cuda.get_device_capability(), version(torch.version.cuda or ""))
    return [name for name in RECIPES if name in found]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fp8")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    yield folder
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(world: Path) -> dict[str, Seen]:
    """By precision; "bf16" is a second look, and what the kernels' order of sums makes of the first one."""
    others = ("bf16", *available())
    base, found = precision_gap.measure(world, device="cuda", base="bf16", others=others, num_steps=NUM_STEPS)
    print(f"{torch.cuda.get_device_name()}, all layers in FP8, {len(base.logp_N)} tokens")
    print(table(base, found))
    return {"base": base, **{one.precision: one for one in found}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16_and_its_step_is_finite(recipe: str, seen: dict[str, Seen]) -> None:
    if recipe not in seen:
        pytest.skip(f"{torch.cuda.get_device_name()} does not compute in {recipe}")
    base, one = seen["base"], seen[recipe]
    found, noise = gap(base, one), gap(base, seen["bf16"])
    print(f"{recipe}: {found}")
    assert noise.mean < found.mean <= selfcheck.MAX_LOGP_GAP["fp8"]  # were nothing in FP8, there would be no gap
    assert found.rank_correlation > 0.5
    assert found.gradient < 1.0
    assert one.gradient_P.isfinite().all()
    assert one.metrics["optim/skipped_updates"] == 0.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_streamed_in_bf16_as_they_were_loaded(recipe: str, seen: dict[str, Seen]) -> None:
    if recipe not in seen:
        pytest.skip(f"{torch.cuda.get_device_name()} does not compute in {recipe}")
    assert seen[recipe].streamed
    weights = seen[recipe].weights
    assert weights.keys() == seen["base"].weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in seen["base"].weights.items())


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_blockwise"])
def test_parameters_in_fp8(recipe: str, world: Path, seen: dict[str, Seen], tmp_path: Path) -> None:
    """Masters are the folder's weights; what is streamed is FP8's; scoring the reference and a restore keep each byte.

    tests/distributed/test_quantized.py holds the same of a stand-in for Transformer Engine's tensors, in more layouts.
    """
    from megatron_cppo.loop import plan_batch
    from megatron_cppo.policy import held, quantized

    if recipe not in seen:
        pytest.skip(f"{torch.cuda.get_device_name()} does not compute in {recipe}")
    base = precision_gap.make_config(world / "trained", world, device="cuda", precision=recipe, objective="grpo")
    overrides = (*base.policy.megatron_overrides, "fp8_param=true")
    config = dataclasses.replace(
        base,
        algorithm=dataclasses.replace(base.algorithm, beta=0.1),
        policy=dataclasses.replace(base.policy, distributed_optimizer=True, megatron_overrides=overrides),
    )
    supervised = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, objective="supervised"))

    def held_bytes() -> list[torch.Tensor]:
        parameters = [p for p in policy.trained.parameters() if quantized.is_quantized(p)]
        assert parameters, "nothing is in FP8"
        # As bytes: scales in blocks are padded with what memory held.
        return [t.clone().view(torch.uint8) for parameter in parameters for t in quantized.stored(parameter)]

    def alike(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def masters() -> dict[str, torch.Tensor]:
        items = [item for item in held.items(policy.trained) if "fp32_param" in item.key]
        return {f"{item.key} {item.held.index}": item.tensor.clone() for item in items}

    with precision_gap.policy_of(config, recipe) as (policy, plan, _):
        batch = plan_batch(config, plan, precision_gap.answers(precision_gap.prompts(supervised)), score=True)
        for name, tensor in policy.weights():
            exact = seen["base"].weights[name].cuda().float()
            # Half a step of three bits and bf16's rounding; or half of the smallest step, 2^-10 of the scale, which may
            # be twice as large to be a power of two, and that of a matrix with larger numbers beside this one.
            bound = exact.abs() * (2**-4 + 2**-8) + exact.abs().max() * 2**-7 / 448
            assert ((tensor.float() - exact).abs() <= bound).all(), name
        assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters().values())
        loaded = held_bytes()
        scored = policy.score(batch, old=True, reference=True)
        assert alike(held_bytes(), loaded)
        assert scored.old_logp is not None
        assert scored.reference_logp is not None
        assert all(torch.equal(a, b) for a, b in zip(scored.old_logp, scored.reference_logp, strict=True))
        metrics = policy.update(scored)
        assert metrics["optim/skipped_updates"] == 0.0
        updated, exact_masters = held_bytes(), masters()
        assert not alike(updated[::2], loaded[::2]), "the numbers are as they were"
        policy.save(tmp_path, at_step=1, progress={}, keep=1)
    with precision_gap.policy_of(config, recipe) as (policy, _, _):
        policy.restore(tmp_path)
        assert alike(held_bytes(), updated)
        found = masters()
        assert found.keys() == exact_masters.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in exact_masters.items())


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise"])
def test_moments_in_bf16_are_trained_saved_and_loaded(
    precision: str, world: Path, seen: dict[str, Seen], tmp_path: Path
) -> None:
    """In bf16 Adam holds the master weights, in FP8 (but for delayed scales) Megatron-Core's optimizer does."""
    from megatron_cppo.loop import plan_batch
    from megatron_cppo.policy import held

    if precision not in seen:
        pytest.skip(f"{torch.cuda.get_device_name()} does not compute in {precision}")
    base = precision_gap.make_config(
        world / "trained", world, device="cuda", precision=precision, objective="supervised"
    )
    config = dataclasses.replace(
        base,
        policy=dataclasses.replace(base.policy, distributed_optimizer=True),
        optimizer=OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.95), state_precision="bf16"),
    )
    saved: list[dict[str, torch.Tensor]] = []
    for _ in range(2):  # the second one loads what the first one saved
        with precision_gap.policy_of(config, precision) as (policy, plan, source):
            if saved:
                policy.restore(tmp_path)
            else:
                answers = precision_gap.answers(source.take(0, precision_gap.PROMPTS_OF_A_STEP))
                policy.update(plan_batch(config, plan, answers, score=False))
                policy.save(tmp_path, at_step=1, progress={}, keep=1)
            items = list(held.items(policy.trained))
            kinds = {item.key.split(".")[2]: item.tensor.dtype for item in items if "optimizer.state" in item.key}
            assert kinds == {
                "fp32_param": torch.float32,
                "exp_avg": torch.bfloat16,
                "exp_avg_sq": torch.bfloat16,
            }
            saved.append({f"{item.key} {item.held.index}": item.tensor.detach().cpu().clone() for item in items})
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[1][key], tensor) for key, tensor in saved[0].items())
