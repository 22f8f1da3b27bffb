"""A training checkpoint of any layout is loaded in any other: weights, masters and moments to the bit, and the next
step's gradients are those of the layout that wrote it. Megatron-Core's own loader reads it, too.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cppo import families
from megatron_cppo.algo.objective import OBJECTIVES
from megatron_cppo.convert.checkpoints import MegatronCheckpoint, Model
from megatron_cppo.data.packing import build_batch
from megatron_cppo.families.rules import mapped
from megatron_cppo.storage import torch_dist
from tests.distributed import matrix, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import relative_l2
from tests.distributed.matrix import FAMILIES, Layout

GRADIENT = 1e-5
TRAINING: dict[str, Any] = {
    "optimizer__learning_rate": 1e-3,
    "optimizer__warmup_updates": 0,
    "optimizer__weight_decay": 0.1,
    "trainer__num_steps": 4,
}
DENSE = (
    Layout(2, distributed_optimizer=True),
    Layout(4, tp=2, sp=True, pp=2, vpp=2),
    Layout(),
    Layout(2, pp=2, vpp=2),
    Layout(4, cp=2, distributed_optimizer=True),
    Layout(4, tp=2, sp=True, distributed_optimizer=True),
    Layout(3, pp=3),
)
EXPERTS = (
    Layout(2, ep=2, distributed_optimizer=True),
    Layout(4, tp=2, sp=True, pp=2, ep=2),
    Layout(),
    Layout(4, tp=2, sp=True, ep=4),
    Layout(4, pp=2, vpp=2, ep=2, distributed_optimizer=True),
)
PRECISIONS = {"qwen2_5_vl": "bf16"}
"""The other families in fp32, which has no masters."""


@dataclass(frozen=True)
class Case:
    """Load the checkpoint in `source` (train and save one there, when it is None) and save what was loaded."""

    model: str
    layout: Layout
    precision: str
    source: Path | None
    target: Path


@dataclass(frozen=True)
class Seen:
    """What a rank saw: the gradient after the load, what its engine would get, and what Megatron-Core's loader gave it
    otherwise."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    read_by_megatron: list[str]


def run_cases(rank: int, world_size: int, cases: dict[Any, Case]) -> dict[Any, Seen]:
    return {name: run_case(case, world_size) for name, case in cases.items()}


