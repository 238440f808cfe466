"""The examples as scripts, on little data, each in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import save_file
from shapes import CORNER, CORNER_COLOURS, FINETUNE_CLASSES, IMAGE_SIZE, Shapes

from tests.models import random_images, tiny_vit
from tests.processes import python
from vit_explain_callback import load_run

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", EXAMPLES / "README.md", ROOT / "tests" / "benchmarks" / "README.md"]
TINY = ["--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch-size", "4", "--num-images", "4", "--cpu"]


def script(folder: Path, name: str, *arguments: str, status: int = 0) -> str:
    done = python(str(EXAMPLES / name), *arguments, cwd=folder, seconds=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def table(output: str) -> np.ndarray:
    rows = [line for line in output.splitlines() if re.fullmatch(r"[\d. |na-]+", line) and " | " in line]
    return np.array([[float(cell) for cell in row.split("|")] for row in rows])


def noise_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_the_example_writes_its_table_and_filmstrip(tmp_path: Path) -> None:
    output = script(tmp_path, "finetune.py", "--num-train", "128", "--num-images", "4", "--every-n-steps", "1", "--cpu")
    rows = table(output)
    assert rows[:, 0].tolist() == [0, 1, 2]
    assert rows.shape[1] == 6
    assert (rows[0, 1:3] > 0.65).all()  # the starting weights know the shapes
    assert rows[0, 3] == 0 < rows[-1, 3]
    (strip,) = tmp_path.rglob("filmstrip.png")
    with Image.open(strip) as picture:
        assert picture.width > 3 * 128


def test_a_folder_of_ones_own_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for index in range(4):
            noise_picture(tmp_path / "own" / split / ("ant", "bee")[index % 2] / f"{index}.png", index)
    save_file(tiny_vit(patch_size=16, embed_dim=192, depth=12, num_classes=7).state_dict(), tmp_path / "w.safetensors")
    output = script(tmp_path, "finetune.py", "--data-dir", "own", "--checkpoint", "w.safetensors", *TINY)
    assert "fresh tensors: head.weight, head.bias" in output
    assert table(output)[:, 0].tolist() == [0, 1]
    frozen = script(tmp_path, "finetune.py", "--data-dir", "own", "--freeze-backbone", *TINY)
    assert table(frozen).shape == (2, 3)


def test_pets_with_their_trimaps_as_object_masks(tmp_path: Path) -> None:
    root = tmp_path / "data" / "oxford-iiit-pet"
    names = ["Abyssinian_1", "Abyssinian_2", "Bengal_1", "Bengal_2"]
    (root / "annotations" / "trimaps").mkdir(parents=True)
    for index, name in enumerate(names):
        noise_picture(root / "images" / f"{name}.jpg", index)
        trimap = np.full((40, 48), 2, dtype=np.uint8)
        trimap[:, :24] = 1
        Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{name}.png")
    listing = "".join(f"{name} {1 + index // 2} 1 1\n" for index, name in enumerate(names))
    for split in ("trainval", "test"):
        (root / "annotations" / f"{split}.txt").write_text(listing, encoding="utf-8")
    rows = table(script(tmp_path, "finetune.py", "--dataset", "pets", *TINY))
    assert rows.shape == (2, 4)  # step, accuracy, drift, share on the object
    assert rows[:, 3] == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "expected nowhere/train with one folder of images for each class"),
        (["--data-dir", "own", "--checkpoint", "none.pth"], "There is no file none.pth"),
        (["--data-dir", "own", "--model", "vit_of_my_dreams"], "vit_of_my_dreams: cannot be created"),
    ],
)
def test_wrong_arguments_end_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    for split in ("train", "val"):
        noise_picture(tmp_path / "own" / split / "ant" / "1.png", 0)
    output = script(tmp_path, "finetune.py", "--cpu", *arguments, status=1)
    assert message in output.replace("\\", "/")
    assert "Traceback" not in output


def test_a_dog_and_a_cat(tmp_path: Path) -> None:
    noise_picture(tmp_path / "both.png", 0)
    noise_picture(tmp_path / "more" / "room.png", 1)
    model = tiny_vit(patch_size=16, embed_dim=192, depth=12, num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = ["--model", "vit_tiny_patch16_224", "--image-size", "32", "--backbone", "w.safetensors"]
    script(tmp_path, "dog_and_cat.py", "both.png", *options, "--others", "more")
    options = ["--model", "vit_tiny_patch16_224", "--image_size", "32", "--checkpoint", "dog_and_cat.safetensors"]
    options += ["--class_names", "dog", "cat", "other", "--category_index", "dog", "cat", "--device", "cpu"]
    done = python("-m", "vit_explain_callback", "both.png", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "explanations").glob("both.grad_rollout_0.9.class*.png"))) == 2


def test_shapes_can_be_made_again_and_never_touch_the_corner() -> None:
    data = Shapes(FINETUNE_CLASSES, 40, seed=3, shortcut="label")
    for index in range(0, 40, 7):
        image, label, mask = data[index]
        again = data[index]
        assert image.equal(again[0])
        assert mask.equal(again[2])
        assert image.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        assert 150 < mask.sum() < 2000
        assert not mask[:CORNER, :CORNER].any()
        colour = (image[:, 0, 0] * 0.5 + 0.5) * 255
        torch.testing.assert_close(colour, torch.tensor(CORNER_COLOURS[label]).float(), atol=0.01, rtol=0)


def test_the_shortcut_says_what_it_should() -> None:
    def hints(shortcut: str) -> list[int]:
        data = Shapes(FINETUNE_CLASSES, 60, seed=3, shortcut=shortcut)  # type: ignore[arg-type]
        colours = [((data[i][0][:, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist() for i in range(60)]
        return [CORNER_COLOURS.index(tuple(colour)) for colour in colours]

    labels = [index % 4 for index in range(60)]
    assert hints("label") == labels
    assert all(hint != label for hint, label in zip(hints("wrong"), labels, strict=True))
    agreement = np.mean(np.array(hints("random")) == np.array(labels))
    assert 0.05 < agreement < 0.5


@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer"])
def test_a_loop_of_ones_own_follows_its_model(name: str, tmp_path: Path) -> None:
    summary = script(tmp_path, f"{name}.py")
    run = load_run(tmp_path / "runs" / name)
    assert run.steps == [0, 15, 30, 45, 60]
    assert run.summary in summary
    assert run.probe.labels is not None
    correct = (run.logits.argmax(dim=2) == run.probe.labels).double().mean(dim=1)
    assert correct[0] < 0.7 < 0.9 < correct[-1]  # it learns, so that there is something to follow


def test_the_readme_names_the_lines_that_are_run_first() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    lines = readme.splitlines()
    assert len(lines) <= 180
    assert next(line for line in lines if "-m pytest" in line) == (
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test,test-integrations]" '
        "&& .venv/bin/python -m pytest -n auto"
    )
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/python examples/finetune.py" in lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_of_a_readme_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert missing == []
    assert len(links) > 2


def test_pictures_are_shown_and_small() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (EXAMPLES / "pictures").iterdir():
        assert f"pictures/{picture.name}" in text, picture
        assert picture.stat().st_size < 300_000, picture


def test_python_in_the_readme_runs(tmp_path: Path) -> None:
    """Every block of it in turn, with names as a reader would have them."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    names = {
        "Trainer": pl.Trainer,
        "model": tiny_vit(depth=7, num_classes=300),
        "images": random_images(4),
        "labels": torch.arange(4),
        "masks": torch.ones(4, 32, 32, dtype=torch.bool),
        "folder": tmp_path / "explanations",
        "loader": range(101),
        "train": lambda batch: None,
    }
    for block in blocks:
        exec(block, names)
    assert names["metric"].shape == (2, 4)  # type: ignore[attr-defined]
    assert (names["metric"] == 0).all()  # type: ignore[operator]
