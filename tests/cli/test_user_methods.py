"""Methods of one's own on the command line: `--method MODULE:NAME`, wherever a method's name may stand."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.photographs import NAME, OWN, index
from vit_explain_callback import load_run
from vit_explain_callback.cli.command import main
from vit_explain_callback.cli.user_methods import parse_methods
from vit_explain_callback.methods.attention_rollout import AttentionRollout

SOURCE = """
from dataclasses import dataclass
from vit_explain_callback import MapFunction
from vit_explain_callback.methods import Method

def brightness(model, images, target):
    return images.mean(dim=1)

bright = MapFunction("bright", brightness, needs_target=False)
number = 3

@dataclass(frozen=True)
class Reading(Method):
    kind = "reading"
    def step(self, relevance, block):
        return relevance

@dataclass(frozen=True)
class Scaled(Reading):
    kind = "scaled"
    factor: float

twice = Scaled(2.0)
"""


@pytest.fixture
def mine(here: Path) -> Iterator[Path]:
    """A package of the user's in the current folder."""
    (here / "my_package").mkdir()
    (here / "my_package" / "methods.py").write_text(SOURCE, encoding="utf-8")
    (here / "my_package" / "broken.py").write_text("import nothing_of_the_kind", encoding="utf-8")
    before = list(sys.path)
    yield here
    sys.path[:] = before
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def test_a_map_function_stands_beside_a_name(mine: Path) -> None:
    assert main(["both.png", *OWN, "--method", "rollout", "my_package.methods:bright"]) == 0
    found = np.load("explanations/both.bright.npy")
    assert found.shape == (32, 32)
    (image,) = index()["images"]
    assert [each["method"] for each in image["explanations"]] == ["rollout", "bright"]


def test_methods_and_classes_of_methods(mine: Path) -> None:
    assert main(["both.png", *OWN, "--method", "my_package.methods:Reading", "my_package.methods:twice"]) == 0
    names = [each["method"] for each in index()["images"][0]["explanations"]]
    assert names == ["reading", "scaled_factor2.0"]
    assert parse_methods(["rollout_max"]) == [AttentionRollout("max")]


def test_a_comparison_and_a_series_take_them(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "both.png", *OWN, "--method", "my_package.methods:bright", "rollout"]) == 0
    words = ["drift", "own.safetensors", "own.safetensors", "--images", ".", "--model", NAME, "--output", "out"]
    assert main([*words, "--method", "my_package.methods:bright"]) == 0, capsys.readouterr().err
    maps = load_run("out").maps["bright"]
    assert maps.shape[0] == 2
    assert maps.shape[2:] == (32, 32)
    assert maps[0].equal(maps[1])


def test_a_model_without_attention_is_explained_by_a_function(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 5}
    save_file(timm.create_model("resnet10t", **options).state_dict(), "resnet.safetensors")
    words = ["both.png", "--model", "resnet10t", "--checkpoint", "resnet.safetensors", "--device", "cpu"]
    assert main([*words, "--method", "my_package.methods:bright"]) == 0, capsys.readouterr().err
    assert main([*words, "--method", "my_package.methods:bright", "rollout"]) == 2
    assert "to hold a Vision Transformer, but found ResNet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (":bright", r"Expected `method` to be MODULE:NAME, as in .*, but got ':bright'"),
        ("my_package/methods.py:bright", r"Expected `method` to be MODULE:NAME, as in --method my_methods:grad_cam"),
        ("my_methods:bright", r"there is no my_methods in .*, nor is it installed\. Run the command in the folder"),
        ("my_package.other:bright", r"there is no my_package\.other in"),
        ("my_package.broken:bright", r"raises ModuleNotFoundError.*nothing_of_the_kind.*import my_package.broken"),
        ("my_package.methods:dim", r"methods\.py has no dim; its methods are bright, twice\."),
        (
            "my_package.methods:brightness",
            r"a function: write `my_brightness = MapFunction\('brightness', brightness\)",
        ),
        ("my_package.methods:number", r"to name a MapFunction or a Method, but got .*:number', a int: name one\."),
        ("my_package.methods:Scaled", r"a default for each option, but .*factor.*name an object, as in `mine = Scaled"),
        ("json:dump_", r"json.*has no dump_; it has dumps?\."),
    ],
)
def test_what_is_no_method_is_said_in_a_line(
    mine: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert main(["both.png", *OWN, "--method", word]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said


def test_an_installed_module_wins_over_a_file_of_the_current_folder(mine: Path) -> None:
    sys.modules.pop("colorsys", None)
    (mine / "colorsys.py").write_text(SOURCE, encoding="utf-8")
    with pytest.raises(ValueError, match=r"colorsys\.py has no bright; it has no methods\."):
        parse_methods(["colorsys:bright"])
