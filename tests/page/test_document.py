"""The page of a run: what is stored, how well, and what is refused; tests/page/test_browser.py opens it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runs import fit
from tests.saved_runs import save_run
from vit_explain_callback import Detail, ViTExplainCallback
from vit_explain_callback.cli.command import main
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.page.data import quantised
from vit_explain_callback.page.document import REPORT, LivePage, render_page, write_page
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import Run
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.tracking.thinning import thinned
from vit_explain_callback.visualization.overlay import times_uniform

HOSTILE = "</script><img src=x><!--"  # as long as a name may be


class Elements(HTMLParser):
    """Text of the script and style elements, and the tags in the order of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.last: tuple[str, dict[str, str | None]] = ("", {})
        self.policy = ""
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.last = (tag, dict(attrs))
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.last = ("", {})

    def handle_data(self, data: str) -> None:
        if self.last[0] in ("script", "style") and data.strip():
            self.raw.append((self.last[1], data))


def data_of(html: str) -> dict[str, Any]:
    found: dict[str, Any] = next(json.loads(text) for attrs, text in Elements(html).raw if attrs.get("id") == "data")
    return found


def maps_of(method: dict[str, Any], snapshot: int) -> list[list[float]]:
    """Read the records of a snapshot, value by value."""
    patches = method["grid"][0] * method["grid"][1]
    record = base64.b64decode(method["maps"][snapshot])
    assert len(record) % (8 + patches) == 0
    maps = []
    for start in range(0, len(record), 8 + patches):
        low, high = struct.unpack("<ff", record[start : start + 8])
        maps.append([low + (high - low) * q / 255 for q in record[start + 8 : start + 8 + patches]])
    return maps


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("signed", [False, True])
def test_a_stored_value_is_wrong_by_at_most_half_a_level_of_its_own_map(scale: float, signed: bool) -> None:
    maps = torch.rand(7, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5 * signed
    maps *= torch.logspace(-3, 3, 7)[:, None, None].double() * scale
    stored = {"grid": [5, 9], "maps": [base64.b64encode(quantised(maps)).decode()]}
    for values, found in zip(maps.flatten(1).tolist(), maps_of(stored, 0), strict=True):
        spread = max(values) - min(values)
        assert max(abs(a - b) for a, b in zip(values, found, strict=True)) <= spread / 510 * (1 + 1e-4)


def test_flat_maps_are_kept_and_what_is_not_finite_is_marked() -> None:
    maps = torch.stack([torch.full((2, 3), 0.25), torch.full((2, 3), torch.nan), torch.zeros(2, 3), torch.eye(2, 3)])
    maps[3, 0, 0] = torch.inf
    flat, unknown, zero, infinite = maps_of({"grid": [2, 3], "maps": [base64.b64encode(quantised(maps))]}, 0)
    assert flat == [0.25] * 6
    assert zero == [0.0] * 6
    assert np.isnan(unknown).all()
    assert np.isnan(infinite).all()
    assert times_uniform(maps).isfinite().flatten(1).any(dim=1).tolist() == [False] * 4  # a flat map ranks nothing


def test_the_page_holds_the_maps_of_every_method_and_snapshot(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", regions=["left", "wide"])
    data = data_of(render_page(run))
    paths = sorted((run / "explanations").glob("step_*"))
    masks = torch.zeros(2, 4, 48, 64, dtype=torch.bool)
    masks[0, :, 8:24, 8:32] = masks[1, :, 8:32, 8:32] = True
    (found,) = data["runs"]
    assert found["steps"] == [0, 10, 20, 40]
    assert list(data["classes"].values()) == ["cat", "dog", "hare"]
    for index, snapshot in enumerate(map(Snapshot.load, paths)):
        for method, maps in snapshot.maps.items():
            stored = maps_of(found["methods"][method], index)
            for values, own in zip(maps.double().flatten(1).tolist(), stored, strict=True):
                expected = [value / sum(values) * len(values) for value in values]
                spread = max(expected) - min(expected)
                assert own == pytest.approx(expected, abs=spread / 500)
            for region, mask in zip(("left", "wide"), masks, strict=True):
                lift = region_statistics(maps, mask)["lift"].tolist()
                assert found["methods"][method]["lift"][region][index] == pytest.approx(lift, rel=5e-3)
        assert found["prediction"][index] == snapshot.prediction.tolist()
        assert found["target_probability"][index] == pytest.approx(snapshot.target_probability().tolist(), rel=5e-3)


def test_the_policy_allows_the_pages_own_scripts_and_no_network(tmp_path: Path) -> None:
    elements = Elements(render_page(save_run(tmp_path / "run")))
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for attrs, text in elements.raw
        if attrs.get("type") != "application/json"
    }
    policy = dict(part.strip().split(" ", 1) for part in elements.policy.split(";"))
    assert set(policy["script-src"].split()) | set(policy["style-src"].split()) == hashes
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"
    assert set(policy) == {"default-src", "img-src", "script-src", "style-src", "base-uri", "form-action"}
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(elements.tags)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    grids = {HOSTILE: (2, 2), "rollout": (2, 2)}
    run = save_run(tmp_path / "<b>run&", grids=grids, class_names=[HOSTILE] * 3, regions=[HOSTILE])
    plain = save_run(tmp_path / "plain", grids={"a": (2, 2), "b": (2, 2)}, regions=["c"])
    html = render_page(run)
    assert HOSTILE not in html
    assert Elements(html).tags == Elements(render_page(plain)).tags
    data = data_of(html)
    assert HOSTILE in data["runs"][0]["methods"]
    assert set(data["classes"].values()) == {HOSTILE}
    assert "&lt;b&gt;run&amp;" in html


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": (48, 60)}, "pictures"),
        ({"labels": (0, 1, 2, 1)}, "labels"),
        ({"images": 3, "labels": (0, 1, 2)}, "number of images, pictures, labels"),
        ({"grids": {"flow": (4, 6)}}, "methods"),
    ],
)
def test_runs_of_another_probe_are_refused_by_name(
    other: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save_run(tmp_path / "one"), save_run(tmp_path / "same", seed=1), save_run(tmp_path / "other", **other)]
    assert main(["report", *map(str, folders[:2]), "--output", str(tmp_path / "both.html")]) == 0
    assert [run["name"] for run in data_of((tmp_path / "both.html").read_text("utf-8"))["runs"]] == ["one", "same"]
    assert main(["report", *map(str, folders)]) == 2
    assert re.search(
        rf"other/explanations differs from \S+one/explanations in its {message}: make a page", capsys.readouterr().err
    )
    assert not (tmp_path / "one" / "report.html").exists()


