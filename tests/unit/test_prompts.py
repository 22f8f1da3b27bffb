"""Prompts against the released processor's output, every reason to drop a row, and the stream's repeatability."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from megatron_cppo.config import DataConfig, ModelConfig, PerceptionConfig
from megatron_cppo.data.images import ImageError
from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.data.rows import DataError
from megatron_cppo.data.tokenizer import CheckpointError, vocabulary
from megatron_cppo.data.views import ViewError, draw, preserving, removing
from megatron_cppo.types import ImageGrid, ImageKey, Prompt
from tests.unit.tiny_checkpoint import CHAT_TEMPLATE, write_tiny_checkpoint

MODEL = ModelConfig(min_pixels=56 * 56, max_pixels=112 * 140)
INSTRUCTION = "Think first, then answer in the box."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def record(content: str, images: list[bytes], truth: str | None = "7", response: str | None = None) -> dict[str, Any]:
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": content}],
        "images": [{"bytes": image, "path": None} for image in images],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"response": response, "index": 0},
    }


@pytest.fixture
def source(tmp_path: Path, checkpoint: str) -> Callable[..., PromptSource]:
    def build(records: list[dict[str, Any]], *, data: DataConfig | None = None, **options: Any) -> PromptSource:
        file = tmp_path / "rows.parquet"
        schema = pa.Table.from_pylist([record("x", [b""], "1", "1")]).schema
        pq.write_table(pa.Table.from_pylist(records, schema), file, row_group_size=3)
        said = {"split": "train", "model": MODEL, "perception": PerceptionConfig(), "seed": 3} | options
        return PromptSource([str(file)], model_path=checkpoint, data=data or DataConfig(shuffle=False), **said)

    return build


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """The released processor without its video part, which needs torchvision; all that acts on images is inherited."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def released(checkpoint: str) -> ImageOnlyProcessor:
    limits = {"min_pixels": MODEL.min_pixels, "max_pixels": MODEL.max_pixels}
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **limits)
    return ImageOnlyProcessor(image_processor, AutoTokenizer.from_pretrained(checkpoint), CHAT_TEMPLATE)


def keys(prompt: Prompt) -> tuple[ImageKey, ...]:
    return prompt.images("original")


