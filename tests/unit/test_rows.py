"""Rows out of parquet: layouts, lazy random access, and what is refused or dropped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cppo.data import rows as rows_module
from megatron_cppo.data.byte_cache import ByteCache
from megatron_cppo.data.rows import DataError, Message, Row, RowDropped, Rows, usable


def verl_record(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": f"<image>question {i}"}],
        "images": [{"bytes": b"pixels %d" % i, "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i, "response": f"answer {i}", "more": {"deep": [1, 2]}},
    } | changes


def write(path: Path, records: list[dict[str, Any]], **options: Any) -> str:
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return str(path)


def test_verl_rows_read_at_random_equal_the_stream(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.parquet", [verl_record(i) for i in range(7)], row_group_size=3),
        write(tmp_path / "b.parquet", [verl_record(i) for i in range(7, 8)]),
        write(tmp_path / "c.parquet", [verl_record(i) for i in range(8, 13)], row_group_size=2),
    ]
    rows = Rows(files)
    streamed = list(rows)
    assert [row.index for row in streamed] == list(range(13)) == list(range(len(rows)))
    for index in np.random.default_rng(0).permutation(13).tolist():
        assert rows[index] == streamed[index]
    assert streamed[9] == Row(
        index=9,
        data_source="digits",
        messages=(Message("user", "<image>question 9"),),
        ground_truth="9",
        images=(b"pixels 9",),
        response="answer 9",
    )
    assert rows.where(9) == f"{tmp_path / 'c.parquet'}, row 1"
    with pytest.raises(IndexError):
        rows[13]
    with pytest.raises(IndexError):
        rows[-1]


def test_threads_read_rows_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one row group, so that every thread reads the file all the time."""
    monkeypatch.setattr(rows_module, "CACHED_GROUP_BYTES", 1)
    count = 64
    records = [verl_record(i, images=[{"bytes": bytes([i]) * 100_000, "path": None}]) for i in range(count)]
    rows = Rows([write(tmp_path / "rows.parquet", records, row_group_size=32)])
    wanted = [int(i) for i in np.random.default_rng(0).integers(count, size=1000)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda index: rows[index], wanted))
    assert [row.index for row in found] == wanted
    assert all(row.images == (bytes([row.index]) * 100_000,) for row in found)


def test_easyr1_rows(tmp_path: Path) -> None:
    record = {"problem": "<image>Sum?", "answer": "7", "images": [{"bytes": b"x", "path": "x.png"}]}
    (row,) = Rows([write(tmp_path / "geo.parquet", [record])])
    assert row == Row(0, "geo", (Message("user", "<image>Sum?"),), "7", (b"x",), "")


def test_image_forms(tmp_path: Path) -> None:
    paths = {"problem": "?", "answer": "1", "images": ["images/a.png", "/data/b.png"]}
    (row,) = Rows([write(tmp_path / "paths.parquet", [paths])])
    assert row.images == (tmp_path / "images/a.png", Path("/data/b.png"))
    structs = [{"bytes": None, "path": "c.png"}, {"bytes": None, "path": None}, {"bytes": b"", "path": "d.png"}]
    (row,) = Rows([write(tmp_path / "structs.parquet", [{"problem": "?", "answer": "1", "images": structs}])])
    assert row.images == (tmp_path / "c.png", b"", tmp_path / "d.png")
    nulls = [{"problem": "?", "answer": "1", "images": None}, {"problem": "?", "answer": "1", "images": []}]
    assert [row.images for row in Rows([write(tmp_path / "nulls.parquet", nulls)])] == [(), ()]
    assert [row.images for row in Rows([write(tmp_path / "none.parquet", [{"problem": "?", "answer": "1"}])])] == [()]


@pytest.mark.parametrize(
    ("value", "text"), [("  7 ", "7"), (7, "7"), (0.5, "0.5"), (None, ""), (0, "0"), (float("nan"), "")]
)
def test_ground_truth_is_text(tmp_path: Path, value: object, text: str) -> None:
    record = verl_record(0, reward_model={"style": "rule", "ground_truth": value})
    (row,) = Rows([write(tmp_path / "t.parquet", [record])])
    assert row.ground_truth == text


@pytest.mark.parametrize("extra", [None, "free text", {"index": 3}, {"response": None}, {"response": 5}, [1, 2]])
def test_extra_info_may_be_anything(tmp_path: Path, extra: object) -> None:
    (row,) = Rows([write(tmp_path / "t.parquet", [verl_record(0, extra_info=extra)])])
    assert row.response == ""


