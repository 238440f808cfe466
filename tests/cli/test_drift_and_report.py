"""The commands `vit-explain drift` and `vit-explain report`, and the weights they read."""

from __future__ import annotations

import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.models import randomised
from tests.runs import events, fit, saved
from vit_explain_callback import ViTExplainCallback, explain
from vit_explain_callback.cli.classifier import timm_transform
from vit_explain_callback.cli.command import main
from vit_explain_callback.cli.drift import read_images
from vit_explain_callback.cli.weights import Weights, model_with_weights
from vit_explain_callback.page.document import page
from vit_explain_callback.tracking.run import load_run
from vit_explain_callback.tracking.snapshot import Snapshot

NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that the commands make by name are small."""
    create = timm.create_model

    def create_small(name: str, **options: Any) -> Any:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        model: Any = create(name, **(shape | options))
        model.pretrained_cfg["input_size"] = (3, 32, 32)
        return model

    monkeypatch.setattr(timm, "create_model", create_small)


def model(seed: int, classes: int = 5) -> Any:
    return randomised(timm.create_model(NAME, num_classes=classes), seed).eval()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "cats").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("b.png", "cats/a.jpg", "c.PNG"):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / name)
    (folder / "d.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        save_file(model(seed).state_dict(), path)
    return paths


def drift(checkpoints: list[Path], images: Path, output: Path, *more: str) -> int:
    paths = [str(path) for path in checkpoints]
    return main(["drift", *paths, "--images", str(images), "--model", NAME, "--output", str(output), *more])


def test_the_drift_of_a_series_of_checkpoints(
    tmp_path: Path, images: Path, checkpoints: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drift"
    assert drift(checkpoints, images, output) == 0
    said = capsys.readouterr()
    assert str(output / "report.html") in said.out
    assert "left out" in said.err
    assert "d.png" in said.err
    batch, _ = read_images(images, timm_transform(model(0)), 16)
    assert batch.shape == (3, 3, 32, 32)
    first = explain(model(0), batch)
    for seed in range(3):
        found = Snapshot.load(output / "explanations" / f"step_{seed:08d}.safetensors")
        expected = explain(model(seed), batch, target=first.target)
        for name, maps in expected.maps.items():
            torch.testing.assert_close(found.maps[name], maps)
        assert found.target.equal(first.target)
        assert found.reliability is not None
        assert bool(found.reliability.gains) == (seed > 0)
    html = (output / "report.html").read_text(encoding="utf-8")
    assert "3 images, 3 snapshots, steps 0 to 2" in html


def test_a_series_that_was_interrupted_goes_on(
    tmp_path: Path, images: Path, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "drift"
    assert drift(checkpoints[:2], images, output) == 0
    asked: list[str] = []

    def spy(name: str, weights: Weights) -> Any:
        asked.append(weights.path.name)
        return model_with_weights(name, weights)

    monkeypatch.setattr("vit_explain_callback.cli.drift.model_with_weights", spy)
    assert drift(checkpoints, images, output) == 0
    assert asked == ["2.safetensors"]


def test_results_of_other_images_or_methods_are_not_mixed(
    tmp_path: Path, images: Path, checkpoints: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drift"
    assert drift(checkpoints[:1], images, output) == 0
    assert drift(checkpoints, images, output, "--method", "rollout") == 2
    assert "holds results of other images or methods" in capsys.readouterr().err
    shutil.rmtree(images / "cats")
    (images / "b.png").unlink()
    assert drift(checkpoints, images, output) == 2


class Wrapped(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"vit": model(1)})


def test_lightning_checkpoints_give_their_step_and_lose_their_prefix(tmp_path: Path, images: Path) -> None:
    paths = []
    for step in (30, 70):
        module = Wrapped()
        paths.append(tmp_path / f"{step}.ckpt")
        torch.save({"state_dict": module.state_dict(), "global_step": step}, paths[-1])
    assert drift(paths, images, tmp_path / "drift", "--method", "rollout", "--check-every", "0") == 0
    assert sorted(path.name for path in (tmp_path / "drift/explanations").glob("step_*")) == [
        "step_00000030.safetensors",
        "step_00000070.safetensors",
    ]
    loaded = model_with_weights(NAME, Weights.read(paths[0]))
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), model(1).parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "nowhere.ckpt"}, "no file nowhere.ckpt"),
        ({"checkpoint": "IMAGES/d.png"}, "cannot be read as weights"),
        ({"checkpoint": "other.safetensors"}, "holds no tensor that fits"),
        ({"checkpoint": "part.safetensors"}, "does not hold all of"),
        ({"--images": "empty"}, "There is no image in"),
        ({"--method": "roll"}, "`methods` to name"),
        ({"--model": "vit_unheard_of"}, "vit_unheard_of"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    options: dict[str, str],
    message: str,
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    state = model(0).state_dict()
    save_file({name: value for name, value in state.items() if "blocks.1" not in name}, "part.safetensors")
    given = {"checkpoint": "other.safetensors", "--images": str(images), "--model": NAME, "--output": "out"} | options
    checkpoint = given.pop("checkpoint").replace("IMAGES", str(images))
    assert main(["drift", checkpoint, *(word for pair in given.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_folder_without_explanations_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"There are no explanations in {tmp_path}" in capsys.readouterr().err


def test_the_page_of_a_run_says_what_its_summary_says(tmp_path: Path) -> None:
    masks = torch.zeros(16, 32, 32, dtype=torch.bool)
    masks[:, :16] = True
    names = [f"<{name}>" for name in ("cat", "dog", "hare", "fox", "owl")]
    trainer = fit(ViTExplainCallback(regions={"top": masks}, class_names=names, num_shown=2), tmp_path)
    run = Path(trainer.log_dir or "")
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    written = re.compile(r'"written":[\d.]+')
    assert written.sub("", html) == written.sub("", page(run / "explanations"))
    assert re.search("&lt;(cat|dog|hare|fox|owl)&gt;", html)
    assert not any(name in html for name in names)
    summary = (run / "explanations/summary.txt").read_text(encoding="utf-8").splitlines()
    assert all(escape(line.strip()) in html for line in summary)


def test_the_scalars_of_a_saved_run_are_those_that_were_logged(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(checks=1, detail="full"), tmp_path)
    board = events(trainer)
    rows = load_run(Path(trainer.log_dir or "")).scalars
    rebuilt = [(row["step"], {tag: value for tag, value in row.items() if tag != "step"}) for row in rows]
    assert [step for step, _ in rebuilt] == [one.step for one in saved(trainer)]
    logged = {tag for tag in board.Tags()["scalars"] if not tag.startswith(("explain/final", "epoch"))}
    assert {tag for _, scalars in rebuilt for tag in scalars} == logged
    for tag in logged:
        curve = {event.step: event.value for event in board.Scalars(tag)}
        assert curve == pytest.approx(
            {step: scalars[tag] for step, scalars in rebuilt if tag in scalars}, nan_ok=True, abs=1e-6
        ), tag


def hugging_face_vit(seed: int, classes: int = 3) -> Any:
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
    options["id2label"] = dict(enumerate(["owl", "hare", "fox", "cat"][:classes]))
    config = transformers.ViTConfig(num_hidden_layers=2, num_attention_heads=3, **options)
    return randomised(transformers.ViTForImageClassification(config), seed).eval()


@pytest.fixture
def of_trainer(tmp_path: Path) -> list[Path]:
    """Folders as transformers' Trainer saves them, and one of the model with its processor."""
    transformers = pytest.importorskip("transformers")
    hugging_face_vit(9).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path / "vit"
    )
    folders = [tmp_path / f"checkpoint-{step}" for step in (20, 40)]
    for step, folder in zip((20, 40), folders, strict=True):
        hugging_face_vit(step).save_pretrained(folder)
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    return folders


