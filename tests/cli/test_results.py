"""The folder of results: what is never overwritten, names that no file system accepts, and the index.

| attempt | asserted |
|---|---|
| `--output .` beside a photograph, or another file, called as a result | unchanged; the others are explained |
| the same through a hard link, and for a result of an earlier run that is now an image to explain | the same |
| an output file, a folder in the output or the index that is a symbolic link | what it leads to is unchanged |
| `report.html` or `--output` that is another file, or a link | unchanged; a page is overwritten |
| another `explanations.json`, or one that was edited (200 times) | unchanged; one line |
| the same command again; with another method between; after a run that was killed | overwritten |
| file names that are no UTF-8, hold control characters, are 250 bytes long | explained, with printable short names |
| a name too long to open; an image that the transform cannot take | the others are explained |
| NaN weights | `null`, valid JSON |
| Ctrl-C, an error, a full disk in the middle | the index lists what is done |
| numbers below their range | refused |
| a class name of 3,000 characters, with `$` | no time, no error |
"""

from __future__ import annotations

import errno
import json
import os
import random
import time
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.cli.photographs import ANIMALS, NAME, OWN, checkpoint, index, photograph
from vit_explain_callback.cli.command import main
from vit_explain_callback.cli.photograph import Photograph, View
from vit_explain_callback.cli.results import ResultFolder, result_name

RESULT = "a.rollout_max_0.9.png"


