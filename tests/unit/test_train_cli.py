"""The command line as a user meets it: check, overrides, saved configs, mistakes, help, and the ranks it starts."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cppo import config as configuration
from megatron_cppo import launch, pretrained, train
from megatron_cppo.config import Config, ConfigError
from megatron_cppo.plan import Memory, Packing, Plan

ROOT = Path(__file__).parents[2]
CHECKPOINT = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "image_token_id": 5,
    "tie_word_embeddings": False,
}
# The recipe uses a dataclass of its own, with annotations that are resolved through its module.
RECIPE = '''"""A tiny recipe."""
from __future__ import annotations

from dataclasses import dataclass

from megatron_cppo.config import Config, DataConfig, ModelConfig, PolicyConfig, RolloutConfig, TrainerConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    prompts: int


def config() -> Config:
    return Config(
        model=ModelConfig(path={folder!r}),
        data=DataConfig(train=({folder!r} + "/rows.parquet",), max_prompt_tokens=64),
        rollout=RolloutConfig(max_response_tokens=8),
        policy=PolicyConfig(device="cpu", precision="fp32"),
        trainer=TrainerConfig(prompts_per_step=Sizes(6).prompts),
    )
'''
MAX_CHECK_SECONDS = 1.5
"""Of CPU time; about 0.3 s on a laptop. Importing torch alone would take more."""
HEAVY = {"torch", "transformers", "megatron", "numpy"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(CHECKPOINT))
    (folder / "rows.parquet").write_bytes(b"PAR1 as every parquet file begins and ends PAR1")
    added = [{"content": token} for token in pretrained.IMAGE_TOKENS.values()]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}, "added_tokens": added}))
    (folder / "chat_template.jinja").touch()
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "recipe.py").write_text(RECIPE.replace("{folder!r}", repr(str(folder))))
    return str(folder / "recipe.py")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def child_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_check_shows_config_and_plan_at_once(recipe: str) -> None:
    before = child_cpu_seconds()
    flags = ["--policy.tensor_parallel", "2", "--trainer.num-gpus=4"]
    done = python("-m", "megatron_cppo.train", recipe, "--check", *flags)
    seconds = child_cpu_seconds() - before
    print(f"--check took {seconds:.2f} s of CPU time")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("config", "no problems")
    described = {line.split(" = ")[0].strip() for line in lines[1 : lines.index("plan")]}
    assert described == {f"{section}.{field}" for section, field, _ in documented_fields()}
    assert "  policy.tensor_parallel = 2" in lines
    assert "  trainer.prompts_per_step = 6" in lines
    plan = dict(line.split(maxsplit=1) for line in lines[lines.index("plan") + 1 : -1])
    records = {"shape", "memory", "packing"}
    assert {*Plan.__slots__, *Memory.__slots__, *Packing.__slots__} - records <= plan.keys()
    assert (plan["num_ranks"], plan["data_parallel"], plan["longest_sample_tokens"]) == ("4", "2", str(3 * 71))
    assert seconds < MAX_CHECK_SECONDS


def test_check_loads_nothing_heavy(recipe: str) -> None:
    program = (
        f"import sys; from megatron_cppo.train import main; code = main([{recipe!r}, '--check']); "
        f"print('loaded', *(sys.modules.keys() & {HEAVY!r})); sys.exit(code)"
    )
    done = python("-c", program)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "loaded")


def test_all_mistakes_of_the_user_end_with_status_two(recipe: str) -> None:
    wrong = ["--policy.tensor-parallel", "3", "--data.train", "/no/rows.parquet", "--optimizer.warmup-updates", "100"]
    done = python("-m", "megatron_cppo.train", recipe, *wrong)
    assert (done.returncode, done.stdout) == (train.USER_ERROR, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for line, field in zip(lines, ("num_gpus", "tensor_parallel", "warmup_updates", "data.train"), strict=True):
        assert field in line.split(":")[0], lines


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--trainer.num_gpu", "--trainer.num-gpus"),
        ("--perception.top-fractoin", "--perception.top-fraction"),
        ("--policy.tensor_paralel", "--policy.tensor-parallel"),
    ],
)
def test_an_unknown_flag_fails_with_a_suggestion(
    flag: str, suggestion: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([recipe, flag, "1"])
    assert ended.value.code == train.USER_ERROR
    said = "".join(capsys.readouterr())
    assert flag in said
    assert suggestion in said


@pytest.mark.parametrize("words", [["--policy.precision", "fp8"], ["--trainer.num-gpus", "two"], ["--data.shuffle"]])
def test_a_value_of_the_wrong_type_fails(words: list[str], recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([recipe, "--check", *words])
    assert ended.value.code == train.USER_ERROR
    assert words[0].replace("_", "-") in "".join(capsys.readouterr())


def unusual() -> Config:
    """Every field differs from its default: numbers of any size, empty and full tuples, texts that look like flags."""
    texts = iter(["", "--check", "- think first,\nthen answer in \\boxed{}", "a b", "'\"$", "-1"] * 9)
    numbers = iter([1e-6, 1e-300, 0.1, 1 / 3, 123456.789, 2.5e10] * 9)

    def other(value: Any, annotation: str) -> Any:
        if annotation.startswith("Literal"):
            return next(choice for choice in ast.literal_eval(annotation.removeprefix("Literal")) if choice != value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + 12345
        if isinstance(value, float):
            return next(numbers)
        if isinstance(value, str):
            return next(texts)
        if annotation == "tuple[float, float]":
            return (next(numbers), next(numbers))
        if annotation.startswith("tuple[int"):
            return (*value, 3, 12345)
        return () if value else ("x=1", "", "a b", "ü")

    sections = {}
    for section in dataclasses.fields(Config):
        default = getattr(Config(), section.name)
        fields = {
            name: other(getattr(default, name), str(kind).removeprefix("typing."))
            for name, kind in typing.get_type_hints(type(default)).items()
        }
        sections[section.name] = dataclasses.replace(default, **fields)
    return Config(**sections)


def test_a_saved_config_replays_to_an_equal_one(tmp_path: Path) -> None:
    for config in (Config(), unusual()):
        configuration.save(config, tmp_path / "config.json")
        again = train.read_config(str(tmp_path / "config.json"), [])
        assert again == config
        assert all(
            type(getattr(getattr(again, section), field)) is type(getattr(getattr(config, section), field))
            for section, field, _ in documented_fields()
        )


def test_flags_override_recipes_and_saved_configs(recipe: str, tmp_path: Path) -> None:
    flags = ["--trainer.seed=3", "--data.evaluation", "a.parquet", "b.parquet", "--perception.coefficient", "1e-3"]
    fresh = train.read_config(recipe, flags)
    assert (fresh.trainer.seed, fresh.trainer.prompts_per_step) == (3, 6)
    assert fresh.data.evaluation == ("a.parquet", "b.parquet")
    configuration.save(fresh, tmp_path / "config.json")
    again = train.read_config(str(tmp_path / "config.json"), ["--trainer.seed=4", "--data.evaluation"])
    trainer, data = dataclasses.replace(fresh.trainer, seed=4), dataclasses.replace(fresh.data, evaluation=())
    assert again == dataclasses.replace(fresh, trainer=trainer, data=data)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.py", None, "recipe '.*missing.py' does not exist; give a .py file with config.., or a saved"),
        ("empty.py", "x = 1", "recipe '.*empty.py' has no function config.. -> Config; add one"),
        ("dict.py", "def config(): return {'seed': 1}", r"config\(\) must return a Config, got \{'seed': 1\}; return"),
        ("cut.json", '{"model": {', "recipe '.*cut.json' is not a saved config"),
        ("list.json", "[1]", r"must be an object of sections, got \[1\]"),
        ("flat.json", '{"seed": 1}', "section 'seed' must be an object of fields, got 1"),
    ],
)
def test_what_is_no_recipe_is_named(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        train.read_config(str(tmp_path / name), [])
    assert train.main([str(tmp_path / name), "--check"]) == train.USER_ERROR


def test_a_saved_config_with_unknown_fields_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"rollout": {"temprature": 1.0, "max_sequences": null}, "modle": {"path": ""}}'
    )
    assert train.main([str(tmp_path / "config.json")]) == train.USER_ERROR
    assert capsys.readouterr().err.splitlines() == [
        "config.json: there is no field rollout.temprature; did you mean rollout.temperature?",
        "config.json: rollout.max_sequences must be a text, a number, true or false, got None",
        "config.json: there is no field modle.path; did you mean model.path?",
    ]


@pytest.mark.parametrize("words", [[], ["--check"]])
def test_without_a_recipe_the_usage_is_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words) == train.USER_ERROR
    assert "python -m megatron_cppo.train RECIPE" in capsys.readouterr().out


def documented_fields() -> Iterator[tuple[str, str, str]]:
    """(section, field, docstring) of every settable field, read off config.py."""
    body = ast.parse(Path(configuration.__file__).read_text()).body
    classes = {node.name: node.body for node in body if isinstance(node, ast.ClassDef)}
    for section in classes["Config"]:
        if isinstance(section, ast.AnnAssign):
            statements = classes[ast.unparse(section.annotation)]
            for field, text in itertools.pairwise(statements):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(text, ast.Expr), ast.unparse(field)
                    assert isinstance(text.value, ast.Constant), ast.unparse(field)
                    yield ast.unparse(section.target), ast.unparse(field.target), str(text.value.value)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # more would make it two columns
    assert train.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    fields = list(documented_fields())
    assert len(fields) > 60
    for section, field, text in fields:
        flag = f"--{section}.{field}".replace("_", "-")
        assert f"{flag} " in shown, flag
        explained = shown.split(f"{flag} ", 1)[1].split("(default")[0]
        assert " ".join(text.split()) in explained, f"{flag} lacks its docstring: {explained[:200]}"


# What a rank of the tests below does; -S and -I keep an interpreter's start short.
def rank_program(program: str) -> list[str]:
    return [sys.executable, "-S", "-I", "-c", f"import os, pathlib, signal, sys, time\n{program}"]


def environment(folder: Path) -> dict[str, str]:
    return {"FOLDER": str(folder)}


SAY = "pathlib.Path(os.environ['FOLDER'], os.environ['RANK']).write_text(str(os.getpid()))\n"
WAIT_FOR_OTHERS = "while len(os.listdir(os.environ['FOLDER'])) < 3: time.sleep(0.01)\n"
ON_RANK_1 = "if os.environ['RANK'] == '1': "


def wait_for_ranks(folder: Path, num_ranks: int) -> None:
    deadline = time.monotonic() + 20
    while len([path for path in folder.iterdir() if path.read_text()]) < num_ranks:
        assert time.monotonic() < deadline, f"only {list(folder.iterdir())} came up"
        time.sleep(0.02)


def is_running(folder: Path, rank: int) -> bool:
    try:
        os.kill(int((folder / str(rank)).read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_that_all_finish_return_zero(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    program = (
        "pathlib.Path(os.environ['FOLDER'], os.environ['RANK']).write_text("
        f"' '.join(os.environ[name] for name in {names!r}))"
    )
    assert launch.run_ranks(rank_program(program), num_ranks=3, environment=environment(tmp_path)) == 0
    said = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in said] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({words[4] for words in said}) == 1
    assert int(said[0][4]) > 0


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(7)", 7), ("raise RuntimeError", 1), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9)],
)
def test_one_failing_rank_ends_the_others(
    end: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = rank_program(SAY + WAIT_FOR_OTHERS + ON_RANK_1 + end + "\ntime.sleep(600)")
    start = time.monotonic()
    assert launch.run_ranks(program, num_ranks=3, environment=environment(tmp_path)) == status
    assert time.monotonic() - start < launch.GRACE_SECONDS
    assert not any(is_running(tmp_path, rank) for rank in range(3))
    assert ("RuntimeError" in capfd.readouterr().err) == ("Runtime" in end)


def test_a_rank_that_finishes_early_is_no_failure(tmp_path: Path) -> None:
    program = rank_program(ON_RANK_1 + "sys.exit(0)\ntime.sleep(0.3)\n" + SAY)
    assert launch.run_ranks(program, num_ranks=2, environment=environment(tmp_path)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_rank_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    program = rank_program(deaf + SAY + WAIT_FOR_OTHERS + ON_RANK_1 + "sys.exit(3)\ntime.sleep(600)")
    assert launch.run_ranks(program, num_ranks=3, environment=environment(tmp_path)) == 3
    assert not any(is_running(tmp_path, rank) for rank in range(3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_launcher_ends_its_ranks(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM is what `kill`, `timeout` and container runtimes send."""
    program = rank_program(SAY + "time.sleep(600)")
    text = (
        # A shell's background jobs ignore SIGINT, and their children inherit that.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from megatron_cppo.launch import run_ranks; "
        f"sys.exit(run_ranks({program!r}, num_ranks=2, environment={environment(tmp_path)!r}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT)
    try:
        wait_for_ranks(tmp_path, 2)
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == 128 + number
        assert not any(is_running(tmp_path, rank) for rank in range(2))
    finally:
        launcher.kill()
        for rank in (0, 1):
            if (tmp_path / str(rank)).exists() and is_running(tmp_path, rank):
                os.kill(int((tmp_path / str(rank)).read_text()), signal.SIGKILL)


def test_rank_command_is_this_interpreter_on_the_same_arguments() -> None:
    assert launch.rank_command(["recipe.py", "--trainer.seed=1"]) == [
        sys.executable,
        "-m",
        "megatron_cppo.train",
        "recipe.py",
        "--trainer.seed=1",
    ]
