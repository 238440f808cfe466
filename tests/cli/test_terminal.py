"""Standard output that is ascii, closed or full, and text that would steer the terminal.

| attempt | asserted |
|---|---|
| standard output in ascii, in cp1252 | results written, `?` for what is missing |
| standard output closed; its reader gone | results written, status 0, nothing said |
| standard output on a full device | results written, one line on standard error, status 2 |
| standard error closed | results written |
| escape sequences, bidirectional marks, bytes that are no UTF-8 in a file's name | shown spelt out |
| help, the version, errors in options, a missing image | neither torch, timm nor numpy is loaded |
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TextIO

import pytest

from tests.cli.photographs import ANIMALS, OWN, index, photograph
from vit_explain_callback.cli.command import main
from vit_explain_callback.cli.subparsers import HEAD_FUSIONS
from vit_explain_callback.cli.terminal import shortened, table
from vit_explain_callback.methods import heads as fusion
from vit_explain_callback.system.terminal import printable

ODD_NAMES = [word if word != "dog" else "dög → “Hund”" for word in OWN]
LIGHT = """
import sys
from vit_explain_callback.cli.command import main
try:
    status = main({words})
except SystemExit as stop:
    status = stop.code
heavy = {{"torch", "timm", "numpy", "matplotlib", "PIL", "tqdm"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["compare", "--help"], 0),
        (["drift", "--help"], 0),
        (["report", "--help"], 0),
        (["a.png", "--nonsense"], 2),
        (["a.png", "--batch_size", "0"], 2),
        (["nowhere.png"], 2),
        (["--version"], 0),
        ([], 2),
    ],
)
def test_help_and_wrong_options_load_nothing(words: list[str], status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIGHT.format(words=words)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == (1 if status else 0)
    assert ("example" in done.stdout) == ("--help" in words)


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed() -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["--version"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setattr(metadata, "version", lambda name: {"vit-explain-callback": "0.2.0"}[name])
    assert printed() == "vit-explain 0.2.0\n"

    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert printed() == "vit-explain of unknown version, as vit-explain-callback is not installed\n"


def test_the_parser_knows_the_fusions_without_loading_them() -> None:
    assert HEAD_FUSIONS == fusion.HEAD_FUSIONS


@pytest.fixture
def full() -> Iterator[TextIO]:
    if not os.path.exists("/dev/full"):
        pytest.skip("no full device here")
    with open("/dev/full", "w", encoding="utf-8") as stream:
        yield stream


@pytest.fixture
def broken() -> Iterator[TextIO]:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_an_encoding_lacks_is_a_question_mark(here: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph("日本.png", 1)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main(["日本.png", *ODD_NAMES]) == 0
    said = written.getvalue().decode(encoding)
    assert "??.rollout_max_0.9.png" in said
    assert Path("explanations/日本.rollout_max_0.9.png").is_file()
    assert index()["images"][0]["file"] == "日本.png"


def test_a_reader_that_is_gone_loses_nothing(
    here: Path, broken: TextIO, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    assert main(["both.png", *OWN]) == 0
    assert main(["compare", "both.png", *OWN, "--method", "rollout"]) == 0
    assert len(index()["files"]) == 4
    assert capfd.readouterr().err == ""


def test_no_output_at_all_loses_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph("in/a.png", 1)
    photograph("in/b.png", 2)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["in", *OWN]) == 0
    assert len(index()["images"]) == 2


def test_a_full_output_loses_nothing_and_is_said(
    here: Path, full: TextIO, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["both.png", *OWN]) == 2
    assert len(index()["images"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said == ["vit-explain: Standard output cannot be written: No space left on device."]


SPEAKING = """
import sys
from vit_explain_callback.cli import command, terminal
def parse(words):
    terminal.print_output("a line")
    raise ValueError("the end")
command.parse = parse
sys.exit(command.main())
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_python_itself_says_nothing_more(unbuffered: str, full: TextIO, broken: TextIO) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": unbuffered}
    expected = {full: "Standard output cannot be written: No space left on device.", broken: "the end"}
    for stream, said in expected.items():
        done = subprocess.run(
            [sys.executable, "-c", SPEAKING], env=environment, stdout=stream, stderr=subprocess.PIPE, text=True
        )
        assert done.stderr == f"vit-explain: {said}\n"
        assert done.returncode == 2


def test_file_names_do_not_reach_the_terminal_raw(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [
        "in/\x1b[31mred\x1b]0;title\x07.png",
        "in/\u202egnp.png",
        "in/line\nbreak.png",
        os.fsdecode(b"in/\xff.png"),
    ]
    for seed, name in enumerate(names):
        photograph(name, seed)
    Path("in/\x1b[2Jbroken.png").write_text("no image")
    assert main(["in", *OWN]) == 2
    assert main(["in/\x1b[2Jnowhere.png", *OWN]) == 2
    assert main(["in/\x1b[2Jbroken.png", *OWN, "--output", "out\x1b[2J"]) == 2
    with pytest.raises(SystemExit):
        main(["both.png", "--\x1b[2Jnonsense"])
    said = capfd.readouterr()
    assert not any(mark in said.out + said.err for mark in "\x1b\x07\u202e\udcff")
    assert r"\x1b[2Jnowhere.png" in said.err
    assert r"\u202egnp" in said.out
    assert {image["file"] for image in index()["images"]} == set(names)


def test_printable_text_is_left_as_it_is() -> None:
    assert printable("Zürich → 日本 · p=0.50") == "Zürich → 日本 · p=0.50"
    assert printable("a\x1b\n\udcff\u202e") == r"a\x1b\n\udcff\u202e"
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert len(shortened("\x1b" * 10**6, 20)) == 20


def test_a_table_is_aligned_and_its_files_are_whole() -> None:
    lines = table([["image", "p", "file"], ["a" * 50, "0.5", "b" * 50]])
    assert lines == [f"{'image':40}  p    file", f"{'a' * 39}…  0.5  {'b' * 50}"]


def test_what_is_said_of_several_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(22):
        photograph(f"in/{seed:02}.png", seed)
    assert main(["in", *OWN]) == 0
    said = capsys.readouterr()
    first, heading, *rows, left, last = said.out.splitlines()
    assert first == str(Path("explanations/00.rollout_max_0.9.png"))
    assert heading.split() == ["image", "prediction", "p", "file"]
    for row, image in zip(rows, index()["images"][:20], strict=True):
        name, prediction, probability, file = row.split()
        assert name == Path(image["file"]).name
        assert prediction == image["prediction"]["name"] in ANIMALS
        assert float(probability) == pytest.approx(image["prediction"]["probability"], abs=0.006)
        assert Path(file).is_file()
    assert left == "and 2 more"
    assert last == str(Path("explanations/explanations.json"))
    assert "22/22" in said.err
