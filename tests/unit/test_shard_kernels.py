"""Both kinds of kernels against dense float64 autograd, Triton's in its interpreter (`tests/conftest.py` switches it on
where there is no CUDA device); and Triton's compiled for a GPU that need not be there.

Shapes: N rows, W views, V columns of a shard (valid, then padding).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is built for Linux alone; there every kernel is tested")

from megatron_cppo.algo import shard_kernels_torch, shard_kernels_triton
from megatron_cppo.algo.kernels import Kernels, compiled_kernels, torch_kernels, triton_kernels
from megatron_cppo.algo.shard_statistics import Shard, coefficients, finish, merge

KERNELS = {"torch": torch_kernels, "triton": triton_kernels}
NUM_ROWS, VOCAB_SIZE, PADDING, TEMPERATURE = 5, 301, 19, 0.7
# Neighbours, a loner, and the last column of the vocabulary.
BANNED = (7, 8, 9, 150, 300)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler, and there is none"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """On a GPU where there is one, so that the compiled kernels are the ones that are tested."""
    with torch.device(DEVICE):
        yield


def dense(views: list[Tensor], targets: Tensor) -> Tensor:
    """Log-probs of W views, the entropy, K divergences, [2W, N]: written out over the whole vocabulary."""
    bias = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    bias[list(BANNED)] = -1e9
    logps = [(view / TEMPERATURE + bias).log_softmax(-1) for view in views]
    p = logps[0].exp()
    rows = [logp.gather(1, targets[:, None]).squeeze(1) for logp in logps]
    return torch.stack([*rows, -(p * logps[0]).sum(-1), *((p * (logps[0] - logp)).sum(-1) for logp in logps[1:])])


def views_of(num_views: int, *, scale: float, distance: float) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    first = scale * torch.randn(NUM_ROWS, VOCAB_SIZE, dtype=torch.float64) + 50
    others = [first + distance * torch.randn_like(first) - 20 * k for k in range(1, num_views)]
    sampleable = torch.tensor([i for i in range(VOCAB_SIZE) if i not in BANNED])
    return [first, *others], sampleable[torch.randint(len(sampleable), (NUM_ROWS,))]


def cut(views: list[Tensor], num_shards: int) -> list[tuple[Shard, list[Tensor]]]:
    """Every shard with its columns of the views; NaN in padding and in banned columns."""
    width = -(-(VOCAB_SIZE + PADDING) // num_shards)
    padded = [torch.nn.functional.pad(view, (0, num_shards * width - VOCAB_SIZE), value=torch.nan) for view in views]
    for view in padded:
        view[:, list(BANNED)] = torch.nan
    options = {"world_size": num_shards, "width": width, "vocab_size": VOCAB_SIZE}
    return [
        (
            Shard.of_rank(rank, temperature=TEMPERATURE, banned_ids=BANNED, **options),
            [view[:, rank * width : (rank + 1) * width].clone() for view in padded],
        )
        for rank in range(num_shards)
    ]


def statistics(kernels: Kernels, shards: list[tuple[Shard, list[Tensor]]], targets: Tensor) -> Tensor:
    parts = torch.stack([kernels.view_sums(part, targets, shard) for shard, part in shards])
    return finish(merge(parts, 1 / TEMPERATURE), 1 / TEMPERATURE)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(("scale", "distance"), [(1.0, 1.0), (20.0, 1e-3)])
def test_every_statistic_and_every_gradient_is_that_of_dense_float64(
    kind: str, num_views: int, num_shards: int, scale: float, distance: float
) -> None:
    kernels, (views, targets) = KERNELS[kind](), views_of(num_views, scale=scale, distance=distance)
    shards = cut(views, num_shards)
    given = statistics(kernels, shards, targets)
    leaves = [view.clone().requires_grad_() for view in views]
    expected = dense(leaves, targets)
    flat = torch.cat([given[:, 2], given[:, 3]])
    torch.testing.assert_close(flat, expected.detach(), rtol=1e-11, atol=1e-11)

    weights = torch.linspace(-1, 2, 2 * num_views * NUM_ROWS, dtype=torch.float64).view(2 * num_views, NUM_ROWS)
    (expected * weights).sum().backward()
    kl_weights = weights[num_views + 1 :] if num_views > 1 else None
    wanted = coefficients(given, weights[:num_views], weights[num_views], kl_weights, 1 / TEMPERATURE)
    for shard, part in shards:
        kernels.view_gradients(part, targets, wanted, shard, part)  # over the logits
        for leaf, gradient in zip(leaves, part, strict=True):
            assert leaf.grad is not None
            columns = slice(shard.start, shard.start + shard.num_valid)
            torch.testing.assert_close(gradient[:, : shard.num_valid], leaf.grad[:, columns], rtol=1e-9, atol=1e-11)
            assert (gradient[:, shard.num_valid :] == 0).all()
            assert (gradient[:, list(shard.banned)] == 0).all()


@needs_compiler
@pytest.mark.parametrize(("num_views", "dtype"), [(1, torch.float64), (3, torch.float64), (3, torch.bfloat16)])
def test_compiled_kernels_give_what_the_plain_ones_give(num_views: int, dtype: torch.dtype) -> None:
    """Any number of rows by the code that was compiled once; over the logits, and into another tensor."""
    views, targets = views_of(num_views, scale=3.0, distance=0.5)
    shards = cut([view.to(dtype) for view in views], 2)
    plain, compiled = torch_kernels(), compiled_kernels()
    wanted, given = (statistics(kernels, shards, targets) for kernels in (plain, compiled))
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 2, 2 * num_views * NUM_ROWS, dtype=wanted.dtype).view(2 * num_views, NUM_ROWS)
    kl_weights = weights[num_views + 1 :] if num_views > 1 else None
    given_coefficients = coefficients(wanted, weights[:num_views], weights[num_views], kl_weights, 1 / TEMPERATURE)
    for rows in (slice(0, NUM_ROWS), slice(1, 4)):
        for shard, part in shards:
            mine = [view[rows].clone() for view in part]
            expected = [torch.empty_like(view) for view in mine]
            chosen = given_coefficients.rows(rows)
            plain.view_gradients(mine, targets[rows], chosen, shard, expected)
            elsewhere = [torch.empty_like(view) for view in mine]
            compiled.view_gradients(mine, targets[rows], chosen, shard, elsewhere)
            compiled.view_gradients(mine, targets[rows], chosen, shard, mine)
            for one, other, reference in zip(mine, elsewhere, expected, strict=True):
                assert torch.equal(one, other)
                rounding = 2**-7 if dtype == torch.bfloat16 else 1e-12
                torch.testing.assert_close(one, reference, rtol=rounding, atol=1e-6 if rounding > 1e-3 else 1e-13)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("wanted", ["logp", "entropy", "kl"])
def test_a_gradient_that_is_not_asked_for_costs_none_and_changes_no_other(kind: str, wanted: str) -> None:
    kernels, (views, targets) = KERNELS[kind](), views_of(3, scale=2.0, distance=1.0)
    ((shard, part),) = cut(views, 1)
    given = statistics(kernels, [(shard, part)], targets)
    none, ones = torch.zeros(3, NUM_ROWS, dtype=torch.float64), torch.ones(3, NUM_ROWS, dtype=torch.float64)
    all_of = coefficients(
        given,
        ones if wanted == "logp" else none,
        ones[0] if wanted == "entropy" else none[0],
        ones[:2] if wanted == "kl" else none[:2],
        1 / TEMPERATURE,
    )
    lean = coefficients(
        given,
        ones if wanted == "logp" else none,
        ones[0] if wanted == "entropy" else None,
        ones[:2] if wanted == "kl" else None,
        1 / TEMPERATURE,
    )
    full = [torch.empty_like(view) for view in part]
    kernels.view_gradients(part, targets, all_of, shard, full)
    for left_out in range(3):
        out = [None if number == left_out else torch.full_like(view, 7.0) for number, view in enumerate(part)]
        kernels.view_gradients(part, targets, lean, shard, out)
        for one, other in zip(out, full, strict=True):
            assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_programs_that_share_a_row_merge_like_ranks(num_splits: int) -> None:
    torch.manual_seed(1)
    logits = 5 * torch.randn(3, 9000) + 30
    targets = torch.tensor([0, 4500, 8999])
    shard = Shard.of_rank(0, world_size=1, width=9000, vocab_size=9000, temperature=1.0, banned_ids=())
    given = finish(shard_kernels_triton.view_sums([logits], targets, shard, num_splits=num_splits), 1.0)[0]
    logp = logits.double().log_softmax(-1)
    expected = torch.stack([logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)])
    torch.testing.assert_close(given[2:].double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", KERNELS)
def test_bfloat16_logits_give_float32_statistics_and_gradients_one_rounding_away(kind: str) -> None:
    kernels = KERNELS[kind]()
    views, targets = views_of(3, scale=3.0, distance=0.5)
    half = [view.bfloat16() for view in views]
    ((shard, part),) = cut(half, 1)
    given = statistics(kernels, [(shard, part)], targets)
    assert given.dtype == torch.float32
    leaves = [view.double().requires_grad_() for view in half]
    expected = dense(leaves, targets)
    torch.testing.assert_close(torch.cat([given[:, 2], given[:, 3]]).double(), expected.detach(), rtol=0, atol=4e-6)
    expected.sum().backward()
    ones = torch.ones(3, NUM_ROWS)
    kernels.view_gradients(part, targets, coefficients(given, ones, ones[0], ones[:2], 1 / TEMPERATURE), shard, part)
    for leaf, gradient in zip(leaves, part, strict=True):
        assert leaf.grad is not None
        error = (gradient[:, :VOCAB_SIZE].double() - leaf.grad).abs()
        # Triton's interpreter cuts a float32 off where compiled code rounds it.
        rounding = 2**-7 if kind == "triton" and DEVICE == "cpu" else 2**-8
        assert (error <= rounding * leaf.grad.abs() + 4e-6).all(), error.max()


@pytest.mark.parametrize("kind", KERNELS)
def test_entropies_of_a_millionth_of_a_nat_keep_five_digits(kind: str) -> None:
    """The perception mask ranks by a ratio of entropies."""
    torch.manual_seed(5)
    logits = torch.randn(8, 1000) + 20
    logits[:, 7] += torch.linspace(20, 27, 8)
    shard = Shard.of_rank(0, world_size=1, width=1000, vocab_size=1000, temperature=1.0, banned_ids=())
    entropy = finish(KERNELS[kind]().view_sums([logits], torch.full((8,), 7), shard), 1.0)[0, 3]
    logp = logits.double().log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)
    assert expected.min() < 1e-6
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [*KERNELS, pytest.param("compiled", marks=needs_compiler)])
def test_what_is_no_number_leaves_none_in_its_row_alone(kind: str) -> None:
    """Or an update that must be skipped would be applied."""
    kernels = (KERNELS | {"compiled": compiled_kernels})[kind]()
    views = [torch.randn(3, 40) for _ in range(2)]
    views[1][1, 7] = torch.nan
    shard = Shard.of_rank(0, world_size=1, width=40, vocab_size=40, temperature=0.5, banned_ids=())
    targets = torch.tensor([1, 2, 3])
    given = finish(kernels.view_sums(views, targets, shard), 2.0)
    assert given[1, 2:, 1].isnan().all()
    assert given[:, :, [0, 2]].isfinite().all()
    ones = torch.ones(2, 3)
    out = [torch.empty_like(view) for view in views]
    kernels.view_gradients(views, targets, coefficients(given, ones, ones[0], ones[:1], 2.0), shard, out)
    assert out[1][1].isnan().any()
    assert all(gradient[[0, 2]].isfinite().all() for gradient in out)


@pytest.mark.parametrize("kind", KERNELS)
def test_logits_of_minus_infinity_and_ties_at_the_maximum(kind: str) -> None:
    logits = torch.tensor([[2.0, -torch.inf, 2.0, 0.0], [-torch.inf, -torch.inf, -5.0, -torch.inf]])
    shard = Shard.of_rank(0, world_size=1, width=4, vocab_size=4, temperature=0.5, banned_ids=())
    kernels, targets = KERNELS[kind](), torch.tensor([2, 2])
    given = finish(kernels.view_sums([logits], targets, shard), 2.0)
    p = (logits.double() * 2).softmax(-1)
    torch.testing.assert_close(given[0, 2].double(), p.gather(1, targets[:, None]).squeeze(1).log())
    torch.testing.assert_close(given[0, 3].double(), torch.special.entr(p).sum(-1), rtol=1e-6, atol=1e-7)
    ones = torch.ones(1, 2)
    kernels.view_gradients([logits], targets, coefficients(given, ones, ones[0], None, 2.0), shard, [logits])
    assert logits.isfinite().all()
    assert (logits[1] == 0).all()


def test_targets_of_any_stride_and_refused_views() -> None:
    views, targets = views_of(1, scale=1.0, distance=1.0)
    ((shard, part),) = cut(views, 1)
    strided = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    one, other = (KERNELS[kind]().view_sums(part, strided, shard) for kind in KERNELS)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="3 views at most, got 4; use backend torch"):
        shard_kernels_triton.view_sums(part * 4, targets, shard)
    with pytest.raises(ValueError, match="give contiguous logits"):
        shard_kernels_triton.view_sums([part[0].t().contiguous().t()], targets, shard)


def test_kinds_agree_in_float32_to_rounding() -> None:
    views, targets = views_of(3, scale=8.0, distance=0.1)
    ((shard, part),) = cut([view.float() for view in views], 1)
    one, other = (finish(KERNELS[kind]().view_sums(part, targets, shard), 1 / TEMPERATURE) for kind in KERNELS)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=4e-6)


def test_a_tile_is_a_shard_of_its_own() -> None:
    views, targets = views_of(2, scale=1.0, distance=1.0)
    ((shard, part),) = cut(views, 1)
    tiles = [shard.tile(first, min(first + 100, shard.num_valid)) for first in range(0, shard.num_valid, 100)]
    sums = [
        shard_kernels_torch.view_sums([view[:, t.start : t.start + t.num_valid] for view in part], targets, t)
        for t in tiles
    ]
    whole = shard_kernels_torch.view_sums(part, targets, shard)
    merged = merge(torch.stack(sums), 1 / TEMPERATURE)
    torch.testing.assert_close(finish(merged, 1 / TEMPERATURE), finish(whole, 1 / TEMPERATURE), rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError, match="columns 0 to 302 of 301"):
        shard.tile(0, 302)
    assert replace(shard, banned=()).tile(1, 3) == Shard(1, 2, (), 1 / TEMPERATURE)


COMPILE = """
import os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_cppo.algo import shard_kernels_triton as kernels
from megatron_cppo.algo import shard_kernels_triton_jit as jit

