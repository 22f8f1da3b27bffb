"""Prompts from rows: chat template, token ids with image tokens, positions, and the pixels of any view.

Owns the order of rows over epochs and the seeds of views. Must not know rollouts, rewards or Megatron.
Letters: T tokens; P patches of an image, D values of a patch.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from megatron_cppo import families
from megatron_cppo.config import DataConfig, ModelConfig, PerceptionConfig
from megatron_cppo.data.byte_cache import ByteCache
from megatron_cppo.data.images import ImageError
from megatron_cppo.data.pixels import PixelReader
from megatron_cppo.data.rows import IMAGE_MARKER, DataError, Row, RowDropped, Rows, usable
from megatron_cppo.data.tokenizer import TemplateRefusal, Vocabulary, vocabulary
from megatron_cppo.data.views import Kind, draw, preserving, removing
from megatron_cppo.types import ImageGrid, ImageKey, Prompt

Ids = npt.NDArray[np.int32]

CACHED_IMAGE_BYTES = 2**28
CACHED_PIXEL_BYTES = 2**28
ROWS_TOKENISED_AT_ONCE = 256
VIEW_FUNCTIONS = {"preserving": preserving, "removing": removing}


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row with its chat text, not tokenised yet."""

    row: int
    data_source: str
    ground_truth: str
    text: str
    response: str
    grids: tuple[ImageGrid, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is kept of a usable row: its token ids hold one placeholder per image, so all rows fit in memory."""

    draft: _Draft
    short_ids: Ids
    target: tuple[int, ...]


Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(name, total) -> a context that yields `advance(n)`; shows progress."""


@contextmanager
def _unwatched(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A phase that nobody watches."""
    yield lambda _: None


class PromptSource:
    """An endless, repeatable stream of prompts, and the pixels behind them.

    Rows that cannot become prompts are left out, and counted by reason in `dropped`. Raises DataError for files that
    cannot be used, or hold no usable row; CheckpointError for a checkpoint that cannot be; ViewError for unknown names.
    """

    dropped: dict[str, int]
    """Rows that were left out, by reason."""
    damaged: dict[int, str]
    """Usable rows of which an image was found not to decode, and why: what `data.damage` knows, alike on all ranks."""

    def __init__(
        self,
        files: Sequence[str],
        *,
        split: str,
        model_path: str,
        data: DataConfig,
        model: ModelConfig,
        perception: PerceptionConfig,
        seed: int,
        max_rows: int = 0,
        supervised: bool = False,
        max_response_tokens: int = 0,
        phase: Phase | None = None,
    ) -> None:
        self._split = split
        self._files = tuple(files)
        self._data = data
        self.damaged = {}
        self._seed = seed
        self._supervised = supervised
        self._max_response_tokens = max_response_tokens
        self._shuffle = data.shuffle and split == "train"
        self._view_names: dict[Kind, tuple[str, ...]] = {
            "preserving": perception.preserving,
            "removing": perception.removing,
        }
        for kind, names in self._view_names.items():
            draw(kind, 0, names)  # unknown names fail now, not at the first gated sample
        self._vocabulary: Vocabulary = vocabulary(model_path)
        self._rope_positions = families.part(families.read_shape(model_path).family, "positions").rope_positions
        self._reader = PixelReader(model_path, model, max_image_pixels=data.max_image_pixels)
        self._rows = Rows(files)
        with (phase or _unwatched)(f"read {split}", len(self._rows)) as advance:
            self.dropped, self._entries = self._scan(max_rows, advance)
        self._refuse_none()
        self._grids = {entry.draft.row: entry.draft.grids for entry in self._entries}
        self._orders = _no_orders()
        self._images: ByteCache[tuple[int, int], Image.Image] = ByteCache(
            CACHED_IMAGE_BYTES, lambda image: 3 * image.width * image.height
        )
        self._pixels: ByteCache[tuple[int, int], Tensor] = ByteCache(
            CACHED_PIXEL_BYTES, lambda pixels: pixels.numel() * pixels.element_size()
        )

    def __len__(self) -> int:
        """The number of usable rows, one epoch."""
        return len(self._entries)

    @property
    def max_images(self) -> int:
        """The most images that a row has."""
        return max(len(entry.draft.grids) for entry in self._entries)

    def take(self, start: int, count: int) -> list[Prompt]:
        """Prompts [start, start + count) of the endless stream; a pure function of position, so resuming is free.

        Epoch start // len(self); each epoch of the split "train" has its own seeded order when `data.shuffle`.
        """
        assert start >= 0, f"the stream starts at 0, got {start}"
        prompts = []
        for position in range(start, start + count):
            epoch, place = divmod(position, len(self))
            prompts.append(self._prompt(self._entries[self._order(epoch)[place]], epoch))
        return prompts

    def pixels(self, key: ImageKey) -> Tensor:
        """Patches [P, D], fp32, of an image under a view. Raises ImageError naming the row for damaged image data."""

        def make() -> Tensor:
            return self._reader.patches(self.image(key), self._grids[key.row][key.index])

        return self._pixels.get((key.row, key.index), make) if key.view == "original" else make()

    def image(self, key: ImageKey) -> Image.Image:
        """The RGB picture of a view, before it is resized for the tower; ImageError as in `pixels`."""
        assert key.split == self._split, f"a key of split '{key.split}' was given to the source of '{self._split}'"
        original = self._images.get((key.row, key.index), lambda: self._decode(key.row, key.index))
        if key.view == "original":
            return original
        view = VIEW_FUNCTIONS[key.view](original, self._view_seed(key), self._view_names[key.view])
        assert view.size == original.size, f"view {key} has size {view.size}, the original {original.size}"
        return view

    def png(self, key: ImageKey) -> bytes:
        """The picture that `pixels` cuts its patches from, resized already; ImageError as in `pixels`."""
        file = io.BytesIO()
        self._reader.resized(self.image(key), self._grids[key.row][key.index]).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def view_name(self, key: ImageKey) -> str:
        """The name of the perturbation that was drawn for a view; "" for the original."""
        return "" if key.view == "original" else draw(key.view, self._view_seed(key), self._view_names[key.view])

    def damage(self, prompt: Prompt) -> str:
        """Why the images of `prompt` cannot be decoded, naming file and row; "" when they can (they stay decoded)."""
        try:
            for key in prompt.images("original"):
                self.image(key)
        except ImageError as error:
            return str(error)
        return ""

    def leave_out(self, rows: Container[int], reason: str) -> None:
        """Drop usable rows, counted by `reason`; the stream is then that of the others. DataError when none is left."""
        kept = [entry for entry in self._entries if entry.draft.row not in rows]
        self.dropped[reason] = self.dropped.get(reason, 0) + len(self._entries) - len(kept)
        self._entries = kept
        self._orders = _no_orders()
        self._refuse_none()

    def _refuse_none(self) -> None:
        if not self._entries:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise DataError(
                f"{', '.join(map(str, self._files))}: none of {len(self._rows)} rows can become a prompt "
                f"({reasons or 'the files are empty'}); mend the rows, or raise the limits of [data]"
            )

    def _view_seed(self, key: ImageKey) -> tuple[int, int, int, int]:
        return self._seed, key.epoch, key.row, key.index

    def _decode(self, row: int, index: int) -> Image.Image:
        try:
            return self._reader.decode(self._rows[row].images[index], self._grids[row][index])
        except ImageError as error:
            raise ImageError(f"{self._rows.where(row)}, image {index}: {error}") from error

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        def make() -> npt.NDArray[np.int64]:
            if not self._shuffle:
                return np.arange(len(self))
            return np.random.default_rng((self._seed, epoch)).permutation(len(self))

        return self._orders.get(epoch, make)

    def _prompt(self, entry: _Entry, epoch: int) -> Prompt:
        draft = entry.draft
        image_token_id = self._vocabulary.image_token_id
        token_ids_T = expand_placeholders(entry.short_ids, draft.grids, image_token_id=image_token_id)
        positions_3T, next_position = self._rope_positions(token_ids_T, draft.grids, image_token_id=image_token_id)
        time, height, width = (tuple(axis) for axis in positions_3T.tolist())
        return Prompt(
            split=self._split,
            row=draft.row,
            epoch=epoch,
            data_source=draft.data_source,
            ground_truth=draft.ground_truth,
            text=draft.text,
            token_ids=tuple(token_ids_T.tolist()),
            positions=(time, height, width),
            next_position=next_position,
            grids=draft.grids,
            image_slots=tuple(np.flatnonzero(token_ids_T == image_token_id).tolist()),
            target=entry.target,
        )

    def _scan(self, max_rows: int, advance: Callable[[int], None]) -> tuple[dict[str, int], list[_Entry]]:
        """(dropped rows by reason, usable rows), read in order until `max_rows` are usable (0: all)."""
        dropped: Counter[str] = Counter()
        entries: list[_Entry] = []
        drafts: list[_Draft] = []
        for row in self._rows:
            advance(1)
            try:
                drafts.append(self._draft(usable(row, supervised=self._supervised)))
            except RowDropped as reason:
                dropped[str(reason)] += 1
            missing = max_rows - len(entries) if max_rows else ROWS_TOKENISED_AT_ONCE
            if len(drafts) >= min(missing, ROWS_TOKENISED_AT_ONCE):
                entries += self._tokenise(drafts, dropped)
                drafts = []
                if len(entries) == max_rows:
                    break
        entries += self._tokenise(drafts, dropped)
        return dict(dropped), entries

    def _draft(self, row: Row) -> _Draft:
        texts = (*(message.content for message in row.messages), row.response if self._supervised else "")
        if any(token in text for text in texts for token in self._vocabulary.banned_tokens):
            raise RowDropped("image token in text")
        try:
            text = self._vocabulary.render(conversation(row, self._data.instruction))
        except TemplateRefusal as error:
            raise RowDropped("chat template refuses the messages") from error
        return _Draft(
            row=row.index,
            data_source=row.data_source,
            ground_truth=row.ground_truth,
            text=text,
            response=row.response,
            grids=tuple(self._reader.grid(image) for image in row.images),
        )

    def _tokenise(self, drafts: Sequence[_Draft], dropped: Counter[str]) -> list[_Entry]:
        entries = []
        prompts = self._vocabulary.encode([draft.text for draft in drafts])
        targets = self._vocabulary.encode([draft.response for draft in drafts]) if self._supervised else []
        for i, (draft, token_ids) in enumerate(zip(drafts, prompts, strict=True)):
            num_tokens = len(token_ids) + sum(grid.num_tokens - 1 for grid in draft.grids)
            num_placeholders = token_ids.count(self._vocabulary.image_token_id)
            if num_placeholders != len(draft.grids):
                few = num_placeholders < len(draft.grids)
                dropped["image lost by the chat template" if few else "image token in text"] += 1
            elif num_tokens > self._data.max_prompt_tokens:
                dropped["prompt too long"] += 1
            elif self._supervised and 0 < self._max_response_tokens <= len(targets[i]):
                dropped["response too long"] += 1
            else:
                target = (*targets[i], self._vocabulary.eos_id) if self._supervised else ()
                entries.append(_Entry(draft, np.array(token_ids, np.int32), target))
        return entries


def _no_orders() -> ByteCache[int, npt.NDArray[np.int64]]:
    """Of the epochs' orders the last is kept."""
    return ByteCache(0, lambda order: order.nbytes)


def conversation(row: Row, instruction: str) -> list[dict[str, Any]]:
    """A row's messages as a chat template reads them: lists of image and text parts.

    `instruction` ends the last user message, on a line of its own.
    """
    last_user = max(i for i, message in enumerate(row.messages) if message.role == "user")
    messages: list[dict[str, Any]] = []
    for turn, message in enumerate(row.messages):
        parts: list[dict[str, str]] = []
        for i, text in enumerate(message.content.split(IMAGE_MARKER)):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": text}] if text else []
        if instruction and turn == last_user:
            parts.append({"type": "text", "text": f"\n{instruction}"})
        messages.append({"role": message.role, "content": parts})
    return messages


def expand_placeholders(short_ids: Ids, grids: Sequence[ImageGrid], *, image_token_id: int) -> Ids:
    """Token ids [T] in which the placeholder of each image is repeated once per image token of its grid."""
    repeats = np.ones(len(short_ids), np.int64)
    repeats[short_ids == image_token_id] = [grid.num_tokens for grid in grids]
    return np.repeat(short_ids, repeats)