@pytest.mark.parametrize(
    "sizes",
    [[], [(100, 60)], [(31, 300)], [(640, 480)], [(28, 28)], [(60, 90), (90, 60)], [(57, 57), (200, 30), (33, 33)]],
    ids=str,
)
def test_tokens_and_pixels_are_those_of_the_released_processor(
    source: Callable[..., PromptSource], released: ImageOnlyProcessor, sizes: list[tuple[int, int]]
) -> None:
    pictures = [picture(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    words = ["What is", " the sum of", " these?", " Ünïcode é\n"]
    content = "".join(f"{words[i]}<image>" for i in range(len(sizes))) + words[-1]
    prompts = source(
        [record(content, [encoded(image) for image in pictures])], data=DataConfig(instruction=INSTRUCTION)
    )
    (prompt,) = prompts.take(0, 1)

    parts: list[dict[str, Any]] = []
    for word, image in zip(words, pictures, strict=False):
        parts += [{"type": "text", "text": word}, {"type": "image", "image": image}]
    parts.append({"type": "text", "text": f"{words[-1]}\n{INSTRUCTION}"})
    messages = [{"role": "user", "content": parts}]
    text = released.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = released(text=[text], images=pictures or None)

    assert prompt.text == text
    assert list(prompt.token_ids) == expected["input_ids"][0]
    slots = np.flatnonzero(np.array(expected["input_ids"][0]) == released.image_token_id)
    assert list(prompt.image_slots) == slots.tolist()
    if pictures:
        grids = [[g.frames, g.height, g.width] for g in prompt.grids]
        assert grids == np.asarray(expected["image_grid_thw"]).tolist()
        pixels_PD = torch.cat([prompts.pixels(key) for key in keys(prompt)])
        assert pixels_PD.dtype == torch.float32
        torch.testing.assert_close(pixels_PD, torch.as_tensor(expected["pixel_values"]), rtol=0, atol=0)
        for key, grid in zip(keys(prompt), prompt.grids, strict=True):
            assert prompts.pixels(key).shape == (grid.num_patches, 3 * 2 * 14 * 14)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_grid_is_that_of_the_upright_image(
    source: Callable[..., PromptSource], released: ImageOnlyProcessor, form: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(112, 40), form, exif=exif)
    prompts = source([record("<image>", [content])])
    (prompt,) = prompts.take(0, 1)
    sideways = orientation >= 5
    assert prompt.grids == (ImageGrid(1, 8, 2, 2) if sideways else ImageGrid(1, 2, 8, 2),)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    expected = released.image_processor(images=[upright], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prompts.pixels(keys(prompt)[0]), expected, rtol=0, atol=0)


def test_orientation_behind_the_pixels_is_an_image_error(source: Callable[..., PromptSource]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(112, 40), exif=exif)
    start = content.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", content[start : start + 4])[0]
    end = content.index(b"IEND") - 4
    moved = content[:start] + content[start + length : end] + content[start : start + length] + content[end:]
    prompts = source([record("<image>", [moved])])
    with pytest.raises(ImageError, match=r"rows\.parquet, row 0, image 0: .* its header said"):
        prompts.pixels(keys(prompts.take(0, 1)[0])[0])


@pytest.mark.parametrize(("width", "height"), [(1, 28), (28, 1), (1, 200), (13, 7)])
def test_thin_images(source: Callable[..., PromptSource], width: int, height: int) -> None:
    prompts = source([record("<image>", [encoded(picture(width, height))])])
    (prompt,) = prompts.take(0, 1)
    assert prompts.pixels(keys(prompt)[0]).shape[0] == prompt.grids[0].num_patches
    for view in ("preserving", "removing"):
        (key,) = prompt.images(view)
        assert prompts.image(key).size == prompts.image(keys(prompt)[0]).size
        assert prompts.pixels(key).shape[0] == prompt.grids[0].num_patches


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header that announces an image far larger than its data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    packed = zlib.compress(b"\0" * 100)
    data = b"IDAT" + packed
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


GOOD = encoded(picture(56, 56))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("<image>", [b"no image at all"]), "image: corrupt"),
        (record("<image>", [b""]), "image: empty"),
        (record("<image>", [GOOD[:20]]), "image: corrupt"),
        (record("<image>", [bomb(9_000, 9_000)]), "image: too large"),
        (record("<image>", [bomb(2**31 - 1, 2**31 - 1)]), "image: too large"),
        (record("<image>", [encoded(picture(1, 201))]), "image: too elongated"),
        (record("<image><image>", [GOOD, b"broken"]), "image: corrupt"),
        (record("no marker", [GOOD, GOOD]), "image markers do not match images"),
        (record("<image> and <image>", [GOOD]), "image markers do not match images"),
        (record("<image>", []), "image markers do not match images"),
        (record("<image>", [GOOD], truth=None), "no ground truth"),
        (record("<image>", [GOOD], truth="  "), "no ground truth"),
        (record("<image> what is <|image_pad|>?", [GOOD]), "image token in text"),
        (record("what is <|image_pad|>?", []), "image token in text"),
        (record("<image> what is <|vision_start|>?", [GOOD]), "image token in text"),
        (record("<image> what is <|video_pad|>?", [GOOD]), "image token in text"),
        (record("long " * 2000, []), "prompt too long"),
    ],
)
def test_bad_rows_are_dropped_and_counted(
    source: Callable[..., PromptSource], bad: dict[str, Any], reason: str
) -> None:
    prompts = source([record("a", []), bad, record("<image>b", [GOOD])])
    assert prompts.dropped == {reason: 1}
    assert [prompt.row for prompt in prompts.take(0, 2)] == [0, 2]
    with pytest.raises(DataError, match=rf"rows\.parquet: none of 1 rows .*{reason}: 1"):
        source([bad])


