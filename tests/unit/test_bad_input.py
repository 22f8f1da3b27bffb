"""What a user sees of wrong input: one case a line, and the whole message printed (`pytest -rP` makes the table).

Through the entries that a run goes through: the command line with `--check`, the source of prompts, the reader of a
checkpoint's weights. Tensors that do not fit their config are in tests/distributed/test_weights.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_cppo import assembly, train
from megatron_cppo import config as configuration
from megatron_cppo.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    PerceptionConfig,
    PolicyConfig,
    RolloutConfig,
    TrainerConfig,
    UserError,
)
from megatron_cppo.data.damage import leave_out_damaged, sound_prompts
from megatron_cppo.data.prompts import PromptSource
from megatron_cppo.data.rows import DataError
from megatron_cppo.data.tokenizer import vocabulary
from megatron_cppo.storage.hf_folder import Reader
from tests.unit.tiny_checkpoint import write_tiny_checkpoint

NOBODY = 65534


@dataclass(frozen=True)
class World:
    """A folder in which everything is right: checkpoint, rows and recipe of a run."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.parquet"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.json"

    def edit(self, path: Path, change: Callable[[Any], object]) -> None:
        """Change a JSON file in place."""
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


GOOD = encoded(picture(56, 56))
WHOLE = encoded(picture(200, 200))
DAMAGED = WHOLE[: len(WHOLE) // 2]
"""A good header, and half of the pixels."""


def record(content: str | None = "<image>?", images: Any = (GOOD,), truth: Any = "7", **changes: Any) -> dict[str, Any]:
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": content}],
        "images": None
        if images is None
        else [image if isinstance(image, dict) else {"bytes": image, "path": None} for image in images],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"response": None},
    } | changes


SCHEMA = pa.Table.from_pylist([record(extra_info={"response": "x"}, images=[{"bytes": b"", "path": ""}])]).schema


