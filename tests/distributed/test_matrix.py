"""Every family in every layout of the table: Hugging Face's numbers, and one rank's.

`pytest tests/distributed/test_matrix.py -rP` prints each measured error; `--write-errors FILE` keeps them for
docs/parallelism.md (`python -m tools.parallelism_table FILE`). Layouts of more than four ranks are marked `slow`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cppo.config import AlgorithmConfig, PerceptionConfig
from tests.distributed import dense_reference, matrix, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import drifted, relative_l2
from tests.distributed.matrix import FAMILIES, FAST, SLOW, Found, Layout

ONE_RANK = FAST[0]
LOGITS, AGAINST_DENSE = 2e-5, 1e-4
"""Bounds against Hugging Face's model: |difference| over max(1, max |logit|), and relative L2 of each gradient."""
LOSS, GRADIENT, DISPLACEMENT = 1e-6, 1e-5, 1e-4
"""Relative bounds against one rank; the last after three steps of gradient descent."""
MASK_NOISE = 1e-4
"""No mask may hang on less than this many nats; fp32 entropies of two layouts differ by about 1e-6."""

CASES = [
    pytest.param(family, layout, id=f"{family}, {layout.name}", marks=[pytest.mark.slow] if layout in SLOW else [])
    for layout in (*FAST, *SLOW)
    for family in FAMILIES
    if layout.suits(family)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        family: tiny_model.make_checkpoint(
            tmp_path_factory.mktemp(family),
            family=family,
            vocab_size=matrix.VOCAB,
            num_layers=matrix.NUM_LAYERS,
            tied=matrix.TIED.get(family, False),
        )
        for family in FAMILIES
    }


def _asked_for(items: list[pytest.Item]) -> Iterator[tuple[str, Layout]]:
    """The families and layouts of the tests that were selected."""
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        if item.path == Path(__file__) and "layout" in values:
            yield values["family"], values["layout"]


@pytest.fixture(scope="module")
def answers(folders: dict[str, str], request: pytest.FixtureRequest) -> dict[tuple[str, str], Found]:
    """All chosen cases, one process group for each number of ranks."""
    chosen = set(_asked_for(request.session.items))
    chosen |= {(family, ONE_RANK) for family in FAMILIES}
    found: dict[tuple[str, str], Found] = {}
    for ranks in sorted({layout.ranks for _, layout in chosen}):
        cases = [(family, layout, folders[family]) for family, layout in chosen if layout.ranks == ranks]
        cases.sort(key=lambda case: (case[0], case[1].name))
        answer = run_distributed(matrix.run_all, ranks, cases, timeout_seconds=900)[0]
        found |= answer
    return found


@pytest.fixture(scope="module")
def dense(folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Hugging Face's model of each family: logits, and gradients of the likelihood and of the whole objective."""
    return {family: _dense(folder) for family, folder in folders.items()}


def _dense(folder: str) -> dict[str, Any]:
    model = dense_reference.load(folder)
    samples = [sample for group in matrix.groups(0) for sample in group.samples]
    logits = [dense_reference.response_logits(model, sample, "original") for sample in samples]
    logp = [
        dense_reference.log_softmax(part, tiny_model.BANNED).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        for part, sample in zip(logits, samples, strict=True)
    ]
    likelihood = dense_reference.gradients(model, -torch.cat(logp).mean())
    old, reference = drifted(samples, [values.detach() for values in logp])
    config = tiny_model.make_config(folder, 1, **matrix.DESCENT)
    algorithm: AlgorithmConfig = config.algorithm
    perception: PerceptionConfig = config.perception
    loss = dense_reference.objective(model, samples, algorithm, perception, old, reference)
    return {
        "logits": [part.detach() for part in logits],
        "likelihood": likelihood,
        "objective": dense_reference.gradients(model, loss),
        "loss": float(loss),
    }


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[str, float]:
    """The tensor with the largest relative L2 error, and the error; all must be there."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
    errors = {name: relative_l2(found[name], wanted[name]) for name in wanted if wanted[name].norm() > 0}
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_hangs_on_rounding(family: str, answers: dict[tuple[str, str], Found]) -> None:
    found = answers[family, ONE_RANK.name]
    masked = [sum(sum(mask) for mask in step if mask is not None) for step in found.masks]
    print(f"{family}: least margin of the three updates' masks {found.margin:.1e} nat, masked tokens {masked}")
    assert found.margin > MASK_NOISE
    assert min(masked) >= 3
    assert sum(masked) >= 10


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_numbers_are_hugging_faces_and_one_ranks(
    family: str, layout: Layout, answers: Any, dense: Any, request: pytest.FixtureRequest
) -> None:
    found, wanted, one = answers[family, layout.name], dense[family], answers[family, ONE_RANK.name]
    scale = max(1.0, max(float(part.abs().max()) for part in wanted["logits"]))
    logits = max(float((a - b).abs().max()) for a, b in zip(found.logits, wanted["logits"], strict=True)) / scale
    errors = {
        "logits": logits,
        "loss": abs(found.losses[0] - one.losses[0]) / abs(one.losses[0]),
        "displacement": worst(found.displacement, one.displacement)[1],
    }
    dense_loss = abs(found.losses[0] - wanted["loss"]) / abs(wanted["loss"])
    named = {}
    if found.gradients:
        named["likelihood"] = worst(found.likelihood, wanted["likelihood"])
        named["objective"] = worst(found.gradients, wanted["objective"])
        named["gradient"] = max(
            worst(found.gradients, one.gradients), worst(found.likelihood, one.likelihood), key=lambda pair: pair[1]
        )
        errors |= {name: error for name, (_, error) in named.items()}
    print(f"{family:12} {layout.name:44} " + "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    _write(request, family, layout, errors)
    assert found.masks == one.masks
    assert errors["logits"] <= LOGITS
    assert dense_loss <= 1e-5
    assert errors["loss"] <= LOSS
    assert errors["displacement"] <= DISPLACEMENT
    assert bool(found.gradients) == (not layout.distributed_optimizer)
    for name, bound in (("likelihood", AGAINST_DENSE), ("objective", AGAINST_DENSE), ("gradient", GRADIENT)):
        assert errors.get(name, 0.0) <= bound, (name, named.get(name))


def _write(request: pytest.FixtureRequest, family: str, layout: Layout, errors: dict[str, float]) -> None:
    """Append to the file of `--write-errors`, if one was given."""
    path = request.config.getoption("--write-errors")
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps({"family": family, "layout": layout.name, "ranks": layout.ranks, **errors}) + "\n")