def test_missing_image_files_are_dropped(tmp_path: Path, checkpoint: str) -> None:
    (tmp_path / "images").mkdir()
    picture(56, 84).save(tmp_path / "images/a.png")
    records = [{"problem": "?", "answer": "1", "images": [f"images/{name}.png"]} for name in "ab"]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "geo.parquet")
    prompts = PromptSource(
        [str(tmp_path / "geo.parquet")],
        split="evaluation",
        model_path=checkpoint,
        data=DataConfig(),
        model=MODEL,
        perception=PerceptionConfig(),
        seed=0,
    )
    assert prompts.dropped == {"image: missing file": 1}
    (prompt,) = prompts.take(0, 1)
    assert (prompt.data_source, prompt.grids) == ("geo", (ImageGrid(1, 6, 4, 2),))
    picture(84, 56).save(tmp_path / "images/a.png")
    with pytest.raises(ImageError, match=r"geo\.parquet, row 0, image 0: .* the file changed"):
        prompts.image(keys(prompt)[0])
    picture(56, 84, seed=1).save(tmp_path / "images/a.png")
    assert np.array_equal(prompts.image(keys(prompt)[0]), picture(56, 84, seed=1))


def test_no_rows_is_a_clear_error(source: Callable[..., PromptSource]) -> None:
    with pytest.raises(DataError, match=r"none of 0 rows can become a prompt .*the files are empty"):
        source([])


def test_prompt_length_counts_image_tokens(source: Callable[..., PromptSource]) -> None:
    records = [record("<image>", [encoded(picture(112, 140))])]
    (prompt,) = source(records).take(0, 1)
    length = len(prompt.token_ids)
    assert prompt.grids[0].num_tokens == 20 < length
    assert len(source(records, data=DataConfig(max_prompt_tokens=length))) == 1
    with pytest.raises(DataError, match="prompt too long: 1"):
        source(records, data=DataConfig(max_prompt_tokens=length - 1))


def test_an_instruction_with_an_image_token_drops_every_row(source: Callable[..., PromptSource]) -> None:
    with pytest.raises(DataError, match="image token in text: 1"):
        source([record("<image>", [GOOD])], data=DataConfig(instruction="<|image_pad|>"))