def test_only_methods_in_common_are_shown(tmp_path: Path) -> None:
    one = save_run(tmp_path / "one")
    other = save_run(tmp_path / "other", grids={"grad_rollout": (6, 2), "flow": (3, 3)})
    data = data_of(render_page([one, other]))
    assert [list(run["methods"]) for run in data["runs"]] == [["grad_rollout"]] * 2
    assert [run["methods"]["grad_rollout"]["grid"] for run in data["runs"]] == [[3, 5], [6, 2]]


@pytest.mark.parametrize("count", [3, 10, 48])
@pytest.mark.parametrize("every", [1, 10])
def test_a_long_run_is_thinned_by_the_logarithm_and_keeps_its_ends(count: int, every: int) -> None:
    steps = list(range(500, 500 + 2000 * every, every))
    kept = [steps[index] for index in thinned(steps, count, last=2)]
    assert count - 2 <= len(kept) <= count
    assert {500, *steps[-2:]} <= set(kept)
    gaps = np.diff(np.log1p(np.array(kept[:-2]) - 500))
    left_out = np.diff(kept[:-2]) > every  # elsewhere there is nothing to leave out
    assert len(gaps[left_out]) < 2 or gaps[left_out].max() < 3 * gaps[left_out].min()


def test_a_short_run_is_not_thinned() -> None:
    assert thinned([5], 3, last=2) == [0]
    assert thinned([0, 1, 100], 3, last=2) == [0, 1, 2]
    assert thinned([*range(300)], 300, last=2) == [*range(300)]


