"""The callback in real training runs: what it writes, when, and what it says about wrong input."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.models import CLASSES, random_images, steady_vit, tiny_vit
from tests.runs import Classifier, Pictures, events, fit, loader, messages, quiet, saved
from vit_explain_callback import AttentionRollout, Detail, ViTExplainCallback, explain
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.shape import map_statistics
from vit_explain_callback.visualization.filmstrip import filmstrip

METRICS = ("spearman", "jensen_shannon", "top10_iou", "centroid_shift", "cosine")
BLOCKS = ("block_01", "block_02", "block_03")


def brief_tags(*methods: str, region: str | None = None) -> set[str]:
    """The scalars of a run by default, from the docstring."""
    probe = ("accuracy", "changed_predictions", "target_probability")
    tags = {"explain/faithfulness/random", *(f"explain/probe/{name}" for name in probe)}
    of_method = ["drift/noise_to_unrelated", "drift/baseline_rank_correlation", "drift/previous_rank_correlation"]
    of_method += ["faithfulness", "map/entropy", "map/sink_lift", *([] if region is None else [f"lift/{region}"])]
    return tags | {f"explain/{name}/{method}" for name in of_method for method in methods}


def full_tags(*methods: str, region: str) -> set[str]:
    """Every scalar of a run with `detail="full"`, from the docstring."""
    tags: set[str] = set()
    for method in methods:
        tags |= {f"explain/final/{name}/{method}" for name in ("drift", "faithfulness", f"lift/{region}")}
        stats = map_statistics(torch.rand(1, 2, 2)).keys() - {"entropy"}
        tags |= {f"explain/statistics/map/{method}/{stat}" for stat in stats}
        stats = region_statistics(torch.rand(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)).keys() - {"lift"}
        tags |= {f"explain/statistics/region/{region}/{method}/{stat}" for stat in stats}
        for metric in METRICS:
            tail = f"{method}/{metric}"
            tags |= {f"explain/statistics/drift_scale/{tail}/{bar}" for bar in ("noise", "unrelated")}
            for drift in ("explain/statistics/drift_baseline", "explain/statistics/drift_previous"):
                tags |= {f"{drift}/{tail}", f"{drift}_scaled/{tail}"}
                tags |= {f"{drift}_spread/{tail}/{part}" for part in ("median", "p10", "p90")}
                tags |= {f"{drift}_split/{tail}/{part}" for part in ("changed", "unchanged")}
        # Those of the rank correlation that are among the first.
        first = ("drift_baseline", "drift_previous", "drift_baseline_scaled")
        tags -= {f"explain/statistics/{name}/{method}/spearman" for name in first}
    for block in BLOCKS:
        tags |= {f"explain/statistics/drift_blocks/{metric}/{block}" for metric in ("spearman", "jensen_shannon")}
        statistics = ("entropy", "lowest_head_entropy", "distance", "class_self", "sink_share")
        tags |= {f"explain/statistics/attention/{statistic}/{block}" for statistic in statistics}
    return tags | brief_tags(*methods, region=region)


def test_zero_configuration_writes_exactly_the_documented_tags(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(), tmp_path, Classifier(steady_vit()))
    tags = events(trainer).Tags()
    expected = brief_tags("rollout", "grad_rollout")
    assert set(tags["scalars"]) - {"epoch"} == expected
    assert len(expected) == 16 <= 24
    pictures = ["explain/filmstrip/grad_rollout", "explain/filmstrip/rollout", "explain/heatmap/blocks"]
    assert sorted(tags["images"]) == pictures
    assert tags["tensors"] == ["explain/summary/text_summary"]
    assert (
        {tag for tag in trainer.callback_metrics if tag.startswith("explain/")}
        == expected
        == set(trainer.callback_metrics)
    )


def masks(count: int = 16) -> dict[str, Tensor]:
    left = torch.zeros(count, 32, 32, dtype=torch.bool)
    left[:, :, :16] = True
    return {"left": left}


@pytest.fixture(scope="module")
def tags_of_full_detail(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run with everything on writes."""
    callback = ViTExplainCallback(detail="full", regions=masks())
    return events(fit(callback, tmp_path_factory.mktemp("full"), Classifier(steady_vit()))).Tags()


