"""The files of a pretrained checkpoint folder, looked at before a tensor is read. Standard library only.

Owns which files there must be besides config.json (`architecture.py` reads that), and that the weights are whole and of
a type that can be trained: all that `--check` can say of a folder in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGE_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Fields of config.json, and the tokens whose ids they must be."""
TRAINABLE_DTYPES = ("F32", "BF16", "F16")
"""As safetensors names them; each is cast to the policy's precision."""
INDEX = "model.safetensors.index.json"
_PATCH_FIELDS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
"""Of the image processor, and of the vision tower."""
_MAX_HEADER_BYTES = 100_000_000
_LISTED = 3


def problems(folder: str) -> list[str]:
    """What is wrong with the files of a checkpoint folder that has a config.json, each with its cure."""
    path = Path(folder)
    return [f"model.path: {text}" for text in (*_side_files(path), *_weights(path))]


def untrainable(dtypes: Mapping[str, str]) -> str:
    """What to say of tensors, by name, whose dtype cannot be trained; "" when all can."""
    wrong = {name: dtype for name, dtype in dtypes.items() if dtype not in TRAINABLE_DTYPES}
    if not wrong:
        return ""
    listed = ", ".join(f"{name} is {dtype}" for name, dtype in list(wrong.items())[:_LISTED])
    return (
        f"{len(wrong)} tensors are not of a trainable type ({', '.join(TRAINABLE_DTYPES)}): {listed}; "
        "use the checkpoint that was not quantised"
    )


def _side_files(folder: Path) -> list[str]:
    """Tokenizer, chat template and image processor."""
    found = []
    tokenizer, config = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        found += _tokens(folder / "tokenizer.json", tokenizer)
    elif not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        found.append(
            f"'{folder}' has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy the checkpoint's "
            "tokenizer files"
        )
    templates = any((folder / f"chat_template.{kind}").is_file() for kind in ("jinja", "json"))
    if not templates and "chat_template" not in (config or {}):
        found.append(
            f"'{folder}' has no chat template; an instruction-tuned checkpoint has chat_template.jinja, "
            "chat_template.json, or the key chat_template in tokenizer_config.json"
        )
    processor = _json(folder / "preprocessor_config.json")
    if processor is None and _json(folder / "processor_config.json") is None:
        found.append(
            f"'{folder}' has no image processor (preprocessor_config.json, a JSON object); copy the checkpoint's"
        )
    return [*found, *_other_patches(folder, processor or {})]


def _other_patches(folder: Path, processor: dict[str, Any]) -> list[str]:
    """Sizes of patches in which the image processor and the vision tower differ."""
    vision = (_json(folder / "config.json") or {}).get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    return [
        f"'{folder}': preprocessor_config.json has {name} {processor[name]!r}, config.json {vision[field]!r}; take "
        "both from the same checkpoint"
        for name, field in _PATCH_FIELDS.items()
        if name in processor and field in vision and processor[name] != vision[field]
    ]


def _tokens(path: Path, tokenizer: dict[str, Any] | None) -> list[str]:
    """The image tokens that a tokenizer.json lacks."""
    if tokenizer is None or not isinstance(tokenizer.get("model"), dict):
        return [f"{path} is damaged, it holds no tokenizer; copy the file again"]
    added = tokenizer.get("added_tokens")
    known = {entry.get("content") for entry in added if isinstance(entry, dict)} if isinstance(added, list) else set()
    vocabulary = tokenizer["model"].get("vocab")
    known |= set(vocabulary) if isinstance(vocabulary, dict) else set()
    absent = [token for token in IMAGE_TOKENS.values() if token not in known]
    if not absent:
        return []
    return [f"{path} has no token {', '.join(absent)}; take the tokenizer of a vision-language checkpoint"]


def _weights(folder: Path) -> list[str]:
    """Damage of the safetensors files, shards that the index names and the folder lacks, dtypes that cannot be used."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return [f"'{folder}' holds no *.safetensors file; convert the checkpoint first"]
    found, dtypes = _missing_shards(folder), {}
    for path in paths:
        try:
            dtypes |= _dtypes(path)
        except OSError as error:
            found.append(f"{path} cannot be read ({error.strerror}); check its permissions")
        except ValueError as error:
            found.append(f"{path} is damaged ({error}); copy the checkpoint again")
    wrong = untrainable(dtypes)
    return [*found, f"'{folder}': {wrong}"] if wrong else found


def _missing_shards(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return []
    weight_map = (_json(folder / INDEX) or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        return [f"{folder / INDEX} is damaged, it holds no weight_map; copy the checkpoint again"]
    absent = sorted({str(shard) for shard in weight_map.values() if not (folder / str(shard)).is_file()})
    if not absent:
        return []
    return [f"'{folder}' lacks {len(absent)} shards that its index names: {', '.join(absent[:_LISTED])}; copy them"]


def _dtypes(path: Path) -> dict[str, str]:
    """The dtype of each tensor of a safetensors file, from its header. Raises ValueError unless the file is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{size} bytes that do not begin with a header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    try:
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"its header has an entry without {error}") from error
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes, its header says {8 + length + end}")
    return dtypes


def _json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