def strict_index(folder: str = "explanations") -> Any:
    """The index, by a reader that takes JSON only."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = (Path(folder) / "explanations.json").read_bytes()
    return json.loads(content.decode("utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("as_input", [True, False])
def test_a_file_called_as_a_result_is_not_written_over(
    here: Path, as_input: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("a.png", RESULT, "b.png", "a.compare.png")):
        photograph(name, seed)
    before = {name: Path(name).read_bytes() for name in (RESULT, "a.compare.png")}
    given = ["a.png", "b.png", *([RESULT] if as_input else [])]
    for _ in range(2):
        assert main([*given, *OWN, "--output", "."]) == 2
        assert "is not overwritten" in capsys.readouterr().err
        assert [image["file"] for image in index(".")["images"]] == given[1:]
    assert main(["compare", "a.png", *OWN, "--output", "."]) == 2
    assert {name: Path(name).read_bytes() for name in before} == before
    assert len(index(".")["failed"]) == 1


def test_a_result_that_became_an_image_to_explain_is_not_written_over(here: Path) -> None:
    photograph("a.png", 1)
    assert main(["a.png", *OWN, "--output", "."]) == 0
    before = Path(RESULT).read_bytes()
    os.link(RESULT, "linked.png")
    save_file(checkpoint(4).state_dict(), "own.safetensors")
    assert main(["a.png", "linked.png", *OWN, "--output", "."]) == 2
    assert Path(RESULT).read_bytes() == Path("linked.png").read_bytes() == before


def test_links_are_not_followed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("elsewhere").mkdir()
    Path("precious").write_text("precious")
    photograph("in/sub/a.png", 1)
    photograph("in/b.png", 2)
    Path("out").mkdir()
    Path("out/sub").symlink_to("../elsewhere")
    Path("out/b.rollout_max_0.9.png").symlink_to("../precious")
    assert main(["in", *OWN, "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert "leads out of out" in said
    assert "is a symbolic link" in said
    Path("out/explanations.json").unlink()
    Path("out/explanations.json").symlink_to("../precious")
    assert main(["in", *OWN, "--output", "out"]) == 2
    assert Path("precious").read_text() == "precious"
    assert not list(Path("elsewhere").iterdir())


def test_an_index_that_is_none_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["both.png", *OWN]) == 0
    path = Path("explanations/explanations.json")
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(200):
        edited = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            edited[draw.randrange(len(edited))] = draw.randrange(256)
        path.write_bytes(edited[: draw.choice([len(edited), draw.randrange(len(edited))])])
        before = path.read_bytes()
        try:
            ResultFolder(path.parent).write_index({})
        except OSError as error:
            assert "is not overwritten" in str(error)  # noqa: PT017
            assert path.read_bytes() == before
            refused += 1
        strict_index() if path.read_bytes() != before else None
    assert refused > 100
    for other in ("[]", "{}", '{"files": [3]}', "[" * 10**5, ""):
        path.write_text(other)
        assert main(["both.png", *OWN]) == 2
        assert path.read_text() == other
    assert capsys.readouterr().err.count("is not an index of vit-explain") == 5


def test_own_results_are_written_over_whatever_ran_between(here: Path) -> None:
    path = Path("explanations/both.rollout_max_0.9.npy")
    assert main(["both.png", *OWN]) == 0
    before = path.read_bytes()
    assert main(["both.png", *OWN, "--category_index", "cat"]) == 0
    assert main(["compare", "both.png", *OWN]) == 0
    save_file(checkpoint(4).state_dict(), "own.safetensors")
    assert main(["both.png", *OWN]) == 0
    assert path.read_bytes() != before
    assert sorted(index()["files"]) == sorted({each.name for each in path.parent.iterdir()} - {"explanations.json"})
    path.unlink()
    assert main(["compare", "both.png", *OWN]) == 0
    assert path.name not in index()["files"]
    # Killed before the index was written: the same files are there, and nothing lists them.
    Path("explanations/explanations.json").unlink()
    assert main(["both.png", *OWN]) == 0


def test_names_that_no_file_system_takes_are_made_short_and_printable(here: Path) -> None:
    names = [
        os.fsdecode(b"\xff\xfe.png"),
        "a\x1b[31m\n.png",
        "é" * 123 + ".png",
        "e" * 250 + ".png",
        "e" * 250 + ".PNG",
    ]
    for seed, name in enumerate(names):
        photograph(f"in/sub/{name}", seed)
    assert main(["in", *OWN]) == 0
    found = strict_index()["images"]
    assert {Path(image["file"]).name for image in found} == set(names)
    overlays = [image["explanations"][0]["overlay"] for image in found]
    assert len(set(overlays)) == len(names)
    assert all((Path("explanations") / overlay).is_file() for overlay in overlays)
    assert all(overlay.isprintable() and len(overlay.encode()) < 160 for overlay in overlays)
    assert result_name(Path("a/b.c d")) == "a/b.c d"


def test_one_image_that_the_transform_cannot_take_stops_no_other(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = View.box

    def refuse(view: View, size: tuple[int, int]) -> Any:
        if size == (9, 9):
            raise ValueError("no such size")
        return box(view, size)

    monkeypatch.setattr(View, "box", refuse)
    photograph("in/a.png", 1, (9, 9))
    photograph("in/b.png", 2, (1, 3000))
    assert main(["in", *OWN]) == 2
    assert index()["failed"] == ["in/a.png: no such size"]
    assert len(index()["images"]) == 1


def test_one_name_that_is_too_long_to_open_stops_no_other(here: Path) -> None:
    assert main(["x" * 300 + ".png", "both.png", *OWN]) == 2
    assert len(index()["images"]) == len(index()["failed"]) == 1


def test_a_folder_without_any_image_that_can_be_read_has_an_index(here: Path) -> None:
    Path("in").mkdir()
    Path("in/a.png").write_text("no image")
    assert main(["in", *OWN]) == 2
    assert strict_index()["images"] == []
    assert len(strict_index()["failed"]) == 1


def test_weights_that_are_not_finite_give_null(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    save_file(model.state_dict(), "own.safetensors")
    assert main(["both.png", *OWN, "--category_index", "dog", "--method", "rollout", "grad_rollout"]) == 0
    (image,) = strict_index()["images"]
    assert image["prediction"] is None
    assert image["top5"] == []
    assert image["targets"] == [{"index": 1, "name": "dog", "probability": None}]
    assert image["explanations"][1]["limit"] is None
    assert capsys.readouterr().out.splitlines()[2].split()[1:3] == ["-", "-"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("broken model"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_what_is_done_before_an_end_in_the_middle_is_in_the_index(
    here: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        photograph(f"in/{seed}.png", seed)
    drawn = np.save

    def fail_late(*given: Any) -> None:
        if Path("explanations/1.rollout_max_0.9.npy").exists():
            raise error
        drawn(*given)

    monkeypatch.setattr(np, "save", fail_late)
    assert main(["in", *OWN]) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert [Path(image["file"]).name for image in strict_index()["images"]] == ["0.png", "1.png"]
    expected = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    assert capsys.readouterr().err.splitlines()[-1] == f"vit-explain: {expected}"


def test_an_end_before_the_first_image_leaves_the_index(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["both.png", *OWN]) == 0
    before = strict_index()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Photograph, "read", fail)
    assert main(["both.png", *OWN]) == 130
    assert strict_index() == before


@pytest.mark.parametrize("number", ["-3", "0", "1.5", "x", "", "9" * 5000])
@pytest.mark.parametrize("option", ["num_images", "num_shown", "batch_size", "image_size"])
def test_numbers_below_their_range_are_refused(
    here: Path, option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drift = ["drift", "own.safetensors", "--model", NAME, "--images", ".", "--output", "out"]
    words = ["both.png"] if option == "image_size" else drift
    with pytest.raises(SystemExit):
        main([*words, f"--{option}", number])
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a number of at least 1" in line
    assert len(line) < 200


@pytest.mark.parametrize(("option", "number"), [("check_every", "-1"), ("category_index", "-1")])
def test_numbers_from_zero_are_refused_below(here: Path, option: str, number: str) -> None:
    with pytest.raises(SystemExit):
        main(["drift", "own.safetensors", "--model", NAME, "--images", ".", "--output", "out", f"--{option}", number])


@pytest.mark.parametrize("name", ["m" * 3000, r"$\foo$", "$" * 3000, "a\nb\x1b", "\udcff"])
def test_class_names_cost_nothing_and_are_no_formulas(here: Path, name: str) -> None:
    words = ["both.png", *OWN[:-5], name, *ANIMALS[1:], "--category_index", "0"]
    began = time.perf_counter()
    assert main(words) == 0
    assert main(["compare", *words]) == 0
    assert time.perf_counter() - began < 20
    assert index()["images"][0]["targets"][0]["name"] == name


def test_open_shows_the_picture_or_the_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def show(url: str) -> bool:
        shown.append(url)
        return len(shown) < 3

    monkeypatch.setattr(webbrowser, "open", show)
    photograph("in/a b.png", 1)
    photograph("in/c.png", 2)
    assert main(["in/a b.png", *OWN, "--open"]) == 0
    assert main(["in", *OWN, "--open"]) == 0
    assert main(["compare", "both.png", *OWN, "--open"]) == 0
    folder = (here / "explanations").as_uri()
    assert shown == [f"{folder}/a%20b.rollout_max_0.9.png", folder, f"{folder}/both.compare.png"]
    assert "no browser can be opened to show" in capsys.readouterr().err


def test_a_page_is_written_over_a_page_and_over_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def show(url: str) -> bool:
        shown.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", show)
    words = ["own.safetensors", "--model", NAME, "--images", ".", "--method", "rollout", "--check_every", "0"]
    assert main(["drift", *words, "--output", "run", "--open"]) == 0
    assert main(["report", "run", "--open"]) == 0
    assert shown == [(here / "run/report.html").as_uri()] * 2
    Path("notes.html").write_text("<title>Notes</title>")
    Path("run/report.html").unlink()
    Path("run/report.html").symlink_to("../notes.html")
    assert main(["report", "run", "--output", "notes.html"]) == 2
    assert main(["report", "run"]) == 2
    assert Path("notes.html").read_text() == "<title>Notes</title>"
    assert capsys.readouterr().err.count("is not overwritten") == 2


def test_overlays_are_pictures(here: Path) -> None:
    assert main(["both.png", *OWN]) == 0
    with Image.open("explanations/both.rollout_max_0.9.png") as picture:
        assert picture.size == (320, 267 + 3 * 18)
