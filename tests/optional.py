"""Packages that only `pip install -e ".[test-integrations]"` brings: what needs one is skipped where it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


class Missing:
    """Stands for a package that is not installed; skips the test that uses it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        pytest.skip(f"needs {self._name}: pip install -e '.[test-integrations]'")


def optional(name: str) -> Any:
    """The module of this name, or what skips the test that uses it."""
    try:
        return import_module(name)
    except ImportError:
        return Missing(name)