def test_full_detail_writes_exactly_the_documented_tags(tags_of_full_detail: dict[str, Any]) -> None:
    tags = tags_of_full_detail
    methods = ("rollout", "grad_rollout")
    assert set(tags["scalars"]) - {"epoch"} == full_tags(*methods, region="left")
    images = {f"explain/filmstrip/{method}" for method in methods} | {"explain/heatmap/blocks"}
    kinds = ("overlay", "overlay_change", "overlay_animation")
    images |= {f"explain/{kind}/{method}/{i}" for kind in kinds for method in methods for i in range(3)}
    assert set(tags["images"]) == images
    assert set(tags["tensors"]) == {"explain/summary/text_summary", "custom_scalars__config__"}


def test_regions_add_their_lift_to_the_first_scalars(tmp_path: Path) -> None:
    callback = ViTExplainCallback(regions=masks(), detail=Detail(page=False), num_shown=1)
    tags = events(fit(callback, tmp_path, Classifier(steady_vit()))).Tags()
    assert set(tags["scalars"]) - {"epoch"} == brief_tags("rollout", "grad_rollout", region="left")


def test_what_is_not_asked_for_is_not_written(tmp_path: Path) -> None:
    callback = quiet(["rollout"], margin_charts=False, detail="full")
    tags = events(fit(callback, tmp_path, Classifier(steady_vit()))).Tags()
    left_out = re.compile("faithfulness|scale|noise_to|attention|drift_blocks|sink_lift|left")
    expected = {tag for tag in full_tags("rollout", region="left") if not left_out.search(tag)}
    assert set(tags["scalars"]) - {"epoch"} == expected
    assert tags["tensors"] == ["explain/summary/text_summary"]
    assert not [tag for tag in tags["images"] if "heatmap" in tag]


def test_every_tag_is_named_in_the_docstring_and_its_family_in_the_readme(tags_of_full_detail: dict[str, Any]) -> None:
    known = re.findall("`(explain/[^`]*)`", ViTExplainCallback.__doc__ or "")
    patterns = [re.sub(r"\{\w+\}", r"[^/]+", tag) for tag in known]
    tags = tags_of_full_detail
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    for tag in {*tags["images"], *tags["scalars"]} - {"epoch"}:
        assert any(re.fullmatch(pattern, tag) for pattern in patterns), tag
        assert "/".join(tag.split("/")[:2]) in readme, tag


def test_the_event_file_stays_small(tmp_path: Path) -> None:
    """Images of noise, which compress worst, and a model of the usual size of grid."""
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"images": (images, torch.arange(8) % CLASSES), "every_n_steps": 1}

    def trained(**more: Any) -> tuple[int, int]:
        folder = tmp_path / more.get("detail", "brief")
        data: Any = [(image, 0) for image in images[:2]]
        vit = tiny_vit(img_size=224, patch_size=16)
        trainer = fit(
            ViTExplainCallback(**options, **more), folder, Classifier(vit, lr=0.0), train=loader(data, 1), max_epochs=1
        )
        size = sum(path.stat().st_size for path in Path(trainer.log_dir or "").glob("events*"))
        tags = events(trainer).Tags()
        return size, len(tags["scalars"]) + len(tags["images"])

    size, tags = trained()
    assert size < 3 * 300e3 + 500e3
    full_size, full_count = trained(detail="full")
    assert tags <= 25
    assert full_count > 200
    assert full_size > 1.5 * size


