"""A data file that is written while the tensors that it is made of change, and rectangles of flat ranges."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cppo.policy.checkpoint import restore_adam_steps
from megatron_cppo.policy.saving import Piece, Saving
from megatron_cppo.storage import torch_dist
from megatron_cppo.storage.rectangles import Held, Rows, rectangles, share

NUM_PIECES, PIECE = 64, (512, 1024)


def tensors() -> list[torch.Tensor]:
    return [torch.full(PIECE, float(number)) for number in range(NUM_PIECES)]


def pieces(values: list[torch.Tensor]) -> list[Piece]:
    size = (NUM_PIECES, *PIECE)
    return [Piece("stack", size, (number, 0, 0), value[None]) for number, value in enumerate(values)]


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_is_what_was_there_when_it_began(background: bool, tmp_path: Path) -> None:
    values = tensors()
    saving = Saving(pieces(values), tmp_path, "__0_0", background=background)
    saving.detach()
    for value in values:
        value.fill_(-1.0)
    # A thread cannot have written 128 MiB at once; nothing needs to be copied of what is on the disk.
    assert (saving.copied_bytes > 0) == background
    written = saving.result()
    assert saving.is_done
    torch_dist.write_index(tmp_path, written.chunks, common={})
    read = torch_dist.Folder(tmp_path).read("stack", offset=(0, 0, 0), shape=(NUM_PIECES, *PIECE))
    assert torch.equal(read, torch.stack(tensors()))


def test_a_refusal_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    saving = Saving(pieces(tensors()), tmp_path / "absent", "__0_0", background=True)
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp"):
        saving.result()


def test_any_flat_range_is_a_few_rectangles_in_order() -> None:
    draw = random.Random(5)
    for _ in range(2000):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        numbers = torch.arange(math.prod(shape)).view(shape)
        start, stop = sorted(draw.choices(range(numbers.numel() + 1), k=2))
        found = list(rectangles(shape, start, stop))
        assert len(found) <= 2 * len(shape) - 1
        cut = [numbers[tuple(slice(a, a + n) for a, n in zip(*each, strict=True))].reshape(-1) for each in found]
        assert torch.equal(torch.cat([*cut, numbers.new_empty(0)]), numbers.view(-1)[start:stop]), (shape, start, stop)


def test_shards_make_the_stored_tensor_whatever_ranges_they_are_cut_into() -> None:
    """Gate over up, each cut over TP, in a stack of layers; ranges deal the numbers over any number of ranks."""
    rows, columns, layer, layers = 6, 4, 1, 3
    for tensor_parallel in (1, 2, 3):
        count = rows // tensor_parallel
        stored = torch.zeros(layers, 2 * rows, columns)
        for rank in range(tensor_parallel):
            two = (Rows(0, count, rank * count), Rows(count, count, rows + rank * count))
            held = Held("fc1", tuple(stored.shape), (layer,), (2 * count, columns), two)
            for ranks in (1, 2, 5):
                for owner in range(ranks):
                    for piece in held.pieces(*share(held.numel, owner, ranks)):
                        where = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.shape, strict=True))
                        assert math.prod(piece.shape) == piece.stop - piece.start
                        stored[where] += 1
        assert torch.equal(stored[layer], torch.full((2 * rows, columns), 3.0)), "each number once for each dealing"
        assert not stored[0].any()
        assert not stored[2].any()


def test_padding_is_stored_nowhere() -> None:
    held = Held("embedding", (5, 2), (), (3, 2), (Rows(0, 2, 3),))
    assert [tuple(piece) for piece in held.pieces(0, 6)] == [(0, 4, (3, 0), (2, 2))]
    assert list(held.pieces(4, 6)) == []


def test_after_a_refusal_nothing_more_is_copied(tmp_path: Path) -> None:
    saving = Saving(pieces(tensors()), tmp_path / "absent", "__0_0", background=False)
    saving.detach()
    assert saving.copied_bytes == 0


def test_an_adam_that_counts_by_groups_is_told_of_the_updates_so_far() -> None:
    """Transformer Engine's and Apex's: their first update after a load would else correct warm moments as if cold."""

    class Grouped(torch.optim.SGD):
        """Keeps its count where those do."""

    updates = 7
    weight = torch.nn.Parameter(torch.zeros(2))
    grouped, plain = Grouped([weight], lr=0.1), torch.optim.AdamW([weight], lr=0.1)
    plain.state[weight] = {"step": torch.zeros(()), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    chained = [SimpleNamespace(optimizer=grouped), SimpleNamespace(optimizer=plain)]
    trained: Any = SimpleNamespace(
        optimizer=SimpleNamespace(chained_optimizers=chained), schedule=SimpleNamespace(num_steps=updates)
    )
    restore_adam_steps(trained)
    assert [group["step"] for group in grouped.param_groups] == [updates]
    assert float(plain.state[weight]["step"]) == updates
