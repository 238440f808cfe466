"""`vit-explain IMAGE…` and `vit-explain compare IMAGE`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform

from tests.cli.photographs import ANIMALS, NAME, OWN, checkpoint, index, photograph
from tests.models import randomised
from vit_explain_callback import Attention, explain
from vit_explain_callback.cli.classifier import Classifier
from vit_explain_callback.cli.command import main
from vit_explain_callback.cli.photograph import View
from vit_explain_callback.cli.subcommands import _variants

pytestmark = pytest.mark.usefixtures("small_models")


def transformed(model: Any, path: str) -> torch.Tensor:
    transform: Any = create_transform(**timm.data.config.resolve_model_data_config(model), is_training=False)
    images: torch.Tensor = transform(Image.open(path))[None]
    return images


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ([], "rollout_max_0.9"),
        (["--head_fusion", "mean", "--discard_ratio", "0.5"], "rollout_0.5"),
        (["--head-fusion", "min", "--discard-ratio", "0"], "rollout_min"),
        (["--category_index", "3"], "grad_rollout_0.9"),
        (["--category-index", "fox", "--discard_ratio", "0.8", "--use_cuda"], "grad_rollout_0.8"),
    ],
)
def test_vit_explains_own_command_line(here: Path, options: list[str], method: str) -> None:
    own = [word for word in OWN if word not in ("--device", "cpu")]
    assert main(["--image_path", "both.png", *own, *options]) == 0
    found = index()
    assert found["methods"] == [method]
    (image,) = found["images"]
    (files,) = image["explanations"]
    model = checkpoint()
    target = 3 if "--category_index" in options or "--category-index" in options else None
    expected = explain(model, transformed(model, "both.png"), [method], target)
    actual = np.load(Path("explanations") / files["map"])
    np.testing.assert_allclose(actual, expected.maps[method][0].numpy(), atol=1e-5)
    probability = expected.logits.double().softmax(dim=1)[0]
    best = int(probability.argmax())
    assert image["prediction"] == {
        "index": best,
        "name": ANIMALS[best],
        "probability": pytest.approx(probability[best].item(), abs=1e-4),
    }
    assert [one["probability"] for one in image["top5"]] == pytest.approx(
        probability.sort(descending=True).values.tolist(), abs=1e-4
    )
    assert image["targets"][0]["index"] == (best if target is None else target)
    with Image.open(Path("explanations") / files["overlay"]) as picture:
        assert picture.width == 320


def test_folders_names_and_what_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, path in enumerate(("in/a.png", "in/a.jpg", "in/cats/a.png", "else/a.png")):
        photograph(path, seed)
    Path("in/broken.png").write_text("no image")
    words = ["in", "else/a.png", "missing.png", *OWN, "--output", "in/out", "--batch_size", "2"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "broken.png cannot be read" in said
    assert "There is no file missing.png" in said
    assert "6/6" in said
    found = index("in/out")
    assert [Path(image["file"]).as_posix() for image in found["images"]] == [
        "in/a.jpg",
        "in/a.png",
        "in/cats/a.png",
        "else/a.png",
    ]
    overlays = [files["overlay"] for image in found["images"] for files in image["explanations"]]
    stems = ["a", "a-2", "cats/a", "a-3"]
    assert overlays == [f"{stem}.rollout_max_0.9.png" for stem in stems]
    assert all((Path("in/out") / name).is_file() for name in overlays)
    assert len(found["failed"]) == 2
    # What the first run wrote is not explained by the second.
    assert main(["in", *OWN, "--output", "in/out"]) == 2
    assert len(index("in/out")["images"]) == 3


def test_a_folder_named_images_is_no_subcommand(here: Path) -> None:
    photograph("images/a.png", 0)
    assert main(["images", *OWN]) == 0
    assert [image["file"] for image in index()["images"]] == [str(Path("images/a.png"))]


def test_a_batch_gives_what_single_images_give(here: Path) -> None:
    for seed in range(3):
        photograph(f"in/{seed}.png", seed, (40 + seed, 60))
    assert main(["in", *OWN, "--category_index", "dog", "2", "--method", "rollout", "grad_rollout"]) == 0
    together = index()["images"]
    for seed in range(3):
        assert (
            main([f"in/{seed}.png", *OWN, "--output", "one", "--method", "grad_rollout", "--category_index", "2"]) == 0
        )
        np.testing.assert_allclose(
            np.load(f"explanations/{seed}.grad_rollout.class2.npy"),
            np.load(f"one/{seed}.grad_rollout.class2.npy"),
            atol=1e-6,
        )
    for image in together:
        kinds = [(files["method"], files["target"]) for files in image["explanations"]]
        assert kinds == [("rollout", None), ("grad_rollout", 1), ("grad_rollout", 2)]


def test_options_apply_to_names_without_options(here: Path) -> None:
    names = ["rollout", "rollout_max_0.5", "grad_rollout"]
    assert main(["both.png", *OWN, "--method", *names, "--head_fusion", "min"]) == 0
    assert index()["methods"] == ["rollout_min", "rollout_max_0.5", "grad_rollout_min"]


def test_another_image_size(here: Path) -> None:
    assert main(["both.png", *OWN, "--image_size", "64"]) == 0
    assert np.load("explanations/both.rollout_max_0.9.npy").shape == (8, 8)


def test_from_the_hub_with_imagenets_names(here: Path) -> None:
    assert main(["both.png", "--device", "cpu", "--category_index", "tabby", "Egyptian cat"]) == 0
    found = index()
    assert found["model"] == "deit_tiny_patch16_224"
    assert [one["index"] for one in found["images"][0]["targets"]] == [281, 285]


def test_a_model_of_transformers(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    labels = dict(enumerate(ANIMALS))
    config = transformers.ViTConfig(**options, intermediate_size=96, id2label=labels)
    model: Any = transformers.ViTForImageClassification(config)
    randomised(model, 1)
    model.save_pretrained("vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained("vit")
    assert main(["both.png", "--hf", "vit", "--device", "cpu", "--category_index", "owl"]) == 0
    (image,) = index()["images"]
    assert image["targets"][0]["name"] == "owl"
    assert image["seen"] == [0, 0, 48, 40]
    pixels = processor(images=Image.open("both.png"), return_tensors="pt")["pixel_values"]
    expected = explain(model, pixels, ["grad_rollout_0.9"], 4).maps["grad_rollout_0.9"][0]
    np.testing.assert_allclose(np.load("explanations/both.grad_rollout_0.9.class4.npy"), expected.numpy(), atol=1e-5)
    assert main(["both.png", "--hf", "vit", "--model", NAME]) == 2


def test_a_model_of_transformers_without_classifier_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    transformers.ViTModel(transformers.ViTConfig(**options)).save_pretrained("vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
    assert main(["both.png", "--hf", "vit", "--device", "cpu"]) == 2
    assert "it lacks classifier" in capsys.readouterr().err


def test_without_transformers_the_cure_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["both.png", "--hf", "vit"]) == 2
    assert 'pip install "vit-explain-callback[hf]"' in capsys.readouterr().err


def gone(*_: Any, **how: Any) -> Any:
    raise OSError("no connection\nmore")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png", *OWN], "no file or folder nowhere.png"),
        (["empty", *OWN], "There is no image in empty"),
        (["both.png", *OWN, "--category_index", "dgo"], "Close: 1 dog."),
        (["both.png", *OWN, "--category_index", "5"], "a class in 0 … 4"),
        (["both.png", *OWN, "--category_index", "-1"], "a class in 0 … 4"),
        (["both.png", *OWN[:6], "--category_index", "dog"], "Pass --class_names"),
        (["both.png", *OWN[:6], "--class_names", "a", "b"], "each of the 5 classes"),
        (["both.png", "--device", "cpu", "--category_index", "crane"], "134 (crane), 517 (crane)"),
        (["both.png", "--device", "cpu", "--category_index", "cat"], "Egyptian cat"),
        ([*OWN, "--category_index", "dog", "both.png"], "images go first, or after --image_path"),
        (["both.png", *OWN, "--discard_ratio", "1.5"], "`discard_ratio` in [0, 1)"),
        (["both.png", *OWN, "--method", "roll"], "`methods` to name"),
        (["both.png", *OWN, "--image_size", "30"], "a multiple of the 8-pixel patches"),
        (["both.png", *OWN, "--device", "quantum"], "`device`"),
        (["both.png", "--checkpoint", "none.pth", "--model", NAME], "no file none.pth"),
        (["both.png", "--checkpoint", "both.png", "--model", NAME], "cannot be read as weights"),
        (["both.png", "--model", "vit_tiny_patch16_225"], "did you mean vit_tiny_patch16_224"),
        (["both.png", "--model", "resnet18"], "hold a Vision Transformer"),
        (["both.png", "--hf", "nowhere", "--model", NAME], "--hf without"),
        (["compare", "both.png", "else.png", *OWN], "Expected one image"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not said.out
    assert not Path("explanations").exists()


def test_without_the_hub_the_cure_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", gone)
    assert main(["both.png"]) == 2
    said = capsys.readouterr().err
    assert (
        "cannot be fetched from the hub (no connection). Offline, pass a file of weights with --checkpoint FILE" in said
    )
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words", [["both.png", "--head_fusion", "sum"], ["both.png", "--nonsense"], ["compare", "--batch_size", "0"]]
)
def test_wrong_options_are_one_line(here: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_image_of_nothing_to_see_is_said(here: Path) -> None:
    model = checkpoint()
    torch.nn.init.zeros_(model.head.weight)
    save_file(model.state_dict(), "own.safetensors")
    assert main(["both.png", *OWN, "--category_index", "cat"]) == 0
    assert index()["images"][0]["explanations"][0]["limit"] is None


def test_a_backbone_without_classifier(here: Path) -> None:
    backbone = timm.create_model(NAME, num_classes=0)
    classifier = Classifier(NAME, backbone, View(create_transform((3, 32, 32), is_training=False)), 0, None)
    with pytest.raises(ValueError, match="has no classifier"):
        classifier.class_index("cat")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls: list[int] = []
    forward = timm.models.vision_transformer.VisionTransformer.forward

    def spy(self: Any, images: torch.Tensor, *more: Any) -> torch.Tensor:
        calls.append(len(images))
        return forward(self, images, *more)

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "forward", spy)
    return lambda: len(calls)


def test_compare(here: Path, counted: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "both.png", *OWN, "--category_index", "dog", "cat", "--output", "out"]) == 0
    assert counted() == 1
    assert capsys.readouterr().out.split() == [str(Path("out/both.compare.png")), str(Path("out/both.sweep.gif"))]
    with Image.open("out/both.compare.png") as figure:
        assert figure.height > figure.width > 600
    with Image.open("out/both.sweep.gif") as sweep:
        assert sweep.n_frames == 11  # type: ignore[attr-defined]
        assert sweep.width == 2 * 320


def test_compare_takes_every_method_with_the_options_that_it_has(here: Path) -> None:
    words = ["--method", "chefer", "grad_attention", "attention", "attention_block1_head2", "--category_index", "dog"]
    assert main(["compare", "both.png", *OWN, *words]) == 0
    assert not Path("explanations/both.sweep.gif").exists()
    names = [method.name for method in _variants(Attention(), ["mean", "max"], [0.0, 0.9])]
    assert names == ["attention", "attention_max"]
    assert main(["compare", "both.png", *OWN, "--method", "chefer", "rollout", "--discard_ratio", "0"]) == 0
    with Image.open("explanations/both.sweep.gif") as sweep:
        assert sweep.width == 320  # of rollout, the first that can discard


def test_options_that_a_method_does_not_have_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["both.png", *OWN, "--method", "rollout", "chefer", "--discard_ratio", "0.5"]) == 2
    assert "Expected no --discard_ratio with --method chefer, which has no such option" in capsys.readouterr().err


def test_compare_chosen_methods(here: Path) -> None:
    words = ["--method", "rollout", "--head-fusion", "max", "--discard-ratio", "0.5", "0.7"]
    assert main(["compare", "--image-path", "both.png", *OWN, *words]) == 0
    with Image.open("explanations/both.sweep.gif") as sweep:
        assert sweep.width == 320  # one panel: rollout does not depend on the class
