"""Models that are no ViTs, tracked through a run by functions of the user's own."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.bits import differing
from tests.models import CLASSES, random_images, tiny_vit
from tests.other_models import grad_cam, saliency, tiny_resnet, tiny_swin
from tests.runs import events, fit, messages, saved
from vit_explain_callback import Checks, Explainer, ExplanationTracker, MapFunction, Probe, ViTExplainCallback, load_run
from vit_explain_callback.page.document import render_page

IMAGES = random_images(16, (64, 64), seed=7)
DATA: Any = [(image, index % CLASSES) for index, image in enumerate(IMAGES)]
SALIENCY = MapFunction("saliency", saliency)


class Net(pl.LightningModule):
    """Says nothing of itself but its steps: there is no `forward`, and images are scaled on the way."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.scale = nn.InstanceNorm2d(3)
        self.net = net
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(self.scale(images)), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def run(net: Any, folder: Path, methods: list[Any] | None, **options: Any) -> tuple[pl.Trainer, Net, Any]:
    """Two epochs of four steps with dropout and an outcome to compare; without methods, without the callback."""
    pl.seed_everything(1, verbose=False)
    module = Net(net)
    own = {name: options.pop(name) for name in ("every_n_steps", "detail", "images", "forward") if name in options}
    callback = None if methods is None else ViTExplainCallback(methods, num_images=6, num_shown=2, **own)
    loaders: dict[str, Any] = {"train": DataLoader(DATA, 4, shuffle=True), "validation": DataLoader(DATA, 4)}
    trainer = fit(callback, folder, module, **(loaders | options))
    outcome = {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "losses": module.losses,
        "gradients": {name: part.grad for name, part in module.named_parameters()},
        "streams": [torch.rand(3), random.random(), float(np.random.rand())],
    }
    return trainer, module, outcome