def run_case(case: Case, world_size: int) -> Seen:
    from megatron_cppo.policy import groups as process_groups
    from megatron_cppo.policy.policy import Policy

    config = tiny_model.make_config(case.model, world_size, **{**case.layout.fields(), **TRAINING})
    plan = tiny_model.make_plan(config)
    # A plan refuses bf16 on a CPU, which computes in fp32: here nothing is computed in it.
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, precision=case.precision))
    policy = Policy(config, plan, pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    if case.source is None and case.precision == "bf16":
        fill(policy)
    elif case.source is None:
        for number in range(2):
            policy.update(policy.score(planned(plan, number), old=False, reference=False))
    else:
        assert policy.restore(case.source) == {"step": 2}
    policy.save(case.target, at_step=2, progress={}, keep=1)
    unlike = differing_from_megatron(policy, case.target / "step_000002")
    gradients = {}
    if not case.layout.distributed_optimizer and case.precision == "fp32":
        gradients = next_gradients(policy, planned(plan, 2))
    weights = {name: tensor.detach().clone() for name, tensor in policy.weights()}
    process_groups.destroy()
    return Seen(gradients, weights, unlike)


def fill(policy: Any) -> None:
    """Give every weight, master and moment a number that depends on its place in the whole model alone."""
    from megatron_cppo.policy import held
    from megatron_cppo.policy.checkpoint import initialise_adam

    initialise_adam(policy.trained)
    for item in held.items(policy.trained):
        generator = torch.Generator().manual_seed(zlib.crc32(item.key.encode()))
        whole = torch.rand(item.held.size, generator=generator)
        for piece in item.held.pieces(item.start, item.start + item.tensor.numel()):
            rectangle = tuple(slice(at, at + count) for at, count in zip(piece.offset, piece.shape, strict=True))
            item.tensor[piece.start - item.start : piece.stop - item.start] = whole[rectangle].reshape(-1)


def planned(plan: Any, number: int) -> Any:
    return build_batch(
        matrix.groups(number),
        views_for=OBJECTIVES["cppo"].views_for,
        num_updates=1,
        packing=plan.packing,
        score=True,
    )


def next_gradients(policy: Any, batch: Any) -> dict[str, Tensor]:
    from megatron_cppo.policy import step

    # The likelihood alone: a mask that hangs on rounding would say nothing of the weights.
    settings = dataclasses.replace(policy.settings, objective=OBJECTIVES["supervised"])
    step.gradients(policy.trained, batch, batch.updates[0], settings)
    return {name: tensor.detach().clone() for name, tensor in policy.gradients()}


def differing_from_megatron(policy: Any, folder: Path) -> list[str]:
    """The parameters that dist_checkpointing.load gives this rank otherwise than they are."""
    from megatron.core import dist_checkpointing

    wanted, sharded = {}, {}
    for number, chunk in enumerate(policy.trained.chunks):
        state = {name: tensor for name, tensor in chunk.state_dict().items() if isinstance(tensor, Tensor)}
        wanted[number] = {name: tensor.detach().clone() for name, tensor in state.items()}
        sharded[str(number)] = {k: v for k, v in chunk.sharded_state_dict().items() if not k.endswith("_extra_state")}
    found = dist_checkpointing.load(sharded, str(folder))
    wrong = [
        f"chunk {number}: {name}"
        for number, state in wanted.items()
        for name, tensor in state.items()
        if not torch.equal(found[str(number)][name], tensor)
    ]
    for number, chunk in enumerate(policy.trained.chunks):  # what is loaded is loaded into the model's own tensors
        chunk.load_state_dict(wanted[number])
    return wrong


def run_all(cases: dict[Any, Case]) -> dict[Any, list[Seen]]:
    """All cases, those of one number of ranks in the same processes."""
    found: dict[Any, list[Seen]] = {}
    for ranks in sorted({case.layout.ranks for case in cases.values()}):
        mine = {name: case for name, case in cases.items() if case.layout.ranks == ranks}
        seen = run_distributed(run_cases, ranks, mine, timeout_seconds=400)
        found |= {name: [rank[name] for rank in seen] for name in mine}
    return found


def layouts_of(family: str) -> Sequence[Layout]:
    return EXPERTS if family == "qwen3_vl_moe" else DENSE


SOURCES = [(family, layout) for family in FAMILIES for layout in layouts_of(family)[:2]]
PAIRS = [(family, source, target) for family, source in SOURCES for target in layouts_of(family)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, list[Seen]], dict[str, str]]:
    root = tmp_path_factory.mktemp("resharded")
    models = {
        family: tiny_model.make_checkpoint(
            tmp_path_factory.mktemp(family),
            family=family,
            vocab_size=matrix.VOCAB,
            num_layers=matrix.NUM_LAYERS,
            tied=matrix.TIED.get(family, False),
        )
        for family in FAMILIES
    }

    def case(family: str, layout: Layout, source: Path | None, target: Path) -> Case:
        return Case(models[family], layout, PRECISIONS.get(family, "fp32"), source, target)

    first = {
        (family, layout.name): case(family, layout, None, folder(root, family, layout)) for family, layout in SOURCES
    }
    found = run_all(first)
    second = {
        (family, source.name, target.name): case(
            family, target, folder(root, family, source), folder(root, family, source, target)
        )
        for family, source, target in PAIRS
    }
    return root, found | run_all(second), models


def folder(root: Path, family: str, *layouts: Layout) -> Path:
    return root / " to ".join([family, *(layout.name for layout in layouts)])


@pytest.mark.parametrize(
    ("family", "source", "target"), PAIRS, ids=[f"{family}, {a.name} to {b.name}" for family, a, b in PAIRS]
)
def test_a_checkpoint_of_one_layout_is_another_ones(family: str, source: Layout, target: Layout, runs: Any) -> None:
    root, seen, _ = runs
    written = torch_dist.Folder(folder(root, family, source) / "step_000002")
    again = torch_dist.Folder(folder(root, family, source, target) / "step_000002")
    assert written.keys == again.keys
    masters = [key for key in written.keys if key.startswith("optimizer.state.fp32_param.")]
    assert len(masters) == (len([k for k in written.keys if "exp_avg." in k]) if family in PRECISIONS else 0)
    unequal = [key for key in sorted(written.keys) if not torch.equal(whole(written, key), whole(again, key))]
    assert unequal == []
    moments = [whole(again, key) for key in sorted(again.keys) if ".exp_avg_sq." in key]
    assert moments, "no moments were saved"
    assert all(bool(moment.any()) for moment in moments), "moments of zero say nothing"
    assert all(rank.read_by_megatron == [] for rank in seen[family, source.name, target.name])


