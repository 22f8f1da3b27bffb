"""The house rules that a machine can check; import-linter's contracts in pyproject.toml hold the layers.

A rule is a function from a parsed file to its violations. Each is also shown a file that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_cppo.families import FAMILIES

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
MAX_CONFIG_FIELDS = 100
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}

PACKAGE = ("megatron_cppo/",)
PROGRAMS = ("megatron_cppo/", "tools/", "examples/", "benchmarks/")
IN_VLLM = "megatron_cppo/rollout/inside_vllm/megatron_cppo_in_vllm.py"
ENVIRONMENT_READERS = ("megatron_cppo/train.py", "megatron_cppo/policy/platform.py", IN_VLLM)
IMPORTERS: dict[str, tuple[str, ...]] = {
    "megatron": ("megatron_cppo/policy/",),
    "tyro": ("megatron_cppo/train.py",),
    "vllm": (IN_VLLM,),
}
DESCRIPTION = ("config", "types", "plan")  # what `--check` needs; plan imports the other two
HEAVY = ("torch", "transformers", "megatron", "numpy")


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its path from the repository's root, and what is in it."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)


Violation = tuple[int, str]


def long_files(source: Source) -> Iterator[Violation]:
    num_lines = len(source.text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield num_lines, f"the file has {num_lines} lines, at most {MAX_FILE_LINES} are allowed"


def long_functions(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES} are allowed"


def nameless_modules(source: Source) -> Iterator[Violation]:
    for part in Path(source.path).with_suffix("").parts:
        if part in NAMELESS:
            yield 1, f"'{part}' says nothing about what is inside"


def missing_module_docstrings(source: Source) -> Iterator[Violation]:
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring"


def prints(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield node.lineno, "print is called; the run log speaks for the package"


def broad_excepts(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = [] if node.type is None else node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if not caught or {"Exception", "BaseException"} & {ast.unparse(name) for name in caught}:
                yield node.lineno, "an except clause that catches everything"


def bare_asserts(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield node.lineno, "an assert without a message"


def environment_reads(source: Source) -> Iterator[Violation]:
    if source.path in ENVIRONMENT_READERS:
        return
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os":
            yield node.lineno, f"os.{node.attr} is used outside {', '.join(ENVIRONMENT_READERS)}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}:
            yield node.lineno, f"the environment is imported from os outside {', '.join(ENVIRONMENT_READERS)}"


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every absolutely named module that the file imports, wherever the statement stands."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module


def misplaced_imports(source: Source) -> Iterator[Violation]:
    """Stricter than import-linter, which does not look at imports for type checking."""
    for line, module in imports(source):
        allowed = IMPORTERS.get(module.split(".")[0])
        if allowed is not None and not source.path.startswith(allowed):
            yield line, f"{module} is imported outside {', '.join(allowed) or 'its own environment'}"


def impure_algorithms(source: Source) -> Iterator[Violation]:
    if source.path.startswith("megatron_cppo/algo/"):
        for line, module in imports(source):
            package, *inner = module.split(".")
            ours = package == "megatron_cppo" and inner[:1] in (["algo"], ["types"], ["config"])
            if not ours and package not in ("torch", "triton") and package not in sys.stdlib_module_names:
                yield line, f"{module} is imported, but algo knows torch, triton, types and config only"


def families_by_name(source: Source) -> Iterator[Violation]:
    """A family is a folder and a line: nothing outside of `families` may import one, or ask for one by its name."""
    if source.path.startswith("megatron_cppo/families/"):
        return
    for line, module in imports(source):
        if set(FAMILIES) & set(module.split(".")):
            yield line, f"{module} is one family's; families.part finds the one that is meant"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and node.value in FAMILIES:
            yield node.lineno, f"{node.value!r} is one family's name"


RULES: dict[Callable[[Source], Iterator[Violation]], tuple[str, ...]] = {
    long_files: PROGRAMS,
    long_functions: PROGRAMS,
    nameless_modules: PROGRAMS,
    missing_module_docstrings: PROGRAMS,
    prints: PACKAGE,
    broad_excepts: PROGRAMS,
    bare_asserts: PROGRAMS,
    environment_reads: PACKAGE,
    misplaced_imports: PACKAGE,
    impure_algorithms: PACKAGE,
    families_by_name: PACKAGE,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_the_rule(rule: Callable[[Source], Iterator[Violation]]) -> None:
    paths = [path for folder in RULES[rule] for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = [Source(str(path.relative_to(ROOT)), path.read_text()) for path in paths]
    assert "megatron_cppo/config.py" in {source.path for source in sources}, f"wrong root? {ROOT}"
    found = [f"{source.path}:{line}: {what}" for source in sources for line, what in rule(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (long_files, "tools/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        (long_functions, "tools/a.py", "class A:\n  def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (nameless_modules, "megatron_cppo/utils/a.py", ""),
        (nameless_modules, "megatron_cppo/policy/helpers.py", ""),
        (missing_module_docstrings, "tools/a.py", "x = 1"),
        (prints, "megatron_cppo/a.py", "if x:\n  print(x)"),
        (broad_excepts, "tools/a.py", "try: x\nexcept: y"),
        (broad_excepts, "tools/a.py", "try: x\nexcept Exception as error: y"),
        (broad_excepts, "tools/a.py", "try: x\nexcept (OSError, BaseException): y"),
        (bare_asserts, "tools/a.py", "assert x"),
        (environment_reads, "megatron_cppo/plan.py", "import os\nx = os.environ['x']"),
        (environment_reads, "megatron_cppo/plan.py", "from os import environ, path"),
        (misplaced_imports, "megatron_cppo/loop.py", "def f():\n  from megatron.core import mpu"),
        (misplaced_imports, "megatron_cppo/policy/build.py", "import tyro"),
        (misplaced_imports, "megatron_cppo/rollout/vllm.py", "import vllm.engine"),
        (families_by_name, "megatron_cppo/policy/a.py", "from megatron_cppo.families.qwen3_vl import shape"),
        (families_by_name, "megatron_cppo/plan.py", "if shape.family == 'qwen2_5_vl': pass"),
        (impure_algorithms, "megatron_cppo/algo/a.py", "import numpy"),
        (impure_algorithms, "megatron_cppo/algo/a.py", "from megatron_cppo.plan import Plan"),
    ],
)
def test_each_rule_finds_its_violation(rule: Callable[[Source], Iterator[Violation]], path: str, text: str) -> None:
    assert list(rule(Source(path, text))), f"{rule.__name__} let this pass:\n{text[:200]}"


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (long_functions, "tools/a.py", "def f():\n" + "  x = 1\n" * (MAX_FUNCTION_LINES - 1)),
        (broad_excepts, "tools/a.py", "try: x\nexcept (OSError, ValueError): y"),
        (environment_reads, "megatron_cppo/train.py", "import os\nx = os.environ['x']"),
        (misplaced_imports, "megatron_cppo/policy/build.py", "from megatron.core import mpu"),
        (misplaced_imports, "megatron_cppo/loop.py", "from megatron_cppo.policy import vllm"),
        (families_by_name, "megatron_cppo/families/a.py", "from megatron_cppo.families.qwen3_vl import shape"),
        (families_by_name, "megatron_cppo/policy/a.py", "from megatron_cppo.families import towers"),
        (impure_algorithms, "megatron_cppo/algo/a.py", "import math, torch\nfrom megatron_cppo.types import Sample"),
    ],
)
def test_no_rule_finds_more(rule: Callable[[Source], Iterator[Violation]], path: str, text: str) -> None:
    assert not list(rule(Source(path, text))), f"{rule.__name__} forbids this:\n{text[:200]}"


def config_fields(text: str) -> Iterator[tuple[str, bool]]:
    """The settable fields of config.py as (section.field, has a docstring); the root's fields are the sections."""
    for section in ast.parse(text).body:
        if isinstance(section, ast.ClassDef) and section.name.endswith("Config") and section.name != "Config":
            for statement, following in zip(section.body, [*section.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    yield f"{section.name}.{ast.unparse(statement.target)}", documented


def test_config_fields_are_few_and_documented() -> None:
    fields = list(config_fields((ROOT / "megatron_cppo" / "config.py").read_text()))
    assert "PerceptionConfig.top_fraction" in dict(fields), f"config.py is not read as it is written: {fields}"
    assert len(fields) <= MAX_CONFIG_FIELDS, f"{len(fields)} fields, at most {MAX_CONFIG_FIELDS} are allowed"
    undocumented = [name for name, documented in fields if not documented]
    assert not undocumented, f"config.py: no docstring below {', '.join(undocumented)}"
    assert list(config_fields("class AConfig:\n  x: int = 1\n  y: int = 2\n  'of y'")) == [
        ("AConfig.x", False),
        ("AConfig.y", True),
    ]


def loaded_after(imported: str) -> set[str]:
    """Which of the HEAVY packages a fresh interpreter holds once it has imported the module."""
    program = f"import sys, {imported}; print(*(sys.modules.keys() & {set(HEAVY)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import {imported} failed:\n{done.stderr}"
    return set(done.stdout.split())


@pytest.mark.parametrize("name", [name for name in DESCRIPTION if (ROOT / f"megatron_cppo/{name}.py").exists()])
def test_describing_a_run_loads_nothing_heavy(name: str) -> None:
    loaded = loaded_after(f"megatron_cppo.{name}")
    assert not loaded, f"megatron_cppo.{name} imports {', '.join(sorted(loaded))}: --check would take seconds"


def test_a_heavy_import_is_noticed() -> None:
    assert loaded_after("numpy") == {"numpy"}
