"""Rows of parquet files as records, whatever accepted layout a file has.

Owns reading (streamed, and at random by row group), the layouts, and which rows can become prompts at all.
Must not know tokens, pixels, epochs or models.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cppo.config import UserError
from megatron_cppo.data.byte_cache import ByteCache

IMAGE_MARKER = "<image>"
MAX_GROUP_BYTES = 2**30
"""A larger row group is refused: reading one row at random means decoding its whole group."""
CACHED_GROUP_BYTES = 2**28
STREAMED_ROWS = 64


class DataError(UserError):
    """A data file that cannot be used; the text says which, what was got, and how to mend it."""


class RowDropped(ValueError):
    """A row that cannot become a prompt; its text is the reason that is counted."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `content` holds a literal `<image>` where an image belongs."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `index` counts over all files; an image is its encoded bytes, or the path of its file.

    >>> Row(0, "digits", (Message("user", "<image>Sum?"),), "7", (Path("0.png"),), "").ground_truth
    '7'
    """

    index: int
    data_source: str
    messages: tuple[Message, ...]
    ground_truth: str
    images: tuple[bytes | Path, ...]
    response: str


def usable(row: Row, *, supervised: bool) -> Row:
    """The row with one marker per image (a lone image without marker is put first), or RowDropped with the reason.

    A row needs a ground truth to be rewarded; a supervised one needs a response instead.
    """
    if supervised and not row.response:
        raise RowDropped("no response")
    if not supervised and not row.ground_truth:
        raise RowDropped("no ground truth")
    last_user = max((i for i, message in enumerate(row.messages) if message.role == "user"), default=None)
    if last_user is None:
        raise RowDropped("no user message")
    if not all(message.role for message in row.messages):
        raise RowDropped("message without a role")
    if not row.images and not any(message.content.strip() for message in row.messages if message.role == "user"):
        raise RowDropped("empty prompt")
    num_markers = sum(message.content.count(IMAGE_MARKER) for message in row.messages)
    if num_markers == len(row.images):
        return row
    if num_markers == 0 and len(row.images) == 1:
        marked = Message("user", IMAGE_MARKER + row.messages[last_user].content)
        return dataclasses.replace(row, messages=(*row.messages[:last_user], marked, *row.messages[last_user + 1 :]))
    raise RowDropped("image markers do not match images")


class Rows:
    """The rows of several parquet files, one after the other; images are read when their row is, by any thread."""

    def __init__(self, files: Sequence[str | Path]) -> None:
        if not files:
            raise DataError("no data files given; name at least one parquet file")
        self._files = [_ParquetRows(Path(file)) for file in files]
        self._ends = list(accumulate(len(file) for file in self._files))
        self._groups: ByteCache[tuple[int, int], pa.Table] = ByteCache(CACHED_GROUP_BYTES, lambda table: table.nbytes)

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, a few at a time."""
        for file, end in zip(self._files, self._ends, strict=True):
            yield from file.stream(end - len(file))

    def __getitem__(self, index: int) -> Row:
        """One row, at the cost of decoding its row group unless that was used lately; IndexError when out of range."""
        number, local = self._locate(index)
        file = self._files[number]
        group, offset = file.locate(local)
        with file.one_reader:
            table = self._groups.get((number, group), lambda: file.read_group(group))
        with _reading(file.path):
            record = table.slice(offset, 1).to_pylist()[0]
        return file.row(record, index)

    def where(self, index: int) -> str:
        """The file and the row within it, for messages."""
        number, local = self._locate(index)
        return f"{self._files[number].path}, row {local}"

    def _locate(self, index: int) -> tuple[int, int]:
        """(file, row within it) of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number] + len(self._files[number])


class _ParquetRows:
    """One memory-mapped parquet file of a known layout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.one_reader = threading.Lock()
        """pyarrow's reader of a file has state of its own, which two threads would take from each other."""
        with _reading(path):
            self._parquet = pq.ParquetFile(path, memory_map=True)
            schema = self._parquet.schema_arrow
        self._layout = _detect(path, schema)
        self._columns = _leaves(schema, self._layout)
        metadata = self._parquet.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        for i, group in enumerate(groups):
            if group.total_byte_size > MAX_GROUP_BYTES:
                raise DataError(
                    f"{path}: row group {i} holds {group.num_rows} rows in {group.total_byte_size / 2**30:.1f} GiB, at "
                    f"most {MAX_GROUP_BYTES / 2**30:.0f} GiB can be read at random; write the file again with smaller "
                    "groups, e.g. pyarrow.parquet.write_table(table, file, row_group_size=100)"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, local: int) -> tuple[int, int]:
        """(row group, row within it) of this file's row `local`."""
        group = bisect_right(self._ends, local)
        return group, local - (self._ends[group - 1] if group else 0)

    def read_group(self, group: int) -> pa.Table:
        with _reading(self.path):
            return self._parquet.read_row_group(group, columns=self._columns)

    def stream(self, first_index: int) -> Iterator[Row]:
        """All rows in order; `first_index` is the index of the first."""
        with _reading(self.path):
            batches = self._parquet.iter_batches(batch_size=STREAMED_ROWS, columns=self._columns)
        index = first_index
        while True:
            with _reading(self.path):
                batch = next(batches, None)
                records = None if batch is None else batch.to_pylist()
            if records is None:
                return
            for record in records:
                yield self.row(record, index)
                index += 1

    def row(self, record: dict[str, Any], index: int) -> Row:
        parsed = self._layout.parse(record)
        return Row(
            index=index,
            data_source=parsed.data_source or self.path.stem,
            messages=parsed.messages,
            ground_truth=_answer(parsed.ground_truth),
            images=tuple(_image(image, self.path.parent) for image in record.get("images") or ()),
            response=(record.get("extra_info") or {}).get("response") or "",
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a missing or damaged file into a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as parquet ({error}); check the path, or write the file again"
        ) from error