def test_large_and_dictionary_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "problem": pa.array(["p", "q"], pa.large_string()),
            "answer": pa.array(["1", "2"]).dictionary_encode(),
            "images": pa.array([[b"x"], []], pa.large_list(pa.large_binary())),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert [(row.messages[0].content, row.ground_truth, row.images) for row in Rows([tmp_path / "t.parquet"])] == [
        ("p", "1", (b"x",)),
        ("q", "2", ()),
    ]


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "wrong.parquet", [{"question": "?", "answer": "1", "image": ["a.png"]}])
    with pytest.raises(DataError) as error:
        Rows([file])
    for word in (file, "question, answer, image", "data_source, prompt, reward_model", "problem, answer"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"prompt": "just text"}, "prompt"),
        ({"images": "a.png"}, "images"),
        ({"images": [3]}, "images"),
        ({"reward_model": {"style": "rule"}}, "reward_model"),
        ({"reward_model": {"ground_truth": ["a", "b"]}}, "reward_model"),
        ({"data_source": 3}, "data_source"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, changes: dict[str, Any], column: str) -> None:
    file = write(tmp_path / "wrong.parquet", [verl_record(0, **changes)])
    with pytest.raises(DataError, match=rf"wrong\.parquet: column '{column}' must hold .*, got"):
        Rows([file])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", [verl_record(i) for i in range(50)])
    (tmp_path / "text.parquet").write_text("not parquet at all")
    (tmp_path / "cut.parquet").write_bytes(Path(good).read_bytes()[:-40])
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("text", "cut", "empty", "absent"):
        with pytest.raises(DataError, match=rf"{name}\.parquet: cannot be read as parquet"):
            Rows([good, str(tmp_path / f"{name}.parquet")])
    with pytest.raises(DataError, match="no data files"):
        Rows([])


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    # Random bytes do not compress, so the second half of the data pages holds images only.
    noise = np.random.default_rng(0).bytes
    records = [verl_record(i, images=[{"bytes": noise(500), "path": None}]) for i in range(50)]
    file = Path(write(tmp_path / "damaged.parquet", records, compression="zstd"))
    rows = Rows([file])
    metadata = pq.ParquetFile(file).metadata.row_group(0)
    images = next(
        metadata.column(i) for i in range(metadata.num_columns) if "bytes" in metadata.column(i).path_in_schema
    )
    content = bytearray(file.read_bytes())
    content[images.data_page_offset : images.data_page_offset + 64] = b"\xff" * 64
    file.write_bytes(content)
    for read in (lambda: list(Rows([file])), lambda: Rows([file])[0], lambda: list(rows)):
        with pytest.raises(DataError, match=r"damaged\.parquet: cannot be read"):
            read()


def test_huge_row_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "huge.parquet", [verl_record(0, images=[{"bytes": bytes(range(256)) * 8, "path": None}])])
    monkeypatch.setattr(rows_module, "MAX_GROUP_BYTES", 1024)
    with pytest.raises(DataError, match=r"row group 0 holds 1 rows .* row_group_size"):
        Rows([file])


def row(*contents: str, images: int = 0, truth: str = "7", response: str = "") -> Row:
    messages = tuple(Message("user", content) for content in contents)
    return Row(0, "s", messages, truth, (b"",) * images, response)


def test_usable_rows() -> None:
    for kept in (
        row("a"),
        row("<image>a", images=1),
        row("a<image>b<image>", images=2),
        row("<image>", "<image>", images=2),
    ):
        assert usable(kept, supervised=False) == kept
    assert usable(row("first", "last", images=1), supervised=False).messages == (
        Message("user", "first"),
        Message("user", "<image>last"),
    )


@pytest.mark.parametrize(
    ("dropped", "supervised", "reason"),
    [
        (row("a", images=2), False, "image markers do not match images"),
        (row("<image>a"), False, "image markers do not match images"),
        (row("<image><image>a", images=1), False, "image markers do not match images"),
        (row("a", truth=""), False, "no ground truth"),
        (row("a", truth="", response="r"), False, "no ground truth"),
        (row("a"), True, "no response"),
        (row(), False, "no user message"),
    ],
)
def test_dropped_rows(dropped: Row, supervised: bool, reason: str) -> None:
    with pytest.raises(RowDropped, match=f"^{reason}$"):
        usable(dropped, supervised=supervised)


def test_supervised_rows_need_no_ground_truth() -> None:
    kept = row("a", truth="", response="r")
    assert usable(kept, supervised=True) == kept


def test_byte_cache_evicts_what_was_used_longest_ago() -> None:
    made: list[str] = []

    def get(key: str, size: int) -> bytes:
        return cache.get(key, lambda: made.append(key) or bytes(size))

    cache: ByteCache[str, bytes] = ByteCache(10, len)
    get("a", 4), get("b", 4), get("a", 4), get("c", 4)
    assert (made, cache.used_bytes) == (["a", "b", "c"], 8)
    get("a", 4), get("b", 4)
    assert made == ["a", "b", "c", "b"]
    assert len(get("large", 30)) == 30
    assert cache.used_bytes == 30
    get("large", 30)
    assert made[-1] == "large"
    assert made.count("large") == 1
