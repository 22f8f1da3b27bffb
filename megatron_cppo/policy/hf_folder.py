"""Hugging Face checkpoint folders: read slices of tensors, write whole ones. No pickle, no model class.

Tensor names are normalised to those of official Qwen2.5-VL checkpoints (`model.layers...`, `visual...`); a folder in
the style of `state_dict()` (`model.language_model.layers...`, `model.visual...`) is read, and written back, as such.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_cppo import pretrained
from megatron_cppo.config import ConfigError
from megatron_cppo.policy import durable

SHARD_BYTES = 4 * 2**30
_STYLES = (("model.language_model.", "model."), ("model.visual.", "visual."))
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")


def disk_name(name: str) -> str:
    """The official checkpoints' name of a tensor.

    >>> disk_name("model.language_model.norm.weight")
    'model.norm.weight'
    """
    for other, official in _STYLES:
        if name.startswith(other):
            return official + name.removeprefix(other)
    return name


class Reader:
    """The tensors of a folder, by official name. A context manager: it holds the files open."""

    def __init__(self, folder: str) -> None:
        self._stack, self._files, self._names = ExitStack(), {}, {}
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"model.path: {folder!r} holds no *.safetensors file; convert the checkpoint first")
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise ConfigError(f"model.path: {path} is damaged ({error}); copy the checkpoint again") from error
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                self._files[disk_name(name)], self._names[disk_name(name)] = file, name
        self._check_index(folder)
        wrong = pretrained.untrainable({name: self._slice(name).get_dtype() for name in sorted(self._files)})
        if wrong:
            raise ConfigError(f"model.path: {folder!r}: {wrong}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _check_index(self, folder: str) -> None:
        index = Path(folder) / "model.safetensors.index.json"
        if index.is_file():
            try:
                listed = {disk_name(name) for name in json.loads(index.read_text())["weight_map"]}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"model.path: {index} is damaged ({error!r}); copy the checkpoint again") from error
            absent = sorted(listed - self._files.keys())
            if absent:
                raise ConfigError(
                    f"model.path: {folder!r} lacks {len(absent)} tensors that its index lists, first {absent[0]!r}; "
                    "a shard is missing, copy the checkpoint again"
                )

    def _slice(self, name: str) -> Any:
        return self._files[name].get_slice(self._names[name])

    @property
    def names(self) -> set[str]:
        """Official names of all tensors."""
        return set(self._files)

    @property
    def own_names(self) -> set[str]:
        """Names as this folder spells them."""
        return set(self._names.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, *, axis: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor, or its [start, stop) along `axis`, reading no more than that."""
        window = self._slice(name)
        return window[(slice(None),) * axis + (slice(start, stop),)] if axis is not None else window[:]


def _style(source: Path) -> dict[str, str]:
    """Prefixes to write, official -> the source folder's own."""
    with Reader(str(source)) as reader:
        names = reader.own_names
        return {official: other for other, official in _STYLES if any(name.startswith(other) for name in names)}


def write(tensors: Iterable[tuple[str, Tensor]], *, source: str, target: str) -> None:
    """Write `tensors` (official names, whole) as a folder like `source`: its side files are copied verbatim.

    The folder appears under its name only when complete; a previous one of that name is replaced. Raises OSError when
    the file system refuses: nothing is left of the new folder then, and `tensors` is exhausted, as other ranks may
    take part in making them.
    """
    final, stream = Path(target), iter(tensors)
    partial = final.with_name(final.name + ".partial")
    try:
        durable.remove(partial)
        partial.mkdir(parents=True)
        durable.restore_replaced(final.parent)
        _write(stream, origin=Path(source), partial=partial)
        durable.sync_files(partial)
        durable.publish(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        for _ in stream:
            pass
        raise


def _write(tensors: Iterator[tuple[str, Tensor]], *, origin: Path, partial: Path) -> None:
    prefixes = _style(origin)
    shard: dict[str, Tensor] = {}
    written: list[tuple[Path, list[str]]] = []
    size = total = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            written.append(_flush(partial, len(written), shard))
            shard, size = {}, 0
        for official, own in prefixes.items():
            if name.startswith(official):
                name = own + name.removeprefix(official)
                break
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    written.append(_flush(partial, len(written), shard))
    _name_shards(partial, written, total)
    for path in origin.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copy2(path, partial / path.name)


def _flush(folder: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f"shard-{number}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # of the disk, too
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error
    return path, list(tensors)


def _name_shards(folder: Path, written: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(written, 1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def vocabulary_rows(name_rows: int, *, rank: int, num_ranks: int, padded_rows: int) -> tuple[int, int, int]:
    """(start, stop, padding) of the vocabulary rows that TP rank `rank` reads, and the zero rows that follow."""
    share = padded_rows // num_ranks
    start, stop = min(rank * share, name_rows), min((rank + 1) * share, name_rows)
    return start, stop, share - (stop - start)


def pad_rows(tensor: Tensor, count: int) -> Tensor:
    """`tensor` with `count` zero rows below."""
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) if count else tensor