def _image(image: str | bytes | dict[str, Any] | None, folder: Path) -> bytes | Path:
    """An image's bytes if the row holds them, else the path of its file; no bytes at all where the row has neither."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return folder / image if image and isinstance(image, str) else image or b""


def _answer(value: str | float | None) -> str:
    """A ground truth as text; nothing where there is none, which a column of numbers writes as NaN."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value).strip()


@dataclass(frozen=True, slots=True)
class _Parsed:
    """What a layout's own columns say of a row."""

    data_source: str
    messages: tuple[Message, ...]
    ground_truth: str | float | None


def _parse_verl(record: dict[str, Any]) -> _Parsed:
    messages = tuple(Message(turn["role"] or "", turn["content"] or "") for turn in record["prompt"] or () if turn)
    return _Parsed(record["data_source"] or "", messages, (record["reward_model"] or {}).get("ground_truth"))


def _parse_easyr1(record: dict[str, Any]) -> _Parsed:
    return _Parsed("", (Message("user", record["problem"] or ""),), record["answer"])


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_answer(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _has_fields(kind: pa.DataType, *names: str, are: Callable[[pa.DataType], bool]) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return all(name in fields and are(fields[name]) for name in names)


def _is_list_of(kind: pa.DataType, item: Callable[[pa.DataType], bool]) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return pa.types.is_null(kind) or (lists and item(kind.value_type))


def _is_messages(kind: pa.DataType) -> bool:
    return _is_list_of(kind, lambda item: _has_fields(item, "role", "content", are=_is_text))


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
    with_bytes = _has_fields(kind, "bytes", are=_is_bytes)
    return _is_text(kind) or _is_bytes(kind) or with_bytes or _has_fields(kind, "path", are=_is_text)


@dataclass(frozen=True, slots=True)
class _Column:
    """What a column must hold, in words and as a test of its type."""

    words: str
    accepts: Callable[[pa.DataType], bool]


_TEXT = _Column("text", _is_text)
_IMAGES = _Column("a list of {bytes, path} or of paths", lambda kind: _is_list_of(kind, _is_image))


@dataclass(frozen=True, slots=True)
class Layout:
    """Required columns, and how to parse them; `images` and `extra_info` (field response) are optional in each."""

    columns: dict[str, _Column]
    parse: Callable[[dict[str, Any]], _Parsed]


LAYOUTS: dict[str, Layout] = {
    "verl": Layout(
        {
            "data_source": _TEXT,
            "prompt": _Column("a list of {role, content}", _is_messages),
            "reward_model": _Column(
                "{style, ground_truth}, the latter text or a number",
                lambda kind: pa.types.is_null(kind) or _has_fields(kind, "ground_truth", are=_is_answer),
            ),
        },
        _parse_verl,
    ),
    "EasyR1": Layout({"problem": _TEXT, "answer": _Column("text or a number", _is_answer)}, _parse_easyr1),
}


def _detect(path: Path, schema: pa.Schema) -> Layout:
    """The layout whose required columns the file has, their types checked; DataError when there is none."""
    layout = next((layout for layout in LAYOUTS.values() if layout.columns.keys() <= set(schema.names)), None)
    if layout is None:
        accepted = "; ".join(f"{name}: {', '.join(layout.columns)} [, images]" for name, layout in LAYOUTS.items())
        raise DataError(
            f"{path}: columns are {', '.join(schema.names) or 'none'}; accepted layouts are {accepted}; "
            "rename the columns or convert the file"
        )
    expected = layout.columns | ({"images": _IMAGES} if "images" in schema.names else {})
    for name, column in expected.items():
        kind = schema.field(name).type
        if not column.accepts(kind):
            raise DataError(f"{path}: column '{name}' must hold {column.words}, got {kind}; convert the column")
    return layout


def _leaves(schema: pa.Schema, layout: Layout) -> list[str]:
    """The columns to read; of the free-form `extra_info`, only a text field `response`."""
    names = [*layout.columns, *(("images",) if "images" in schema.names else ())]
    if "extra_info" in schema.names and _has_fields(schema.field("extra_info").type, "response", are=_is_text):
        names.append("extra_info.response")
    return names
