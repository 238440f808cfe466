"""Parse the words after `--method`: names of this package's methods, or `MODULE:NAME` for the user's."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from vit_explain_callback.methods.base import Method
from vit_explain_callback.methods.map_function import AnyMethod, MapFunction
from vit_explain_callback.methods.names import method_from_name

_AS_IN = "as in --method my_methods:grad_cam"


def parse_methods(words: Sequence[str]) -> list[AnyMethod]:
    """Turn words into methods.

    Args:
        words: Names such as `rollout_max_0.9`, or `package.module:name` for an object of a module; installed modules
            take precedence over those in the current folder.

    Raises:
        ValueError: If there is no such method.
    """
    return [_load_method(word) if ":" in word else method_from_name(word) for word in words]


def _load_method(word: str) -> AnyMethod:
    path, _, name = word.partition(":")
    if not all(part.isidentifier() for part in [*path.split("."), name]):
        raise ValueError(f"Expected `method` to be MODULE:NAME, {_AS_IN}, but got {word!r}.")
    module = _import_module(path, word)
    if not hasattr(module, name):
        raise ValueError(
            f"Expected `method` to name an object of a module, but got {word!r}: {_available_names(module, name)}"
        )
    method = getattr(module, name)
    if isinstance(method, type) and issubclass(method, Method):
        try:
            method = method()
        except TypeError as error:
            raise ValueError(
                f"Expected `method` to name a Method that has a default for each option, but got {word!r} ({error}): "
                f"name an object, as in `mine = {name}(…)`."
            ) from error
    if isinstance(method, MapFunction | Method):
        return method
    cure = f"write `my_{name} = MapFunction({name!r}, {name})` there, and name that" if callable(method) else "name one"
    raise ValueError(
        f"Expected `method` to name a MapFunction or a Method, but got {word!r}, a {type(method).__name__}: {cure}."
    )


def _import_module(path: str, word: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last, so that no file here shadows an installed module
    try:
        return importlib.import_module(path)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise ValueError(
                f"Expected `method` to name a module that can be imported, {_AS_IN}, but got {word!r}: there is no "
                f"{error.name} in {here}, nor is it installed. Run the command in the folder that contains it."
            ) from error
        raise ValueError(
            f"Expected `method` to name a module that can be imported, but got {word!r}, which raises {error!r}: "
            f'python -c "import {path}" shows where.'
        ) from error


def _available_names(module: ModuleType, name: str) -> str:
    """Describe what a module offers instead of a missing name."""
    methods = [key for key, value in vars(module).items() if isinstance(value, MapFunction | Method)]
    close = difflib.get_close_matches(name, vars(module), 1)
    file = getattr(module, "__file__", None) or module.__name__
    alternative = (
        f"its methods are {', '.join(methods)}" if methods else f"it has {close[0]}" if close else "it has no methods"
    )
    return f"{file} has no {name}; {alternative}."