def write_rows(path: Path, records: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(records, SCHEMA), path)
    return str(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    write_tiny_checkpoint(folder / "model")
    save_file({"lm_head.weight": torch.zeros(4, 4)}, folder / "model" / "model.safetensors")
    write_rows(folder / "rows.parquet", [record()])
    return folder


def furnish(folder: Path, template: Path) -> World:
    world = World(folder)
    shutil.copytree(template, folder, dirs_exist_ok=True)
    config = Config(
        model=ModelConfig(path=str(world.model)),
        data=DataConfig(train=(str(world.rows),), max_prompt_tokens=64),
        rollout=RolloutConfig(max_response_tokens=8),
        policy=PolicyConfig(device="cpu", precision="fp32"),
        trainer=TrainerConfig(prompts_per_step=6, run_dir=str(folder / "run")),
    )
    configuration.save(config, world.recipe)
    return world


@pytest.fixture
def world(tmp_path: Path, template: Path) -> World:
    return furnish(tmp_path, template)


def said_by_check(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command line says of a mistake, which it must end with status 2 and without a traceback."""
    try:
        status = train.main([*map(str, words), "--check"])
    except SystemExit as ended:  # how the parser of flags ends a process
        status = ended.code
    said = "".join(capsys.readouterr())
    assert status == train.USER_ERROR, said
    assert "Traceback" not in said
    return said


Break = Callable[[World], object]


def nothing(world: World) -> None:
    """The flags alone are wrong."""


def edit_config(**fields: Any) -> Break:
    """Set fields of the checkpoint's config.json, `section__field`; a value of ... deletes one."""

    def apply(config: dict[str, Any]) -> None:
        for name, value in fields.items():
            *sections, field = name.split("__")
            part = config
            for section in sections:
                part = part[section]
            if value is ...:
                del part[field]
            else:
                part[field] = value

    return lambda world: world.edit(world.model / "config.json", apply)


def edit_recipe(section: str, fields: Any) -> Break:
    return lambda world: world.edit(world.recipe, lambda saved: saved.update({section: fields}))


def remove(*names: str) -> Break:
    return lambda world: [(world.folder / name).unlink() for name in names]


def text(name: str, content: str | bytes) -> Break:
    return lambda world: (world.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, share: float) -> Break:
    def apply(world: World) -> None:
        content = (world.folder / name).read_bytes()
        (world.folder / name).write_bytes(content[: int(share * len(content))])

    return apply


def save_weights(**tensors: torch.Tensor) -> Break:
    return lambda world: save_file(tensors, world.model / "model.safetensors")


def without_image_tokens(world: World) -> None:
    write_tiny_checkpoint(world.folder / "other", image_tokens=False)
    shutil.copy(world.folder / "other" / "tokenizer.json", world.model)


def index_of_two(world: World) -> None:
    names = {"lm_head.weight": "model.safetensors", "model.norm.weight": "model-00002-of-00002.safetensors"}
    (world.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def run_of_another_config(world: World) -> None:
    run = world.folder / "run"
    run.mkdir()
    shutil.copy(world.recipe, run / "config.json")
    world.edit(run / "config.json", lambda saved: saved["algorithm"].update(beta=0.5))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')


# name: what is done to a good folder, the flags, and what must be said.
COMMANDS: dict[str, tuple[Break, tuple[str, ...], tuple[str, ...]]] = {
    # Flags and saved configs.
    "unknown flag": (
        nothing,
        ("--trainer.num_gpu", "2"),
        ("--trainer.num_gpu", "Perhaps you meant", "--trainer.num-gpus"),
    ),
    "unknown section": (nothing, ("--trainr.num_gpus=2",), ("--trainr.num_gpus=2", "--trainer.num-gpus")),
    "flag of another type": (nothing, ("--trainer.num_gpus", "two"), ("--trainer.num-gpus", "'two'", "INT")),
    "flag that is no choice": (
        nothing,
        ("--policy.precision", "fp8"),
        ("'fp8'", "--policy.precision", "('fp32', 'bf16', 'fp8_delayed', "),
    ),
    "flag without a value": (nothing, ("--data.max_prompt_tokens",), ("--data.max-prompt-tokens", "Expected 1 values")),
    "value out of range": (
        nothing,
        ("--perception.top_fraction", "1.5"),
        ("perception.top_fraction: 1.5 is outside [1e-06, 1]; use 1",),
    ),
    "value that is not finite": (
        nothing,
        ("--optimizer.learning_rate", "nan"),
        ("optimizer.learning_rate: nan is not a finite number; give one",),
    ),
    "unknown field in a saved config": (
        edit_recipe("rollout", {"temprature": 1.0}),
        (),
        ("config.json: there is no field rollout.temprature; did you mean rollout.temperature?",),
    ),
    "unknown section in a saved config": (
        edit_recipe("modle", {"path": "x"}),
        (),
        ("config.json: there is no field modle.path; did you mean model.path?",),
    ),
    "null in a saved config": (
        edit_recipe("model", {"path": None}),
        (),
        ("config.json: model.path must be a text, a number, true or false, got None",),
    ),
    "text for a number in a saved config": (
        edit_recipe("trainer", {"num_steps": "many"}),
        (),
        ("--trainer.num-steps", "'many'", "INT"),
    ),
    # Layout.
    "TP that does not divide heads": (
        nothing,
        ("--policy.tensor_parallel=4", "--trainer.num_gpus=4"),
        ("4 does not divide the model's 2 attention heads, 1 key/value heads; use 1",),
    ),
    "world size that does not fit": (
        nothing,
        ("--policy.pipeline_parallel=2", "--policy.layers_per_stage", "1", "--trainer.num_gpus=3"),
        ("3 ranks cannot be cut into replicas of 2 (TP 1 x PP 2); use 4", "2 stages, but the model has 1 layers"),
    ),
    "several problems at once": (
        nothing,
        (
            *("--policy.tensor_parallel=4", "--trainer.num_gpus=6", "--data.train", "/no/rows.parquet"),
            *("--algorithm.rewards", "acuracy=1.0", "--model.min_pixels=9999999"),
        ),
        (
            *("1. trainer.num_gpus", "2. policy.tensor_parallel", "3. model.min_pixels", "4. data.train"),
            *("5. algorithm.rewards", "did you mean 'accuracy'"),
        ),
    ),
    # Data files.
    "data file that does not exist": (
        remove("rows.parquet"),
        (),
        ("data.train: ", "rows.parquet does not exist; check the path"),
    ),
    "data file that is a folder": (
        nothing,
        ("--data.train", "{folder}"),
        ("is a folder; name its files: ", "/rows.parquet"),
    ),
    "data file that is no parquet": (
        text("rows.parquet", '{"a": 1}'),
        (),
        ("is not a parquet file, it begins with b'{\"a\"'; convert it",),
    ),
    "data file of no bytes": (text("rows.parquet", ""), (), ("is not a parquet file, it begins with b''",)),
    "data file that is cut off": (
        cut("rows.parquet", 0.5),
        (),
        ("is cut off: ", " bytes, the end is missing; copy it again"),
    ),
    # Checkpoint folders.
    "model.path that does not exist": (
        nothing,
        ("--model.path", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("'Qwen/Qwen2.5-VL-7B-Instruct' holds no config.json; give a Hugging Face checkpoint folder",),
    ),
    "model.path that is a file": (nothing, ("--model.path", "{folder}/rows.parquet"), ("holds no config.json",)),
    "config.json that is no JSON": (
        cut("model/config.json", 0.5),
        (),
        ("config.json is not JSON", "copy the checkpoint again"),
    ),
    "config.json without fields": (
        edit_config(text_config__num_hidden_layers=..., vision_config__out_hidden_size=...),
        (),
        ("has no field 'out_hidden_size'; has no field 'num_hidden_layers'; copy the checkpoint again",),
    ),
    "config.json of another family": (
        edit_config(model_type="llama"),
        (),
        ("model_type 'llama' is not one of qwen2_5_vl, qwen3_vl, qwen3_vl_moe; use a checkpoint of such a family",),
    ),
    "config.json with nonsense": (
        edit_config(text_config__num_attention_heads=0, text_config__hidden_size="32", vision_config=None),
        (),
        (
            "has text_config.num_attention_heads 0, which must be a whole number from 1",
            "has text_config.hidden_size '32', which must be a whole number from 1",
            "has vision_config None, which must be an object",
        ),
    ),
    "config.json that contradicts itself": (
        edit_config(vision_config__out_hidden_size=64, image_token_id=10**6, text_config__num_key_value_heads=3),
        (),
        (
            "3 key/value heads do not divide 2 attention heads",
            "vision features have size 64, the model 32",
            "image_token_id 1000000 is beyond the vocabulary of ",
            "take config.json and weights from the same checkpoint",
        ),
    ),
    "scaled rotary positions": (
        edit_config(text_config__rope_parameters__rope_type="yarn"),
        (),
        ("rotary positions are scaled (rope_type 'yarn'), only 'default' is supported; remove it",),
    ),
    "quantised checkpoint": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        (),
        ("the weights are quantised ({'quant_method': 'gptq', 'bits': 4}); use the checkpoint in bf16 or fp32",),
    ),
    "no tokenizer": (
        remove("model/tokenizer.json"),
        (),
        ("has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy the checkpoint's tokenizer files",),
    ),
    "tokenizer.json that is cut off": (
        cut("model/tokenizer.json", 0.5),
        (),
        ("tokenizer.json is damaged, it holds no tokenizer; copy the file again",),
    ),
    "tokenizer without the image tokens": (
        without_image_tokens,
        (),
        ("has no token <|image_pad|>, <|video_pad|>, <|vision_start|>, <|vision_end|>; take the tokenizer of",),
    ),
    "no chat template": (remove("model/chat_template.jinja"), (), ("has no chat template; an instruction-tuned",)),
    "no image processor": (
        remove("model/preprocessor_config.json"),
        (),
        ("has no image processor (preprocessor_config.json, a JSON object); copy the checkpoint's",),
    ),
    "image processor of another checkpoint": (
        lambda world: world.edit(world.model / "preprocessor_config.json", lambda made: made.update(patch_size=16)),
        (),
        ("preprocessor_config.json has patch_size 16, config.json 14; take both from the same checkpoint",),
    ),
    "no weights": (
        remove("model/model.safetensors"),
        (),
        ("holds no *.safetensors file; convert the checkpoint first",),
    ),
    "index that names a missing shard": (
        index_of_two,
        (),
        ("lacks 1 shards that its index names: model-00002-of-00002.safetensors; copy them",),
    ),
    "damaged index": (
        text("model/model.safetensors.index.json", "{"),
        (),
        ("model.safetensors.index.json is damaged, it holds no weight_map; copy the checkpoint again",),
    ),
    "weights that are cut off": (
        cut("model/model.safetensors", 0.9),
        (),
        ("model.safetensors is damaged (", " bytes, its header says ", "copy the checkpoint again"),
    ),
    "weights in int8": (
        save_weights(a=torch.zeros(2, dtype=torch.int8), b=torch.zeros(2).to(torch.float8_e4m3fn), c=torch.zeros(2)),
        (),
        ("2 tensors are not of a trainable type (F32, BF16, F16): ", "a is I8", "b is F8_E4M3", "was not quantised"),
    ),
    "all of a folder's files": (
        remove("model/tokenizer.json", "model/preprocessor_config.json", "model/model.safetensors"),
        (),
        ("has no tokenizer", "has no image processor", "holds no *.safetensors"),
    ),
    # Run folders.
    "run folder of another config": (
        run_of_another_config,
        (),
        ("holds a run of another config", "algorithm.beta: 0.5 there, 0.01 here", "choose another --trainer.run_dir"),
    ),
    "run folder that is a file": (
        text("run", "x"),
        (),
        ("trainer.run_dir: ", "/run is a file, not a folder; choose another"),
    ),
    "run folder below a file": (
        nothing,
        ("--trainer.run_dir", "{folder}/rows.parquet/run"),
        ("rows.parquet is a file, not a folder; choose another --trainer.run_dir",),
    ),
    # Rewards.
    "unknown reward": (
        nothing,
        ("--algorithm.rewards", "formt=1"),
        ("no such reward: got 'formt'; did you mean 'format'?",),
    ),
    "module of a reward that does not exist": (
        nothing,
        ("--algorithm.rewards", "no_such_module:f=1"),
        ("cannot import the module of reward 'no_such_module:f'", "PYTHONPATH"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_what_is_wrong(
    name: str, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    damage, flags, parts = COMMANDS[name]
    damage(world)
    said = said_by_check(capsys, world.recipe, *(flag.replace("{folder}", str(world.folder)) for flag in flags))
    show(name, said, world.folder)
    for part in parts:
        assert part in said, part


def show(name: str, said: object, folder: Path) -> None:
    print(f"## {name}\n{str(said).replace(str(folder), '.').strip()}\n")


def test_nothing_is_wrong_with_the_folder_that_the_cases_break(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([str(world.recipe), "--check"]) == 0
    assert capsys.readouterr().out.endswith("no problems\n")


RECIPES: dict[str, tuple[str, str | bytes | None, tuple[str, ...]]] = {
    "recipe that does not exist": ("absent.py", None, ("absent.py' does not exist; give a .py file with config()",)),
    "recipe that is a folder": ("model", None, ("/model' is a folder; give ", "/model/config.json")),
    "recipe without config()": ("r.py", "x = 1", ("has no function config() -> Config; add one",)),
    "recipe that returns something else": (
        "r.py",
        "def config(): return 3",
        ("must return a Config, got 3; return Config(",),
    ),
    "recipe that is no Python": (
        "r.py",
        "def config(:\n",
        ("cannot be run: SyntaxError", "r.py, line 1: def config(:"),
    ),
    "recipe that is no text": (
        "r.py",
        b"\x80\x00\xff",
        ("r.py' cannot be run: ", "source code string cannot contain null bytes (", "/r.py); mend it"),
    ),
    "recipe that raises when it is loaded": (
        "r.py",
        "import os\nhome = os.environ['NO_SUCH']\n",
        ("cannot be run: KeyError: 'NO_SUCH'", "r.py, line 2: home = os.environ['NO_SUCH']", "mend it"),
    ),
    "recipe whose config() raises": (
        "r.py",
        "from megatron_cppo.config import Config\ndef config():\n    return Config(trainr=1)\n",
        ("config() cannot be run: TypeError", "'trainr'", "r.py, line 3: return Config(trainr=1)"),
    ),
    "recipe of another kind": ("r.yaml", "model: x", ("r.yaml' is not a saved config (", "give a .py or .json file")),
    "recipe that is half a JSON file": ("r.json", '{"model": {', ("r.json' is not a saved config (",)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_recipe_is_named(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, parts = RECIPES[name]
    if content is not None:
        text(file, content)(world)
    said = said_by_check(capsys, world.folder / file)
    show(name, said, world.folder)
    for part in parts:
        assert part in said, part


def test_a_reward_whose_module_raises(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.folder / "raising_reward.py").write_text("weights = [1, 2]\nfirst = weights[5]\n")
    monkeypatch.syspath_prepend(str(world.folder))
    said = said_by_check(capsys, world.recipe, "--algorithm.rewards", "raising_reward:f=1")
    show("module of a reward that raises", said, world.folder)
    for part in ("algorithm.rewards: ", "'raising_reward:f' cannot be run: IndexError", "line 2: first = weights[5]"):
        assert part in said


@pytest.mark.parametrize(
    ("name", "environment", "parts"),
    [
        (
            "another number of ranks than the config says",
            {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("trainer.num_gpus is 1, but 3 ranks were started; make them equal",),
        ),
        (
            "a rank that is no number",
            {"RANK": "zero", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("RANK='zero': must be numbers; set them, or unset RANK to start all ranks here",),
        ),
        (
            "a rank beyond its world",
            {"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("RANK is 1, but WORLD_SIZE 1; ranks count from 0",),
        ),
        ("a rank without its world", {"RANK": "0"}, ("RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT",)),
    ],
)
def test_ranks_that_a_scheduler_started_wrongly(
    name: str,
    environment: dict[str, str],
    parts: tuple[str, ...],
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert train.main([str(world.recipe)]) == train.USER_ERROR
    said = capsys.readouterr().err
    show(name, said, world.folder)
    for part in parts:
        assert part in said


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """File permissions bind everyone but root: run as another user where the tests are root's."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "locked", "mode", "parts"),
    [
        ("data file without permission", "rows.parquet", 0o000, ("rows.parquet cannot be read (Permission denied)",)),
        ("config.json without permission", "model/config.json", 0o000, ("config.json cannot be read (Permission",)),
        (
            "weights without permission",
            "model/model.safetensors",
            0o000,
            ("model.safetensors cannot be read (Permission",),
        ),
        ("run folder without permission", ".", 0o555, ("trainer.run_dir: ", "cannot be written to; choose another")),
    ],
)
def test_what_may_not_be_touched(
    name: str, locked: str, mode: int, parts: tuple[str, ...], template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not in pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        world = furnish(Path(folder), template)
        assert train.main([str(world.recipe), "--check"]) == 0  # and every module is loaded
        capsys.readouterr()
        for path in (world.folder, *world.folder.rglob("*")):
            path.chmod(0o777)
        (world.folder / locked).chmod(mode)
        with as_nobody():
            said = said_by_check(capsys, world.recipe)
        world.folder.chmod(0o777)
        show(name, said, world.folder)
    for part in parts:
        assert part in said, part


# Rows: what is left out of a training set, and counted.


@pytest.fixture
def source(world: World) -> Callable[..., PromptSource]:
    def build(records: list[dict[str, Any]] | str, **options: Any) -> PromptSource:
        file = records if isinstance(records, str) else write_rows(world.rows, records)
        said = {
            "split": "train",
            "model": ModelConfig(max_pixels=112 * 140),
            "perception": PerceptionConfig(),
            "seed": 3,
        }
        said |= {"data": DataConfig(shuffle=False, max_prompt_tokens=200), "model_path": str(world.model)} | options
        return PromptSource([file], **said)

    return build


def bomb(width: int, height: int) -> bytes:
    """A PNG header that announces far more pixels than there are."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "image without a header": (record(images=[b"<svg></svg>"]), "image: corrupt"),
    "image whose header is cut off": (record(images=[GOOD[:20]]), "image: corrupt"),
    "image of a format that starts programs": (record(images=[encoded(picture(60, 60), "EPS")]), "image: corrupt"),
    "image of no bytes": (record(images=[b""]), "image: empty"),
    "image that is null": (record(images=[{"bytes": None, "path": None}]), "image: empty"),
    "image file that does not exist": (record(images=[{"bytes": None, "path": "no.png"}]), "image: missing file"),
    "image file below a file": (record(images=[{"bytes": None, "path": "rows.parquet/a.png"}]), "image: missing file"),
    "image file that is a folder": (record(images=[{"bytes": None, "path": "model"}]), "image: unreadable file"),
    "image bomb by Pillow's limit": (record(images=[bomb(2**31 - 1, 2**31 - 1)]), "image: too large"),
    "image above data.max_image_pixels": (record(images=[bomb(8001, 8000)]), "image: too large"),
    "image without pixels": (record(images=[bomb(0, 5)]), "image: corrupt"),
    "image of 1 x 201": (record(images=[encoded(picture(1, 201))]), "image: too elongated"),
    "image of 5000 x 2": (record(images=[encoded(picture(5000, 2))]), "image: too elongated"),
    "no ground truth": (record(truth=None), "no ground truth"),
    "empty ground truth": (record(truth="  "), "no ground truth"),
    "null reward_model": (record(reward_model=None), "no ground truth"),
    "more images than markers": (record("?", [GOOD, GOOD]), "image markers do not match images"),
    "more markers than images": (record("<image><image>", [GOOD]), "image markers do not match images"),
    "marker without an image": (record("<image>?", None), "image markers do not match images"),
    "prompt longer than the budget": (record("long " * 300), "prompt too long"),
    "empty prompt": (record("  ", []), "empty prompt"),
    "null content": (record(None, None), "empty prompt"),
    "null prompt": (record(prompt=None), "no user message"),
    "only a system message": (record(prompt=[{"role": "system", "content": "?"}], images=[]), "no user message"),
    "null role": (
        record(prompt=[{"role": None, "content": "a"}, {"role": "user", "content": "<image>"}]),
        "message without a role",
    ),
    "image token in the text": (record("<image> <|image_pad|>"), "image token in text"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_left_out_and_counted(name: str, source: Callable[..., PromptSource], world: World) -> None:
    bad, reason = ROWS[name]
    prompts = source([record(), bad, record()])
    show(name, prompts.dropped, world.folder)
    assert prompts.dropped == {reason: 1}
    assert [prompt.row for prompt in prompts.take(0, 2)] == [0, 2]
    with pytest.raises(DataError, match=rf"rows\.parquet: none of 1 rows can become a prompt \({reason}: 1\)"):
        source([bad])


def noisy(kind: str, form: str, **options: Any) -> bytes:
    return encoded(picture(60, 58).convert(kind), form, **options)


KEPT: dict[str, bytes] = {
    "1 x 200 image": encoded(picture(1, 200)),
    "200 x 1 image": encoded(picture(200, 1)),
    "1 x 1 image": encoded(picture(1, 1)),
    "CMYK JPEG": noisy("CMYK", "JPEG"),
    "palette PNG": noisy("P", "PNG"),
    "1 bit PNG": noisy("1", "PNG"),
    "grey with transparency": noisy("LA", "PNG"),
    "16 bit PNG": encoded(Image.fromarray(np.arange(3600, dtype=np.uint16).reshape(60, 60))),
    "animated GIF": encoded(picture(60, 60), "GIF", save_all=True, append_images=[picture(60, 60).rotate(90)]),
    "animated WEBP": encoded(picture(60, 60), "WEBP", save_all=True, append_images=[picture(60, 60).rotate(90)]),
    "BMP": noisy("RGB", "BMP"),
    "TIFF": noisy("RGB", "TIFF"),
    "PPM": noisy("RGB", "PPM"),
    "JPEG 2000": noisy("RGB", "JPEG2000"),
    "several pictures in a JPEG": encoded(picture(60, 60), "MPO", save_all=True, append_images=[picture(60, 60)]),
}


@pytest.mark.parametrize("name", KEPT)
def test_an_unusual_image_is_used(name: str, source: Callable[..., PromptSource], world: World) -> None:
    prompts = source([record(images=[KEPT[name]])])
    (key,) = prompts.take(0, 1)[0].images("original")
    image = prompts.image(key)
    show(name, f"used, as {image.mode} of {image.width} x {image.height}", world.folder)
    assert image.mode == "RGB"
    assert prompts.pixels(key).isfinite().all()


# Damage behind a good header: found when the data is decoded.


def test_a_training_set_survives_damaged_images(
    source: Callable[..., PromptSource], world: World, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = {1, 2, 5}
    prompts = source([record(images=[DAMAGED if row in damaged else GOOD]) for row in range(8)])
    assert prompts.dropped == {}
    replaced = [sound_prompts(prompts, start, 4, group=None) for start in (0, 4, 8)]
    # Rows 1 and 2 give their places to 4 and 6, the next sound ones; row 5 to row 0 of the next epoch.
    assert [[(p.epoch, p.row) for p in found] for found, _ in replaced] == [
        [(0, 0), (0, 4), (0, 6), (0, 3)],
        [(0, 4), (1, 0), (0, 6), (0, 7)],
        [(1, 0), (1, 4), (1, 6), (1, 3)],
    ]
    assert [count for _, count in replaced] == [2, 1, 2]
    warnings = [record.getMessage() for record in caplog.records]
    for row, said in zip(sorted(damaged), warnings, strict=True):  # once each, in spite of two epochs
        assert said.startswith(f"a row cannot be used: {world.rows}, row {row}, image 0: image is corrupt or truncated")
    show("damaged image in the training set", warnings[0], world.folder)
    # What a step trains on is a function of its number: a run that resumes there, and knows nothing, does the same.
    again = source([record(images=[DAMAGED if row in damaged else GOOD]) for row in range(8)])
    assert sound_prompts(again, 4, 4, group=None) == replaced[1]


def test_damage_is_decided_by_the_image_not_by_the_view(source: Callable[..., PromptSource]) -> None:
    prompts = source([record("<image><image>", [GOOD, DAMAGED]), record("text only", []), record()])
    found, count = sound_prompts(prompts, 0, 2, group=None)
    assert ([prompt.row for prompt in found], count) == ([2, 1], 1)


def test_a_step_without_a_sound_prompt_ends_with_an_error(source: Callable[..., PromptSource], world: World) -> None:
    prompts = source([record(images=[DAMAGED]) for _ in range(5)])
    with pytest.raises(DataError) as caught:
        sound_prompts(prompts, 5, 2, group=None)
    show("no training image decodes", caught.value, world.folder)
    for part in ("2 of the prompts 5 to 6 cannot be replaced: 5 of 5 rows", "rows.parquet, row 0, image 0", "corrupt"):
        assert part in str(caught.value)


def test_damaged_evaluation_rows_are_left_out(source: Callable[..., PromptSource], world: World) -> None:
    prompts = source([record(images=[DAMAGED if row == 1 else GOOD]) for row in range(3)], split="evaluation")
    seen: list[int] = []
    leave_out_damaged(prompts, group=None, advance=seen.append)
    show("damaged image in the evaluation", prompts.dropped, world.folder)
    assert prompts.dropped == {"image: damaged": 1}
    assert [prompt.row for prompt in prompts.take(0, len(prompts))] == [0, 2]
    assert sum(seen) == 3
    shuffled = source([record(images=[DAMAGED if row == 1 else GOOD]) for row in range(3)], data=DataConfig())
    leave_out_damaged(shuffled, group=None)
    assert [{prompt.row for prompt in shuffled.take(start, 2)} for start in (0, 2, 4)] == [{0, 2}] * 3
    with pytest.raises(DataError, match=r"none of 1 rows can become a prompt \(image: damaged: 1\)"):
        leave_out_damaged(source([record(images=[DAMAGED])], split="evaluation"), group=None)


def test_a_file_that_changed_is_damage_and_a_missing_one_too(source: Callable[..., PromptSource], world: World) -> None:
    for name in "ab":
        picture(56, 84).save(world.folder / f"{name}.png")
    images = [{"bytes": None, "path": f"{name}.png"} for name in "ab"]
    prompts = source([record(images=[image]) for image in images] + [record()])
    picture(84, 56).save(world.folder / "a.png")
    (world.folder / "b.png").unlink()
    found, count = sound_prompts(prompts, 0, 1, group=None)
    assert ([prompt.row for prompt in found], count) == ([2], 1)
    assert "the file changed during the run" in prompts.damaged[0]
    assert "image file does not exist" in prompts.damaged[1]


def test_what_is_evaluated_should_not_be_trained_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_rows(world.rows, [record(), record(images=[DAMAGED]), record("<image>", truth=None)])
    config = train.read_config(
        str(world.recipe), ["--data.evaluation", str(world.rows), "--data.max_prompt_tokens=200"]
    )
    sources = assembly.prompt_sources(config, lambda name, total: contextlib.nullcontext(lambda count: None), None)
    assert {split: len(source) for split, source in sources.items()} == {"train": 2, "evaluation": 1}
    said = [record.getMessage() for record in caplog.records]
    show("evaluation on training rows", said[-1], world.folder)
    assert said[1:] == [
        "train: 2 rows, dropped {'no ground truth': 1}",
        "evaluation: 1 rows, dropped {'no ground truth': 1, 'image: damaged': 1}",
        f"data.evaluation: {world.rows} is trained on, too: the evaluation does not say what was learned",
    ]


# Files and checkpoints, when a run opens them.


def wrong_columns(world: World) -> None:
    pq.write_table(pa.table({"question": ["?"], "answer": ["1"]}), world.rows)


def wrong_type(world: World) -> None:
    pq.write_table(pa.table({"problem": ["?"], "answer": ["1"], "images": ["a.png"]}), world.rows)


def damaged_footer(world: World) -> None:
    content = bytearray(world.rows.read_bytes())
    content[-60:-20] = b"\xff" * 40
    world.rows.write_bytes(content)


def all_dropped(world: World) -> None:
    write_rows(world.rows, [record(images=[b""]), record(images=[b"x"]), record(truth=""), record(truth=None)])


def broken_template(template: str) -> Break:
    return text("model/chat_template.jinja", template)


SOURCES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "wrong columns": (
        wrong_columns,
        (
            "columns are question, answer; accepted layouts are verl: data_source, prompt, reward_model",
            "EasyR1: problem",
        ),
    ),
    "column of the wrong type": (wrong_type, ("column 'images' must hold a list of", "got string; convert the column")),
    "parquet file with a damaged end": (
        damaged_footer,
        ("rows.parquet: cannot be read as parquet (", "write the file"),
    ),
    "parquet file without rows": (lambda world: write_rows(world.rows, []), ("none of 0 rows", "the files are empty")),
    "every row is bad": (
        all_dropped,
        ("none of 4 rows can become a prompt (image: empty: 1, image: corrupt: 1, no ground truth: 2); mend the rows",),
    ),
    "chat template that cannot be parsed": (
        broken_template("{% for x in %}"),
        ("the chat template of", "cannot be parsed, line 1", "copy the checkpoint's chat template again"),
    ),
    "chat template that refuses every row": (
        broken_template("{{ raise_exception('no') }}"),
        ("none of 1 rows can become a prompt (chat template refuses the messages: 1)",),
    ),
    "chat template that knows no images": (
        broken_template("{% for m in messages %}{{ m.role }}{% endfor %}"),
        ("none of 1 rows can become a prompt (image lost by the chat template: 1)",),
    ),
    "tokenizer of another checkpoint": (
        edit_config(image_token_id=5),
        ("image_token_id of config.json is 5, and the tokenizer's id of <|image_pad|> is", "from the same checkpoint"),
    ),
    "image processor that is no JSON": (
        text("model/preprocessor_config.json", "{"),
        ("no image processor can be loaded from", "copy the checkpoint's preprocessor_config.json"),
    ),
    "image processor of another family": (
        text("model/preprocessor_config.json", '{"image_processor_type": "NoSuchProcessor"}'),
        ("no image processor can be loaded from", "copy the checkpoint's preprocessor_config.json"),
    ),
    "tokenizer.json of an unknown kind": (
        lambda world: world.edit(world.model / "tokenizer.json", lambda t: t["model"].update(type="NoSuchModel")),
        ("no tokenizer can be loaded from", "copy the checkpoint's tokenizer files"),
    ),
    "no end of an answer": (
        lambda world: world.edit(world.model / "tokenizer_config.json", lambda t: t.update(eos_token=None)),
        ("has eos_token_id None; set eos_token in tokenizer_config.json",),
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_run_finds_when_it_opens_its_files(name: str, source: Callable[..., PromptSource], world: World) -> None:
    damage, parts = SOURCES[name]
    damage(world)
    vocabulary.cache_clear()
    with pytest.raises(UserError) as caught:
        source(str(world.rows))
    show(name, caught.value, world.folder)
    for part in parts:
        assert part in str(caught.value), part


def test_the_reader_refuses_what_cannot_be_trained(world: World) -> None:
    """`--check` has said so; whoever reads a folder without it hears the same."""
    save_weights(a=torch.zeros(2, dtype=torch.int8), b=torch.zeros(2))(world)
    with pytest.raises(
        ConfigError, match=r"1 tensors are not of a trainable type \(F32, BF16, F16\): a is I8; use the"
    ):
        Reader(str(world.model))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        save_weights(a=torch.ones(2, dtype=dtype))(world)
        with Reader(str(world.model)) as reader:
            assert reader.read("a").float().tolist() == [1, 1]
