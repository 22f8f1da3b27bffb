"""Variants of Qwen2.5-VL against Hugging Face's model: logits, and gradients of log-likelihood and of CPPO.

`test_matrix.py` has every family in every layout; here are weights that are tied and a tower without windows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import dense_reference, tiny_model
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import (
    LAYOUTS,
    WORLD,
    Answer,
    Case,
    checkpoint,
    groups_of,
    relative_l2,
    run_cases,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "untied, windows": {},
    "tied, windows": {"tied": True},
    "untied, full vision attention": {"full_attention": True},
}
PARITY_LAYOUTS = ("TP1", "TP2", "TP2+SP", "DP2", "CP2", "PP2", "TP2xPP2", "TP2xPP2+SP", "PP2xDP2")
PAIRS = [(layout, variant) for layout in PARITY_LAYOUTS for variant in VARIANTS]
LIKELIHOOD = {"algorithm__objective": "supervised"}
CPPO = {"algorithm__objective": "cppo", "algorithm__beta": 0.1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: checkpoint(tmp_path_factory.mktemp("hf"), **variant) for name, variant in VARIANTS.items()}


@pytest.fixture(scope="module")
def answers(folders: dict[str, str]) -> dict[tuple[str, str, str], Answer]:
    cases: dict[int, dict[Any, Case]] = {}
    for layout, variant in PAIRS:
        fields, chosen = LAYOUTS[layout], cases.setdefault(WORLD[layout], {})
        chosen[layout, variant, "likelihood"] = Case(folders[variant], {**fields, **LIKELIHOOD}, logits=True)
        chosen[layout, variant, "cppo"] = Case(folders[variant], {**fields, **CPPO})
    found: dict[tuple[str, str, str], Answer] = {}
    for world, chosen in cases.items():
        answers = run_distributed(run_cases, world, chosen, timeout_seconds=300)
        for case in chosen:
            assert all(rank[case].metrics == answers[0][case].metrics for rank in answers), case
        found |= answers[0]
    return found


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[tuple[str, str], Any]:
    """Hugging Face's logits, and gradients of the log-likelihood and of the dense three-view CPPO objective."""
    found: dict[tuple[str, str], Any] = {}
    for variant, folder in folders.items():
        model = dense_reference.load(folder)
        samples = [sample for group in groups_of(Case(folder, {})) for sample in group.samples]
        logits = [dense_reference.response_logits(model, sample, "original") for sample in samples]
        found[variant, "logits"] = [part.detach() for part in logits]
        logp = [
            dense_reference.log_softmax(part, tiny_model.BANNED).gather(1, torch.tensor(s.token_ids)[:, None])
            for part, s in zip(logits, samples, strict=True)
        ]
        found[variant, "likelihood"] = dense_reference.gradients(model, -torch.cat(logp).mean())
        config = tiny_model.make_config(folder, 1, **CPPO)
        loss = dense_reference.objective(model, samples, config.algorithm, config.perception)
        found[variant, "cppo"] = dense_reference.gradients(model, loss)
    return found


@pytest.mark.parametrize(("layout", "variant"), PAIRS)
def test_logits_equal_hugging_face(layout: str, variant: str, answers: Any, references: Any) -> None:
    found, wanted = answers[layout, variant, "likelihood"].logits, references[variant, "logits"]
    scale = max(1.0, max(logits.abs().max().item() for logits in wanted))
    worst = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    print(f"logits    {layout:17} {variant:32} worst |difference| {worst:.1e}, bound {2e-5 * scale:.1e}")
    assert worst <= 2e-5 * scale


@pytest.mark.parametrize("objective", ["likelihood", "cppo"])
@pytest.mark.parametrize(("layout", "variant"), PAIRS)
def test_gradients_equal_hugging_face(layout: str, variant: str, objective: str, answers: Any, references: Any) -> None:
    found, wanted = answers[layout, variant, objective].gradients, references[variant, objective]
    assert found.keys() == wanted.keys()
    errors = {name: relative_l2(found[name], wanted[name]) for name in wanted if wanted[name].norm() > 0}
    name = max(errors, key=errors.__getitem__)
    print(f"gradients {layout:17} {variant:32} {objective:10} worst of {len(errors)}: {errors[name]:.1e} ({name})")
    assert len(errors) > 40
    assert errors[name] <= 1e-4
