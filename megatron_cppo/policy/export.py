"""The trained weights as a Hugging Face folder: written by rank 0 from a stream in which all ranks take part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_cppo.config import UserError
from megatron_cppo.policy.agreement import together
from megatron_cppo.storage import hf_folder


class ExportError(UserError):
    """The exported folder could not be written; an earlier one of its name is as it was."""


def export(weights: Iterator[tuple[str, Tensor]], *, source: str, folder: Path) -> None:
    """Write `weights` (official names, whole) as a folder like `source`. Called by all ranks.

    Raises ExportError, the same on all ranks, when the file system refuses.
    """

    def work() -> None:
        if dist.get_rank() == 0:
            hf_folder.write(weights, source=source, target=str(folder))
        else:
            for _ in weights:
                pass

    def failure(lines: list[str]) -> ExportError:
        told = "\n".join(f"  {line}" for line in lines)
        return ExportError(
            f"export {folder} could not be written:\n{told}\n"
            "fix: make room there (or mend what is refused) and start the same command again: it goes on from the last "
            "checkpoint, and exports"
        )

    together(work, folder.parent, failure)
