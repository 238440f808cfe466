"""The table in README.md has a row for every situation and law, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.laws import test_user_data, test_user_errors, test_user_state
from tests.situations import test_calls, test_data, test_heads, test_labels, test_pixels, test_precision, test_refusals

README = Path(__file__).with_name("README.md")
RIGHT, CURED, SAME = "right", "right, or refused with a cure that works", "the same bits"
TABLES: dict[str, tuple[Any, str]] = {
    "test_data.py": (test_data.SITUATIONS, RIGHT),
    "test_pixels.py": (test_pixels.SITUATIONS, RIGHT),
    "test_calls.py": (test_calls.SITUATIONS, RIGHT),
    "test_heads.py": (test_heads.SITUATIONS, RIGHT),
    "test_labels.py": (test_labels.SITUATIONS, RIGHT),
    "test_precision.py": (test_precision.SITUATIONS, RIGHT),
    "test_refusals.py": (test_refusals.SITUATIONS, CURED),
    "../laws/test_user_state.py": (test_user_state.CASES, SAME),
    "../laws/test_user_data.py": (test_user_data.CASES, SAME),
    "../laws/test_user_errors.py": (test_user_errors.CASES, SAME),
}


def section(name: str) -> list[str]:
    """Rows under the heading of a test file."""
    text = README.read_text(encoding="utf-8").split(f"## [{name}]({name})\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("name", TABLES)
def test_the_table_has_a_row_for_each(name: str) -> None:
    situations, now = TABLES[name]
    expected = [f"| {key} | {one.source} | {one.before} | {now} |" for key, one in situations.items()]
    assert [row for row in section(name) if "`test_" not in row] == expected


def test_tests_that_the_table_names_exist() -> None:
    for name in (*TABLES, "test_runs.py"):
        code = (README.parent / name).read_text(encoding="utf-8")
        named = [cell.strip("`") for row in section(name) for cell in row.split(" ") if cell.startswith("`test_")]
        assert [test for test in named if f"def {test}(" not in code] == []