def hf_drift(checkpoints: list[Path], images: Path, tmp_path: Path, *more: str) -> int:
    words = ["drift", *map(str, checkpoints), "--images", str(images), "--hf", str(tmp_path / "vit")]
    return main([*words, "--output", str(tmp_path / "drift"), *more])


def test_the_drift_of_checkpoints_of_transformers(tmp_path: Path, images: Path, of_trainer: list[Path]) -> None:
    assert hf_drift(of_trainer, images, tmp_path) == 0
    run = load_run(tmp_path / "drift")
    assert run.steps == [20, 40]
    assert run.probe.class_names == ["owl", "hare", "fox"]
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "vit")
    files = [images / name for name in ("b.png", "c.PNG", "cats/a.jpg")]
    pixels = processor(images=[Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    for index, step in enumerate((20, 40)):
        expected = explain(hugging_face_vit(step), pixels, ["rollout"]).maps["rollout"]
        torch.testing.assert_close(run.maps["rollout"][index], expected)


def test_a_lightning_checkpoint_of_a_model_of_transformers(
    tmp_path: Path, images: Path, of_trainer: list[Path]
) -> None:
    tensors = {f"net.{name}": value for name, value in hugging_face_vit(5).state_dict().items()}
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "last.ckpt")
    assert hf_drift([tmp_path / "last.ckpt", of_trainer[0]], images, tmp_path) == 0
    assert load_run(tmp_path / "drift").steps == [7, 20]


def test_what_a_series_of_transformers_cannot_be_of(
    tmp_path: Path, images: Path, of_trainer: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face_vit(1, classes=4).save_pretrained(tmp_path / "four")
    assert hf_drift([tmp_path / "four"], images, tmp_path) == 2
    assert (
        "classifier.bias, classifier.weight … are missing or of another shape. Pass the folder"
        in capsys.readouterr().err
    )
    assert hf_drift([images], images, tmp_path) == 2
    assert re.search(r"There is no file .*images.model\.safetensors", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        hf_drift(of_trainer, images, tmp_path, "--model", NAME)
    assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["drift", "a.ckpt", "--images", "b", "--output", "c"])
    assert "one of the arguments --model --hf is required" in capsys.readouterr().err
