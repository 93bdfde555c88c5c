"""A function of a Python file that is named on the command line.

The file runs unrestricted, as any program of the user's would. It is loaded without adding its
folder to the import path, and its sha256 is stored in the run.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from dpo_cli.errors import ConfigError, UserError

OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, which the loop answers with smaller micro-batches


@dataclass(frozen=True)
class UserFunction:
    """function: the file's own; errors in it become a ConfigError that ends with the traceback
    inside the file. key: that named the file, for messages."""

    key: str
    path: str
    name: str
    digest: str  # sha256 of the file
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            if type(error).__name__ == OUT_OF_MEMORY:
                raise
            raise self.wrong(f"{self.name}() raised {_told(error, self.path)}") from error

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self.key}={self.path}: {what}")


@cache  # one load per process: what runs is what was hashed
def user_function(key: str, path: str, name: str) -> UserFunction:
    """The function `name` of a file. ConfigError for a file that cannot be read, does not run, or
    does not define the function."""
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror})") from error
    scope: dict[str, Any] = {"__name__": "dpo_run_user_code", "__file__": path}
    try:
        exec(compile(source, path, "exec"), scope)
    except Exception as error:
        raise ConfigError(f"{key}={path}: does not run: {_told(error, path)}") from error
    function = scope.get(name)
    if not callable(function):
        raise ConfigError(f"{key}={path}: defines no function {name}()")
    return UserFunction(key, path, name, hashlib.sha256(source).hexdigest(), function)


def _told(error: Exception, path: str) -> str:
    """`ValueError: no`, followed by the lines of the file in its traceback."""
    said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"line {error.lineno}: {said}"
    return said + "".join(f"\n  line {f.lineno}, in {f.name}: {f.line}" for f in frames)
