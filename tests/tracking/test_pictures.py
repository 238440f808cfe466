"""Which pictures a run has, under which tags, and of which images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import random_images
from tests.tracking.test_snapshot import snapshot as whole_snapshot
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.pictures import figures, last_filmstrips
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.filmstrip import filmstrip

COUNT = 6
PROBE = Probe.of(random_images(COUNT, (32, 32)), torch.zeros(COUNT, dtype=torch.long), num_shown=2)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each filmstrip was drawn of."""
    found: list[dict[str, Any]] = []

    def spy(pictures: Any, titles: Any, steps: Any, maps: Any, *rest: Any) -> Any:
        found.append({"titles": list(titles), "maps": maps})
        return filmstrip(pictures, titles, steps, maps, *rest)

    monkeypatch.setattr("vit_explain_callback.tracking.pictures.filmstrip", spy)
    return found


def run(turned: list[int]) -> History:
    """Two snapshots between which the ranking of some images' maps is turned round."""
    start = torch.rand(COUNT, 4, 4, generator=torch.Generator().manual_seed(0))
    after = start + 0.01
    after[turned] = 1 - start[turned]
    history = History()
    for step, maps in enumerate((start, after)):
        history.add(
            Snapshot(step, Explanation({"rollout": maps}, torch.eye(COUNT), torch.zeros(COUNT, dtype=torch.long)))
        )
    return history


def test_the_last_filmstrip_adds_the_images_that_changed_most(drawn: list[dict[str, Any]]) -> None:
    history = run([1, 3, 5])  # image 1 is shown anyway
    assert [tag for tag, _ in last_filmstrips(history, PROBE)] == ["explain/filmstrip/rollout"]
    assert drawn[0]["titles"] == ["class 0", "class 0", "class 0\nchanged most", "class 0\nchanged most"]
    assert drawn[0]["maps"][-1].equal(history.now.maps["rollout"][[0, 1, 3, 5]])


def test_nothing_is_added_where_every_image_is_shown(drawn: list[dict[str, Any]]) -> None:
    whole = Probe.of(random_images(COUNT, (32, 32)), num_shown=COUNT)
    assert list(last_filmstrips(run([3]), whole)) == []
    assert drawn == []


def test_what_is_to_be_seen_first_is_first_in_the_alphabet() -> None:
    history = History()
    for step in range(3):
        history.add(replace(whole_snapshot(step, whole=True), reliability=None))
    probe = Probe.of(random_images(2, (32, 32)), num_shown=1)
    brief = [tag for tag, _ in figures(history, probe, "brief")]
    names = ("grad_rollout_max_0.9", "rollout")
    assert sorted(brief) == [*(f"explain/filmstrip/{name}" for name in names), "explain/heatmap/blocks"]
    full = sorted(tag for tag, _ in figures(history, probe))
    assert full[:3] == sorted(brief)
    assert full[3:] == [f"explain/{kind}/{name}/0" for kind in ("overlay", "overlay_change") for name in names]