def test_the_page_says_how_many_snapshots_there_are(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", steps=range(9))
    (found,) = data_of(render_page(run, most_snapshots=5))["runs"]
    assert (found["taken"], len(found["steps"])) == (9, 5)
    with pytest.raises(ValueError, match="at least one of `runs` and 3 of `most_snapshots`, but got 1 and 2"):
        render_page(run, most_snapshots=2)
    with pytest.raises(ValueError, match="but got 0 and 300"):
        render_page([])


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run")
    file = write_page(run)
    assert file == run / "explanations" / "report.html"
    assert write_page(run / "explanations") == file
    before = file.read_bytes()

    def interrupted(path: Path, content: bytes) -> int:
        with path.open("wb") as opened:
            opened.write(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_page(run)
    assert file.read_bytes() == before
    assert {path.name for path in file.parent.iterdir() if path.suffix != ".safetensors"} == {"report.html"}


def test_sixty_snapshots_of_sixteen_images_take_less_than_three_megabytes(tmp_path: Path) -> None:
    labels = [index % 3 for index in range(16)]
    run = save_run(
        tmp_path / "run",
        images=16,
        labels=labels,
        steps=range(60),
        grids={"rollout": (14, 14), "grad_rollout": (14, 14)},
        size=(224, 224),
    )
    assert len(render_page(run).encode()) < 3e6


@pytest.mark.parametrize(
    "unusual",
    [
        {"steps": (7,)},
        {"labels": None, "class_names": None},
        {"regression": True, "classes": 1, "labels": None, "class_names": None},
        {"labels": (0, -1, 2, -1)},
        {"maps": {"rollout": torch.full((4, 4, 2, 2), torch.nan)}},
        {"maps": {"rollout": torch.zeros(4, 4, 2, 2)}},
    ],
    ids=["one snapshot", "no labels", "regression", "some labels", "NaN maps", "zero maps"],
)
def test_unusual_runs_have_a_page(unusual: dict[str, Any], tmp_path: Path) -> None:
    data = data_of(render_page(save_run(tmp_path / "run", **unusual)))
    assert (data["runs"][0]["output"] is not None) == unusual.get("regression", False)
    if "labels" in unusual:
        assert data["labels"] == (None if unusual["labels"] is None else [0, None, 2, None])


def test_a_run_keeps_its_page_up_to_date_unless_that_costs_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr("vit_explain_callback.page.document.write_page", lambda run: written.append(len(run.rows)))
    clock = iter([0.0, 1.0, 5.0, 10.0, 12.0, 20.0, 21.0, 22.0, 23.0])
    monkeypatch.setattr("vit_explain_callback.page.document.time.monotonic", lambda: next(clock))
    page, run = LivePage(), Run(tmp_path, Probe(None, []), [], [{}])
    page.write(run, is_last=False)  # takes 1
    page.write(run, is_last=False)  # at 5, too soon after 1
    assert len(written) == 1
    page.write(run, is_last=True)  # the last is written whenever it comes
    assert len(written) == 2
    page.write(run, is_last=False)  # at 20, though writing took 2: not before 12 + 20
    assert len(written) == 2


def test_the_callback_writes_its_page_and_can_be_told_not_to(tmp_path: Path) -> None:
    with_page = fit(ViTExplainCallback(["rollout"]), tmp_path / "a")
    text = Path(with_page.log_dir or "", "explanations", REPORT).read_text(encoding="utf-8")
    assert "Explanation drift" in text
    without = fit(ViTExplainCallback(["rollout"], detail=Detail(page=False)), tmp_path / "b")
    assert not list(Path(without.log_dir or "").rglob(REPORT))
