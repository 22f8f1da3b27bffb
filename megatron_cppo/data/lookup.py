"""The prompt of a row by its number: for groups that were saved, and name their prompts so."""

from __future__ import annotations

import dataclasses

from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.types import Prompt

ROWS_AT_ONCE = 64


class RowFinder:
    """Callable: (row, epoch) -> the prompt, or None when no usable row has this number.

    Goes through the first epoch as far as it must: a run's first rows come first.
    """

    def __init__(self, source: PromptSource) -> None:
        self._source = source
        self._seen = 0
        self._position: dict[int, int] = {}

    def __call__(self, row: int, epoch: int) -> Prompt | None:
        while row not in self._position and self._seen < len(self._source):
            count = min(ROWS_AT_ONCE, len(self._source) - self._seen)
            for place, prompt in enumerate(self._source.take(self._seen, count), self._seen):
                self._position[prompt.row] = place
            self._seen += count
        if row not in self._position:
            return None
        # An epoch changes the order of the rows and the views of the images: of a prompt, its number alone.
        return dataclasses.replace(self._source.take(self._position[row], 1)[0], epoch=epoch)
