"""The lowest versions that CI installs are those that the project states."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_the_stated_bounds() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed is not None
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed[1]))
    pins = dict(line.split("==") for line in (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines())
    assert pins.keys() == bounds.keys()
    for name, bound in bounds.items():
        zeros = ".0" * (pins[name].count(".") - bound.count("."))
        assert pins[name] == bound + zeros, name
