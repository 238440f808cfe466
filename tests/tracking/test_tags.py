"""Tags are spelled in one place, and stay what dashboards know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import vit_explain_callback
from vit_explain_callback.tracking import tags

PACKAGE = Path(vit_explain_callback.__file__).parent


def spelled(source: str) -> list[str]:
    """Texts of a source file that begin like a tag, but for docstrings."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"explain/\S*$", node.value):
            texts.append(node.value)
    return texts


def test_no_other_file_spells_a_tag() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "tags.py"]
    assert {
        str(path): spelled(path.read_text(encoding="utf-8")) for path in others if spelled(path.read_text("utf-8"))
    } == {}
    assert spelled("f(f'explain/map/{name}')") == ["explain/map/"]


def test_the_spelling_of_each_family() -> None:
    assert tags.drift("r", "spearman", "previous") == "explain/drift/previous_rank_correlation/r"
    assert tags.drift("r", "mine", is_extra=True) == "explain/drift/baseline_mine/r"
    assert tags.scaled_drift("r", "spearman", "baseline") == "explain/drift/noise_to_unrelated/r"
    assert tags.scaled_drift("r", "spearman", "previous") == "explain/statistics/drift_previous_scaled/r/spearman"
    assert tags.drift_spread("r", "cosine", "p10") == "explain/statistics/drift_baseline_spread/r/cosine/p10"
    assert tags.drift_split("r", "cosine", "changed", "previous").endswith("/drift_previous_split/r/cosine/changed")
    assert tags.drift_level("r", "cosine", "noise") == "explain/statistics/drift_scale/r/cosine/noise"
    assert tags.block_drift("spearman", 0) == "explain/statistics/drift_blocks/spearman/block_01"
    assert tags.attention("entropy", 11) == "explain/statistics/attention/entropy/block_12"
    assert tags.map_statistic("r", "sink_lift") == "explain/map/sink_lift/r"
    assert tags.map_statistic("r", "degenerate") == "explain/statistics/map/r/degenerate"
    assert tags.region("spot", "r") == "explain/lift/spot/r"
    assert tags.region("spot", "r", "share") == "explain/statistics/region/spot/r/share"
    assert tags.final(["r"], ["spot"])["explain/final/lift/spot/r"] == "explain/lift/spot/r"
    assert tags.overlay("r", 2, "_change") == "explain/overlay_change/r/2"