def test_pictures_stop_at_the_bound_and_it_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(ViTExplainCallback(["rollout"], every_n_steps=1, detail=Detail(max_pictures_mb=0.4)), tmp_path)
    assert len([text for text in messages(caught) if "the pictures reached 0.4 MB" in text]) == 1
    board = events(trainer)
    pictures = [event for tag in board.Tags()["images"] for event in board.Images(tag)]
    assert 0.2e6 < sum(len(event.encoded_image_string) for event in pictures) <= 0.4e6
    steps = [event.step for event in board.Images("explain/filmstrip/rollout")]
    assert steps[-1] == 8 > steps[-2]  # the end is there
    assert len(board.Scalars("explain/map/entropy/rollout")) == 9


def test_a_key_of_the_users_is_left_alone(tmp_path: Path) -> None:
    class Same(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("explain/probe/accuracy", 7.0)

    trainer = fit(quiet(["rollout"]), tmp_path, Same())
    assert trainer.callback_metrics["explain/probe/accuracy"] == 7
    assert "explain/probe/target_probability" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({}, [0, 4, 8]),
        ({"every_n_epochs": 2}, [0, 8]),
        ({"every_n_epochs": 3}, [0, 8]),
        ({"every_n_steps": 3}, [0, 3, 6, 8]),
        ({"every_n_epochs": None, "every_n_steps": 1}, list(range(9))),
        ({"every_n_steps": 100}, [0, 8]),
    ],
)
def test_snapshots_are_taken_before_the_first_step_on_schedule_and_at_the_end(
    tmp_path: Path, schedule: dict[str, Any], steps: list[int]
) -> None:
    trainer = fit(quiet(["rollout"], **schedule), tmp_path)
    assert [snapshot.step for snapshot in saved(trainer)] == steps
    drift = events(trainer).Scalars("explain/drift/baseline_rank_correlation/rollout")
    assert [event.step for event in drift] == steps
    assert drift[0].value == pytest.approx(1)  # the baseline against itself


def test_accumulated_gradients_count_as_one_step(tmp_path: Path) -> None:
    trainer = fit(quiet(["rollout"], every_n_steps=1), tmp_path, accumulate_grad_batches=2)
    assert [snapshot.step for snapshot in saved(trainer)] == [0, 1, 2, 3, 4]


def test_saved_maps_are_those_of_the_model_at_that_step(tmp_path: Path) -> None:
    module, data = Classifier(), Pictures()
    before = explain(module.net, data.images, target=data.labels)
    trainer = fit(quiet(), tmp_path, module)
    baseline, *_, last = saved(trainer)
    after = explain(module.net, data.images, target=data.labels)
    for snapshot, explanation in ((baseline, before), (last, after)):
        assert snapshot.target.equal(data.labels)
        torch.testing.assert_close(snapshot.logits, explanation.logits)
        for name, maps in explanation.maps.items():
            torch.testing.assert_close(snapshot.maps[name], maps)
    drift = events(trainer).Scalars("explain/drift/baseline_rank_correlation/grad_rollout")[-1].value
    expected = spearman(after.maps["grad_rollout"], before.maps["grad_rollout"]).mean().item()
    assert drift == pytest.approx(expected, abs=1e-6)
    changed = (after.logits.argmax(1) != before.logits.argmax(1)).float().mean().item()
    assert events(trainer).Scalars("explain/probe/changed_predictions")[-1].value == pytest.approx(changed)
    accuracy = (after.logits.argmax(1) == data.labels).float().mean().item()
    assert events(trainer).Scalars("explain/probe/accuracy")[-1].value == pytest.approx(accuracy)