MODELS: dict[str, tuple[Callable[[], Any], MapFunction]] = {
    "resnet": (tiny_resnet, grad_cam("net.layer3")),
    "swin": (tiny_swin, grad_cam("net.layers.2", channels_last=True)),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_without_a_vit_is_tracked_and_training_ends_in_the_same_bits(tmp_path: Path, model: str) -> None:
    make, method = MODELS[model]
    _, _, without = run(make(), tmp_path / "without", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module, outcome = run(make(), tmp_path / "with", [method, SALIENCY], detail="full")
    told = messages(caught)
    assert [text for text in told if "num_images" not in text] == []
    assert differing(without, outcome) == []
    assert outcome["losses"][0] != outcome["losses"][-1]

    found = load_run(str(trainer.log_dir))
    assert found.steps == [0, 4, 8]
    assert found.maps["grad_cam"].shape == (3, 6, 4, 4)
    assert found.maps["saliency"].shape == (3, 6, 64, 64)
    (callback,) = [one for one in trainer.callbacks if isinstance(one, ViTExplainCallback)]  # type: ignore[attr-defined]
    assert callback.tracker is not None
    images = callback.tracker.probe.images
    assert images is not None
    scaled = module.scale(IMAGES)  # as they reach the part that makes the logits
    assert all(any(image.equal(given) for given in scaled) for image in images)
    logits = module.eval().net(images)
    torch.testing.assert_close(found.logits[-1], logits.detach(), rtol=1e-4, atol=1e-5)

    tags = set(events(trainer).Tags()["scalars"])
    for name in ("grad_cam", "saliency"):
        wanted = {f"explain/drift/baseline_rank_correlation/{name}", f"explain/faithfulness/{name}"}
        assert wanted <= tags
    assert not any("block" in tag for tag in tags)
    assert "explain/filmstrip/grad_cam" in events(trainer).Tags()["images"]
    assert "grad_cam" in render_page(found)
    assert "grad_cam" in (Path(trainer.log_dir or "") / "explanations" / "report.html").read_text(encoding="utf-8")
    assert "grad_cam" in found.summary


def test_maps_of_pixels_are_saved_whole_and_measured_pooled(tmp_path: Path) -> None:
    images = random_images(3, (130, 130))
    model = tiny_resnet()
    tracker = ExplanationTracker(Explainer(model, [SALIENCY]), Probe.of(images), folder=tmp_path / "run")
    tracker.observe(0)
    with torch.no_grad():
        model.fc.weight.mul_(-1)
    tracker.observe(5)
    tracker.finish()
    assert tracker.history.now.maps["saliency"].shape == (3, 44, 44)
    found = load_run(tmp_path / "run")
    assert found.maps["saliency"].shape == (2, 3, 130, 130)
    assert found.snapshots[1].reliability is not None
    assert found.snapshots[1].reliability.nudged["saliency"].shape == (3, 44, 44)
    again = found.scalars
    for tag, value in tracker.scalars().items():
        assert again[-1][tag] == pytest.approx(value, nan_ok=True), tag
    assert '"grid":[44,44]' in render_page(found)


@pytest.mark.filterwarnings("ignore:.*add a `TensorBoardLogger`:UserWarning")
def test_a_run_is_resumed_and_its_files_stay_whole(tmp_path: Path) -> None:
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
    options: dict[str, Any] = {"enable_checkpointing": True, "more_callbacks": [checkpoints], "logger": False}
    run(tiny_resnet(), tmp_path, [SALIENCY], max_epochs=1, **options)
    last = str(tmp_path / "kept" / "last.ckpt")
    run(tiny_resnet(), tmp_path, [SALIENCY], max_epochs=1, ckpt_path=last, **options)  # nothing left to train
    run(tiny_resnet(), tmp_path, [SALIENCY], max_epochs=2, ckpt_path=last, **options)
    found = load_run(tmp_path)
    assert found.steps == [0, 4, 8]
    assert found.maps["saliency"].shape == (3, 6, 64, 64)


def at_step_7(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    calls.append(len(images))
    if len(calls) > 3:
        raise ValueError("the ninth sun is dark")
    return torch.rand(len(images), 2, 2)


calls: list[int] = []


def outside(images: Tensor) -> Tensor:
    (module,) = held
    module.net(images).sum().backward()
    return torch.rand(len(images), 2, 2)


held: list[Any] = []
BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "shape": (lambda model, images, target: torch.rand(len(images), 3, 8, 8), "maps of shape (6, h, w), but got (6, 3"),
    "nan": (lambda model, images, target: torch.full((len(images), 4, 4), torch.nan), "`mine` maps are degenerate"),
    "device": (lambda model, images, target: torch.rand(len(images), 2, 2, device="meta"), "they are on meta"),
    "grid": (lambda model, images, target: torch.rand(6, 2, 2 + len(calls) // 3), "with 2x2 cells, as at the baseline"),
    "step 7": (at_step_7, "it raised ValueError('the ninth sun is dark')"),
    "backward": (lambda model, images, target: outside(images), "but it changed `net.conv1.weight.grad`"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_function_that_fails_is_said_in_a_sentence_and_training_goes_on(tmp_path: Path, bad: str) -> None:
    function, said = BAD[bad]

    def counted(model: nn.Module, images: Tensor, target: Tensor) -> Any:
        calls.append(0) if bad == "grid" else None
        return function(model, images, target)

    def prepared() -> Any:
        calls.clear()
        held[:] = []
        return tiny_resnet()

    class Kept(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            held[:] = [pl_module]

    _, _, without = run(prepared(), tmp_path / "without", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _, outcome = run(
            prepared(), tmp_path / "with", [MapFunction("mine", counted)], every_n_steps=1, more_callbacks=[Kept()]
        )
    told = [text for text in messages(caught) if "mine" in text]
    assert 1 <= len(told) <= 2, told  # of a snapshot, and of its noise
    assert said in told[0]
    assert trainer.global_step == 8
    assert differing(without, outcome) == []
    if bad == "nan":
        assert "mine" in render_page(load_run(str(trainer.log_dir)))
    elif bad in ("grid", "step 7"):
        assert 1 <= len(saved(trainer)) < 9
        load_run(str(trainer.log_dir))


def test_given_images_need_to_know_how_logits_come_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step says it, or the user does where none can be run."""
    images = IMAGES[:3]
    trainer, _, _ = run(tiny_resnet(), tmp_path / "step", [SALIENCY], images=images)
    assert load_run(str(trainer.log_dir)).maps["saliency"].shape == (3, 3, 64, 64)
    monkeypatch.setattr("vit_explain_callback.lightning.discover.probe_batch", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"Expected Net to define `forward\(images\)`, returning logits") as error:
        run(tiny_resnet(), tmp_path, [SALIENCY], images=images)
    assert "forward=lambda module, images: module.model(images)" in str(error.value)
    trainer, _, _ = run(
        tiny_resnet(), tmp_path, [SALIENCY], images=images, forward=lambda module, images: module.net(images)
    )
    assert load_run(str(trainer.log_dir)).maps["saliency"].shape == (3, 3, 64, 64)


def test_a_step_that_sees_no_images_says_what_to_give(tmp_path: Path) -> None:
    class Vectors(Net):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    module = Vectors(nn.Linear(3 * 64 * 64, CLASSES))
    callback = ViTExplainCallback([SALIENCY], num_images=4)
    with pytest.raises(ValueError, match="to give images to a module of its own, but none did"):
        fit(callback, tmp_path, module, DataLoader(DATA, 4), DataLoader(DATA, 4))


def test_a_function_beside_the_methods_of_a_vit(tmp_path: Path) -> None:
    small: Any = [(image[:, :32, :32], label) for image, label in DATA]
    loaders: dict[str, Any] = {"train": DataLoader(small, 4), "validation": DataLoader(small, 4)}
    _, _, without = run(tiny_vit(), tmp_path / "without", None, **loaders)
    trainer, _, outcome = run(tiny_vit(), tmp_path / "with", ["grad_rollout", SALIENCY], **loaders)
    assert differing(without, outcome) == []
    tags = set(events(trainer).Tags()["scalars"])
    assert {"explain/map/sink_lift/grad_rollout", "explain/map/entropy/saliency"} <= tags
    assert "explain/map/sink_lift/saliency" not in tags
    assert load_run(str(trainer.log_dir)).maps["saliency"].shape == (3, 6, 32, 32)


def test_tokens_are_not_left_out_for_maps_that_have_none() -> None:
    explainer = Explainer(tiny_vit(), ["rollout", SALIENCY])
    with pytest.raises(ValueError, match="Expected `removal='mean_colour'` for `saliency`, whose cells are no tokens"):
        ExplanationTracker(explainer, Probe.of(random_images(2)), checks=Checks(removal="tokens"))