def test_pixels_of_damaged_data_name_the_row(source: Callable[..., PromptSource]) -> None:
    whole = encoded(picture(200, 200))
    prompts = source([record("a", []), record("<image><image>", [GOOD, whole[: len(whole) // 2]])])
    prompt = prompts.take(1, 1)[0]
    assert len(prompt.grids) == 2
    prompts.pixels(keys(prompt)[0])
    for view in ("original", "preserving", "removing"):
        with pytest.raises(ImageError, match=r"rows\.parquet, row 1, image 1: .*corrupt or truncated"):
            prompts.pixels(prompt.images(view)[1])


def test_multi_image_and_multi_turn_rows(source: Callable[..., PromptSource]) -> None:
    turns = record("", [GOOD, encoded(picture(84, 56))])
    turns["prompt"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First <image>"},
        {"role": "assistant", "content": "Seen."},
        {"role": "user", "content": "Second <image>?"},
    ]
    (prompt,) = source([turns], data=DataConfig(instruction="Go.")).take(0, 1)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nFirst {image}<|im_end|>\n<|im_start|>assistant\nSeen.<|im_end|>\n"
        f"<|im_start|>user\nSecond {image}?\nGo.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [grid.num_tokens for grid in prompt.grids] == [4, 6]
    assert len(prompt.image_slots) == 10


def test_supervised_rows(source: Callable[..., PromptSource], checkpoint: str) -> None:
    records = [
        record("<image>", [GOOD], truth=None, response="<think>3, 4</think> \\boxed{7}"),
        record("<image>", [GOOD], truth="7", response=None),
        record("<image>", [GOOD], truth="7", response="see <|image_pad|>"),
    ]
    prompts = source(records, supervised=True)
    assert prompts.dropped == {"no response": 1, "image token in text": 1}
    (prompt,) = prompts.take(0, 1)
    words = vocabulary(checkpoint)
    assert words.decode(prompt.target) == "<think>3, 4</think> \\boxed{7}"
    assert words.decode_token(prompt.target[-1]) == "<|im_end|>"
    assert prompt.target.count(words.eos_id) == 1
    assert source(records).take(0, 1)[0].target == ()


def test_a_supervised_response_longer_than_the_budget_is_dropped(source: Callable[..., PromptSource]) -> None:
    records = [
        record("<image>", [GOOD], truth="7", response="\\boxed{7}"),
        record("<image>", [GOOD], truth="7", response="seven " * 40),
    ]
    length = len(source(records, supervised=True).take(0, 1)[0].target)
    assert length < 40
    prompts = source(records, supervised=True, max_response_tokens=length)
    assert prompts.dropped == {"response too long": 1}
    assert len(prompts) == 1


def test_the_stream_is_a_pure_function_of_position(source: Callable[..., PromptSource]) -> None:
    records = [record(f"question {i}", []) for i in range(7)]
    prompts = source(records, data=DataConfig(shuffle=True))
    stream = prompts.take(0, 30)
    assert [prompt.epoch for prompt in stream] == [position // 7 for position in range(30)]
    orders = [[prompt.row for prompt in stream[7 * e : 7 * e + 7]] for e in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    again = source(records, data=DataConfig(shuffle=True))
    assert [again.take(position, 1)[0] for position in (29, 3, 14, 0)] == [stream[i] for i in (29, 3, 14, 0)]
    assert again.take(11, 5) == stream[11:16]
    other_seed = source(records, data=DataConfig(shuffle=True), seed=4)
    assert [prompt.row for prompt in other_seed.take(0, 14)] != [prompt.row for prompt in stream[:14]]
    for natural in (source(records), source(records, data=DataConfig(shuffle=True), split="evaluation")):
        assert [prompt.row for prompt in natural.take(5, 4)] == [5, 6, 0, 1]


def test_max_rows_takes_the_first_usable_rows(source: Callable[..., PromptSource]) -> None:
    records = [record(f"{i}", [], truth="" if i == 1 else "7") for i in range(6)]
    prompts = source(records, max_rows=3)
    assert (len(prompts), prompts.dropped) == (3, {"no ground truth": 1})
    assert [prompt.row for prompt in prompts.take(0, 3)] == [0, 2, 3]
    assert len(source(records, max_rows=300)) == 5


def test_views_are_drawn_per_epoch_row_and_image(source: Callable[..., PromptSource]) -> None:
    records = [record("<image><image>", [GOOD, GOOD]), record("<image>", [GOOD])]
    prompts = source(records)
    makers = {"preserving": preserving, "removing": removing}
    for prompt in prompts.take(0, 6):
        for index, original in enumerate(keys(prompt)):
            assert prompts.view_name(original) == ""
            for view, make in makers.items():
                key = prompt.images(view)[index]
                seed, names = (3, prompt.epoch, prompt.row, index), getattr(PerceptionConfig(), view)
                assert prompts.view_name(key) == draw(view, seed, names)
                assert np.array_equal(prompts.image(key), make(prompts.image(original), seed, names))
                expected = prompts.pixels(original).shape
                assert prompts.pixels(key).shape == expected
                torch.testing.assert_close(prompts.pixels(key), source(records).pixels(key), rtol=0, atol=0)
    first, second = (prompts.take(start, 1)[0].images("removing") for start in (0, 2))
    assert not torch.equal(prompts.pixels(first[0]), prompts.pixels(first[1]))
    assert not torch.equal(prompts.pixels(first[0]), prompts.pixels(second[0]))


def test_view_names_are_restricted_and_checked(source: Callable[..., PromptSource]) -> None:
    records = [record("<image>", [GOOD])]
    only = PerceptionConfig(preserving=("rotation",), removing=("zoom_crop",))
    for prompt in (prompts := source(records, perception=only)).take(0, 8):
        assert prompts.view_name(prompt.images("preserving")[0]) == "rotation"
        assert prompts.view_name(prompt.images("removing")[0]) == "zoom_crop"
    with pytest.raises(ViewError, match="oclusion"):
        source(records, perception=PerceptionConfig(removing=("oclusion",)))


def test_a_missing_image_processor_is_named(tmp_path: Path, checkpoint: str) -> None:
    folder = Path(write_tiny_checkpoint(tmp_path / "model"))
    (folder / "preprocessor_config.json").unlink()
    pq.write_table(pa.Table.from_pylist([record("a", [])]), tmp_path / "t.parquet")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        PromptSource(
            [str(tmp_path / "t.parquet")],
            split="train",
            model_path=str(folder),
            data=DataConfig(),
            model=MODEL,
            perception=PerceptionConfig(),
            seed=0,
        )