def test_the_last_filmstrip_still_shows_the_baseline_after_many_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard keeps 10 pictures of a tag by default and drops step 0, but always keeps the last."""
    shown: list[list[int]] = []

    def spy(pictures: Any, titles: Any, steps: Any, *rest: Any) -> Any:
        shown.append(steps)
        return filmstrip(pictures, titles, steps, *rest)

    monkeypatch.setattr("vit_explain_callback.tracking.pictures.filmstrip", spy)
    callback = quiet(["rollout"], every_n_steps=1, num_shown=2, num_images=4)
    trainer = fit(callback, tmp_path, max_epochs=5)
    assert len(saved(trainer)) == 21
    accumulator = EventAccumulator(trainer.log_dir, size_guidance={"images": 10})
    accumulator.Reload()
    kept = accumulator.Images("explain/filmstrip/rollout")
    assert kept[-1].step == 20
    picture = Image.open(io.BytesIO(kept[-1].encoded_image_string))
    assert picture.width == 700
    assert shown[-1][0] == 0
    assert shown[-1][-1] == 20
    assert len(shown[-1]) == 4


def test_colour_limits_are_frozen_at_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def spy(*arguments: Any) -> Any:
        limits.append(arguments[7])
        return filmstrip(*arguments)

    monkeypatch.setattr("vit_explain_callback.tracking.pictures.filmstrip", spy)
    fit(quiet(["rollout_max"], every_n_steps=1), tmp_path, Classifier(lr=0.5))
    assert len(limits) == 10  # nine snapshots, and once more at the end
    assert len(set(limits)) == 1


@pytest.mark.parametrize("keys", [("image", "label"), ("pixel_values", "labels")])
def test_mapping_batches(tmp_path: Path, keys: tuple[str, str]) -> None:
    data = Pictures(keys=keys)
    trainer = fit(quiet(["rollout"]), tmp_path, train=loader(data), validation=loader(data))
    assert saved(trainer)[0].target.equal(data.labels)


def test_a_module_without_forward_is_explained_through_its_vit(tmp_path: Path) -> None:
    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_vit()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-2)

    assert len(saved(fit(quiet(on_error="raise"), tmp_path, Bare()))) == 3


class Torchvision(Classifier):
    """A model that says nothing of its tokens or its normalisation."""

    def __init__(self) -> None:
        shape = {"num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96, "num_classes": CLASSES}
        super().__init__(torchvision.models.VisionTransformer(image_size=32, patch_size=8, **shape))

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(logits=self.net(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).logits, batch[1])


def test_a_model_that_is_not_timms_needs_no_configuration_either(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="100% of the `grad_rollout` maps are degenerate"):  # its new head is all zero
        trainer = fit(quiet(on_error="raise"), tmp_path, Torchvision())
    assert [snapshot.maps["grad_rollout"].shape for snapshot in saved(trainer)] == [(16, 4, 4)] * 3
    picture = events(trainer).Images("explain/filmstrip/grad_rollout")[-1].encoded_image_string
    left_column = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[18:146, :128]
    assert left_column.min() < 60
    assert left_column.max() > 195


def test_a_module_without_forward_is_followed_through_its_step_whatever_its_model(tmp_path: Path) -> None:
    class NoForward(Torchvision):
        forward = pl.LightningModule.forward

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    for options in ({}, {"vit": "net"}, {"forward": lambda module, images: module.net(images)}):
        callback = quiet(["rollout"], on_error="raise", **options)  # type: ignore[arg-type]
        assert len(saved(fit(callback, tmp_path, NoForward()))) == 3


def test_of_two_vits_the_one_is_explained_that_the_loss_comes_from(tmp_path: Path) -> None:
    class Distilled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = tiny_vit(seed=1)

    class Both(Distilled):
        def forward(self, images: Tensor) -> Any:
            return self.net(images) + self.teacher(images)

    for options in ({}, {"vit": "net"}):
        callback = quiet(["rollout"], on_error="raise", **options)  # type: ignore[arg-type]
        baseline, *_ = saved(fit(callback, tmp_path, Distilled()))
        assert callback.tracker is not None
        expected = explain(tiny_vit(), callback.tracker.probe.images, ["rollout"])  # type: ignore[arg-type]
        torch.testing.assert_close(baseline.maps["rollout"], expected.maps["rollout"])
    with pytest.raises(ValueError, match="come from 2: net, teacher"):
        fit(quiet(), tmp_path, Both())
    assert len(saved(fit(quiet(["rollout"], vit="net", on_error="raise"), tmp_path, Both()))) == 3


@pytest.mark.parametrize("target", ["label", "prediction", 3])
def test_the_target_stays_fixed_over_the_run(tmp_path: Path, target: Any) -> None:
    module, data = Classifier(lr=0.5), Pictures()
    predicted = explain(module.net, data.images, ["rollout"]).logits.argmax(1)
    snapshots = saved(fit(quiet(target=target, every_n_steps=1), tmp_path, module))
    expected = {"label": data.labels, "prediction": predicted, 3: torch.full((16,), 3)}[target]
    assert not snapshots[-1].prediction.equal(predicted)
    assert all(snapshot.target.equal(expected) for snapshot in snapshots)


def test_given_images_are_explained_instead_of_the_validation_set(tmp_path: Path) -> None:
    images = random_images(3, seed=99)
    callback = quiet(["rollout"], images=images, on_error="raise")
    snapshot, *_ = saved(fit(callback, tmp_path, validation=None))
    torch.testing.assert_close(snapshot.maps["rollout"], explain(tiny_vit(), images, ["rollout"]).maps["rollout"])
    assert snapshot.target.equal(snapshot.prediction)
    labelled = quiet(images=(images, torch.tensor([4, 4, 1])), on_error="raise")
    assert saved(fit(labelled, tmp_path))[0].target.tolist() == [4, 4, 1]


def test_transfer_hooks_run_as_in_validation(tmp_path: Path) -> None:
    class Transferring(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, labels = batch
            return [images * 2 if self.trainer.training else images / 2, labels]

    trainer = fit(quiet(["rollout"], on_error="raise"), tmp_path, Transferring())
    expected = explain(tiny_vit(), Pictures().images / 2, ["rollout"]).maps["rollout"]
    torch.testing.assert_close(saved(trainer)[0].maps["rollout"], expected)
    assert trainer.state.stage is None or not trainer.validating


def test_probe_images_are_there_before_the_first_epoch_that_is_validated(tmp_path: Path) -> None:
    trainer = fit(quiet(["rollout"], on_error="raise"), tmp_path, check_val_every_n_epoch=9)
    assert saved(trainer)[0].target.equal(Pictures().labels)


def test_fewer_images_than_asked_for_are_used_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`num_images=64`, but the validation set gave 16; these are used"):
        trainer = fit(quiet(["rollout"], num_images=64), tmp_path)
    assert len(saved(trainer)[0].logits) == 16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": ["rolout"]}, ValueError, "`methods` to name"),
        ({"methods": [3]}, TypeError, "got 3"),
        ({"every_n_epochs": 1, "every_n_steps": 5}, ValueError, "one schedule.* but got both"),
        ({"every_n_epochs": None}, ValueError, "one schedule.* but got neither"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` to be an integer of at least 1 .*, but got 0"),
        ({"every_n_steps": -1}, ValueError, "`every_n_steps` to be an integer of at least 1"),
        ({"num_images": 0}, ValueError, "`num_images` to be an integer of at least 1"),
        ({"num_shown": 0}, ValueError, "`num_shown` to be an integer of at least 1"),
        ({"batch_size": 0}, ValueError, "`batch_size` to be an integer of at least 1"),
        ({"detail": "all"}, ValueError, "`detail` to be 'brief' or 'full', but got 'all'"),
        ({"detail": {"max_pictures_mb": 0}}, ValueError, "`max_pictures_mb` to be a number above 0, but got 0"),
        ({"target": "lable"}, ValueError, "'label', 'prediction' or a class index of at least 0, but got 'lable'"),
        ({"on_error": "ignore"}, ValueError, "`on_error` to be 'warn' or 'raise'"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, TypeError, "torch.uint8"),
        ({"images": torch.full((1, 3, 32, 32), 200.0)}, ValueError, "as of bytes"),
        ({"images": torch.full((1, 3, 32, 32), torch.inf)}, ValueError, "NaN or Inf"),
        ({"images": torch.zeros(3, 32, 32)}, ValueError, r"shape \(B, C, H, W\)"),
        ({"normalisation": ((0.5,) * 3, (0.5,) * 2)}, ValueError, "`normalisation` to be .mean, std."),
        ({"images": (torch.zeros(2, 3, 32, 32), torch.zeros(3).long())}, ValueError, "2 images but 3 labels"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ViTExplainCallback(**arguments)


class Swin(Classifier):
    def __init__(self) -> None:
        import timm

        super().__init__(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)))


class NoHead(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_vit(num_classes=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.parametrize(
    ("arguments", "run", "message"),
    [
        ({}, {"module": Swin}, "SwinTransformer, which is not a stack of blocks"),
        ({}, {"module": NoHead}, "compare outputs, one row per image, with labels in a loss, but saw no such loss"),
        ({"vit": "head"}, {}, "'head'"),
        ({}, {"validation": None}, "Expected a validation loader .* Pass the images"),
        ({"methods": [AttentionRollout(start_block=4)]}, {}, r"`start_block` in 1 … 3"),
        ({"images": torch.zeros(1, 3, 40, 32)}, {}, "images of 32x32 pixels .* but got 40x32"),
        ({"images": torch.zeros(1, 3, 40, 32)}, {"sanity": 1}, "images of 32x32 pixels .* but got 40x32"),
        ({"target": 5}, {"starts": True}, r"`target` classes in 0 … 4"),
    ],
)
def test_a_configuration_that_cannot_work_stops_before_training(
    tmp_path: Path, arguments: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    module = run.get("module", Classifier)()
    before = [parameter.clone() for parameter in module.parameters()]
    callback, validation, sanity = quiet(**arguments), run.get("validation", "same"), run.get("sanity", 0)
    with pytest.raises(ValueError, match=message):
        fit(callback, tmp_path, module, validation, num_sanity_val_steps=sanity)
    assert all(one.equal(other) for one, other in zip(before, module.parameters(), strict=True))


def test_a_step_that_fails_with_validation_images_does_not_stop_training(tmp_path: Path) -> None:
    data = Pictures()
    data.images = (data.images.clamp(-1, 1) * 127 + 127).byte()
    with pytest.warns(UserWarning, match="A step of Classifier failed with probe images"):
        trainer = fit(quiet(), tmp_path, validation=loader(data))
    assert trainer.global_step == 8


def test_nothing_is_saved_without_save_maps_or_in_a_fast_dev_run(tmp_path: Path) -> None:
    fit(quiet(["rollout"], save_maps=False), tmp_path)
    fit(quiet(["rollout"]), tmp_path, fast_dev_run=True)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_second_fit_with_the_same_callback_starts_afresh(tmp_path: Path) -> None:
    callback = quiet(["rollout"])
    fit(callback, tmp_path)
    assert [snapshot.step for snapshot in saved(fit(callback, tmp_path))] == [0, 4, 8]


def test_class_names_come_from_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def spy(picture: Any, text: str) -> Any:
        texts.append(text)
        return picture

    def predicted(text: str) -> str:
        return text.split(" · ")[1].removeprefix("✗ ")

    monkeypatch.setattr("vit_explain_callback.tracking.pictures.with_strip", spy)
    data = Pictures()
    data.classes = ["ant", "bee", "cat", "dog", "eel"]  # type: ignore[attr-defined]
    fit(quiet(["rollout"], every_n_epochs=2, detail="full"), tmp_path, validation=loader(data))
    assert {predicted(text) for text in texts} <= set(data.classes)  # type: ignore[attr-defined]
    assert texts[0].startswith("step 0 · ")
    assert re.search(r" · p(\(\w+\))? 0\.\d\d$", texts[0])
    texts.clear()
    fit(quiet(["rollout"], class_names=["one"], every_n_epochs=2, detail="full"), tmp_path)
    assert {predicted(text) for text in texts} <= {
        "one",
        "class 1",
        "class 2",
        "class 3",
        "class 4",
    }