def compiled(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    # What Triton finds out at run time of a vocabulary whose shard is a multiple of 16: aligned pointers and widths.
    aligned = [n for n in names if types.get(n, "").startswith("*") or n.startswith("stride")
               or n in ("columns", "width", "num_valid")]
    source = ASTSource(kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

def longest_loop(binary):
    "Machine instructions of the loop over the columns; of the whole kernel, where there is none."
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    places, loops, number = {}, [], 0
    for line in text.splitlines():
        if label := re.match(r"(\\.L_\\w+):", line.strip()):
            places[label[1]] = number
        elif re.match(r"\\s+/\\*[0-9a-f]{4,}\\*/", line):
            number += 1
            back = re.search(r"BRA[^`]*`\\((\\.L_\\w+)\\)", line)
            if back and back[1] in places:
                loops.append(number - places[back[1]])
    return max((loop for loop in loops if loop > 2), default=number)

for logits in ("*bf16", "*fp32"):
    for views in (1, 2, 3):
        common = dict.fromkeys(("X", "Y", "Z"), logits) | {
            "TARGETS": "*i64", "RANGES": "*i32", "SCALES": "*fp32"}
        sums = compiled(jit.sums_kernel, common | {"SUMS": "*fp32"},
            {"NUM_VIEWS": views, "NUM_RANGES": 1, "LANES": kernels.FORWARD_COLUMNS[views] // kernels.EACH,
             "EACH": kernels.EACH})
        rows = dict.fromkeys(("MAXIMUM", "CONSTANT", "SLOPE", "CROSS", "OWN", "TARGET"), "*fp32")
        gradients = compiled(jit.gradients_kernel,
            common | rows | dict.fromkeys(("OUT_X", "OUT_Y", "OUT_Z"), logits),
            {"NUM_VIEWS": views, "HAS_SLOPE": True, "HAS_CROSS": views > 1, "WANTS_0": True, "WANTS_1": views > 1,
             "WANTS_2": views > 2, "NUM_RANGES": 1, "LANES": kernels.BACKWARD_COLUMNS})
        for name, binary in (("sums", sums), ("gradients", gradients)):
            nan = "max.NaN.f32" in binary.asm["ptx"]
            each = views * (kernels.FORWARD_COLUMNS[views] if name == "sums" else kernels.BACKWARD_COLUMNS) / 128
            spills = "st.local" in binary.asm["ptx"]
            print(name, logits, views, longest_loop(binary) / each, nan, len(binary.asm["cubin"]), spills)
"""


def test_the_kernels_compile_for_an_h100_without_spilling_registers() -> None:
    """Compiled to machine code for sm_90 by the assembler that Triton brings; no GPU is needed for that.

    The code must pass on what is no number, by max.NaN: the interpreter does so in any case.
    """
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    assert all(int(size) > 1000 and spills == "False" for *_, size, spills in lines), done.stdout
    assert all(nan == "True" for *_, nan, _, _ in lines), done.stdout
    for name, logits, views, instructions, *_ in lines:
        print(f"{name:9} of {views} views, {logits[1:]}: {float(instructions):.1f} machine instructions a logit")
        if logits == "*bf16":
            # An H100 (132 x 4 x 32 lanes at 1.76 GHz) issues about 25 in the time that it reads a bfloat16 logit at
            # 2.4 TB/s, and 50 in the time that it reads and writes one.
            assert float(instructions) < {"sums": 23, "gradients": 36}[name], done.stdout