@pytest.mark.parametrize(
    ("family", "source", "target"), PAIRS, ids=[f"{family}, {a.name} to {b.name}" for family, a, b in PAIRS]
)
def test_the_offline_converter_finds_what_the_engine_gets(
    family: str, source: Layout, target: Layout, runs: Any
) -> None:
    root, seen, models = runs
    wanted = seen[family, source.name][0].weights
    saved = folder(root, family, source, target) / "step_000002"
    found = MegatronCheckpoint(saved, Model.of(Path(models[family])))
    assert found.sizes.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found.rows(name, 0, tensor.shape[0]), tensor), name


def whole(stored: torch_dist.Folder, key: str) -> Tensor:
    size = stored.size(key)
    return stored.read(key, offset=[0] * len(size), shape=size)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PRECISIONS])
def test_the_next_gradient_does_not_depend_on_the_layout(family: str, runs: Any) -> None:
    _, seen, _ = runs
    for source in layouts_of(family)[:2]:
        every = {
            target.name: seen[family, source.name, target.name][0].gradients
            for target in layouts_of(family)
            if not target.distributed_optimizer
        }
        wanted = every.pop("one rank")
        assert len(every) >= 2
        for name, found in every.items():
            errors = {key: relative_l2(found[key], wanted[key]) for key in wanted}
            worst = max(errors, key=lambda key: errors[key])
            print(f"{family}, saved in {source.name}, in {name}: {errors[worst]:.1e} {worst}")
            assert errors[worst] <= GRADIENT, (source.name, name, worst, errors[worst])


def saved_by_megatron(rank: int, world_size: int, model: str, folder: Path) -> dict[str, Tensor]:
    """Save a model with Megatron-Core's own saver; returns its tensors by their Hugging Face names."""
    from megatron.core import dist_checkpointing

    from megatron_cppo.policy.policy import Policy

    multiprocessing.current_process().daemon = False  # it has writers of its own
    layout = Layout(2, tp=2, sp=True)
    config = tiny_model.make_config(model, world_size, **{**layout.fields(), **TRAINING})
    policy = Policy(config, tiny_model.make_plan(config), pixels=tiny_model.pixels, banned_ids=tiny_model.BANNED)
    (chunk,) = policy.trained.chunks
    sharded = {k: v for k, v in chunk.sharded_state_dict().items() if not k.endswith("_extra_state")}
    dist_checkpointing.save(sharded, str(folder))
    return {name: tensor.clone() for name, tensor in policy.weights()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_megatrons_own_saver_wrote_is_read(family: str, tmp_path: Path) -> None:
    model = tiny_model.make_checkpoint(tmp_path / "hf", family=family, vocab_size=matrix.VOCAB, num_layers=2)
    (tmp_path / "saved").mkdir()
    wanted = run_distributed(saved_by_megatron, 2, model, tmp_path / "saved")[0]
    stored, shape = torch_dist.Folder(tmp_path / "saved"), families.read_shape(model)
    assert len(stored.keys) > 10
    for parameter in mapped(wanted, families.part(family, "mapping").RULES):
        sizes = parameter.place.sizes(shape)
        pieces = [wanted[name] for name in parameter.hf_names]
        joined = parameter.rule.join(pieces, shape)
        index = parameter.place.index
        size = stored.size(parameter.place.key)
        # Megatron-Core pads the vocabulary to a multiple of TP.
        assert size[: len(sizes)] == sizes
        assert size[len(sizes) + 1 :] == joined.shape[1:]
        found = stored.read(
            parameter.place.key,
            offset=(*index, *(0 for _ in joined.shape)),
            shape=(*(1 for _ in index), *joined.shape),
        )
        assert torch.equal(found.view(joined.shape), joined), parameter.name
