"""The user's own Python: a recipe file with config(), and whatever a config names by import.

Owns turning what such code raises into a message that says where; must not know flags, plans or runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from megatron_cppo.config import Config, ConfigError, UserError


class UserCode:
    """A context in which code of the user runs: whatever it raises becomes a ConfigError with the line that did.

    `what` names the code; of the traceback the last line in `file` is shown, if given. UserErrors pass unchanged.
    """

    def __init__(self, what: str, file: Path | None = None) -> None:
        self._what, self._file = what, file

    def __enter__(self) -> None:
        """Nothing is needed to run it."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            raise ConfigError(f"{self._what} cannot be run: {said} ({self._place(error, at)}); mend it") from error

    def _place(self, error: Exception, at: TracebackType | None) -> str:
        if isinstance(error, SyntaxError) and error.lineno is not None:
            return f"{error.filename}, line {error.lineno}: {(error.text or '').strip()}"
        frames = [frame for frame in traceback.extract_tb(at) if not frame.filename.startswith("<frozen")]
        if self._file is not None:
            frames = [frame for frame in frames if Path(frame.filename) == self._file]
        return f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else str(self._file)


def find(recipe: str) -> Path:
    """The recipe's file. Raises ConfigError when there is none."""
    path = Path(recipe)
    if os.path.isdir(path):
        saved = path / "config.json"
        hint = f"give {saved}" if saved.is_file() else "give a .py file with config(), or a saved config.json"
        raise ConfigError(f"recipe {recipe!r} is a folder; {hint}")
    if not os.path.exists(path):
        raise ConfigError(f"recipe {recipe!r} does not exist; give a .py file with config(), or a saved config.json")
    return path


def from_python(path: Path) -> Config:
    """What config() of a recipe file returns. Raises ConfigError when it does not, naming the line that failed."""
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None, f"{path} cannot be a module"
    assert spec.loader is not None, f"{path} has no loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the recipe look their module up
    with UserCode(f"recipe '{path}'", path):
        spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ConfigError(f"recipe '{path}' has no function config() -> Config; add one")
    with UserCode(f"recipe '{path}': config()", path):
        made = module.config()
    if not isinstance(made, Config):
        raise ConfigError(f"recipe '{path}': config() must return a Config, got {made!r}; return Config(...)")
    return made
