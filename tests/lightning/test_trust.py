"""What the callback measures besides the maps: blocks, noise, faithfulness, regions, and what it says at the end."""

from __future__ import annotations

import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from tests.models import random_images, tiny_vit
from tests.runs import Classifier, Pictures, events, fit, loader, messages, saved
from vit_explain_callback import ViTExplainCallback, explain
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.faithfulness import mean_colour, random_maps, symmetric_relevance_gain
from vit_explain_callback.tracking.snapshot import Snapshot


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [0, 2, 4, 6, 8]), (2, [0, 4, 8]), (3, [0, 6, 8]), (9, [0, 8]), (None, [])]
)
def test_checks_are_made_on_their_own_schedule_and_at_both_ends(
    tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    callback = ViTExplainCallback(["rollout"], every_n_steps=2, check_every_n_snapshots=every, on_error="raise")
    trainer = fit(callback, tmp_path)
    assert [one.step for one in saved(trainer) if one.reliability is not None] == steps
    assert [one.step for one in saved(trainer)] == [0, 2, 4, 6, 8]
    if every is not None:
        for tag in ("explain/faithfulness/rollout", "explain/statistics/drift_scale/rollout/spearman/noise"):
            assert [event.step for event in events(trainer).Scalars(tag)] == steps
    for tag in ("explain/probe/accuracy", "explain/statistics/drift_baseline/rollout/cosine"):
        assert [event.step for event in events(trainer).Scalars(tag)] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("removal", ["mean_colour", "tokens"])
def test_checks_and_blocks_of_the_baseline_are_those_of_explain(tmp_path: Path, removal: Any) -> None:
    trainer = fit(ViTExplainCallback(num_images=5, batch_size=2, removal=removal, on_error="raise"), tmp_path)
    baseline = saved(trainer)[0]
    data = Pictures()
    images, labels = data.images[:5], data.labels[:5]
    expected = explain(tiny_vit(), images, target=labels, block_statistics=True)
    mirrored = explain(tiny_vit(), images.flip(3), target=labels)
    assert baseline.reliability is not None
    assert baseline.blocks is not None
    assert expected.blocks is not None
    for name in expected.maps:
        torch.testing.assert_close(baseline.reliability.mirrored[name], mirrored.maps[name].flip(2))
    for statistic, value in vars(expected.blocks).items():
        torch.testing.assert_close(getattr(baseline.blocks, statistic), value)
    maps = {**expected.maps, "random": random_maps(5, (4, 4))}
    explainer = Explainer(tiny_vit(), ["rollout"])
    explainer(images)
    remove = mean_colour(explainer.logits) if removal == "mean_colour" else explainer.logits_without
    gains = symmetric_relevance_gain(remove, images, maps, labels)
    for name, gain in gains.items():
        torch.testing.assert_close(baseline.reliability.gains[name], gain)


def test_the_scale_is_fixed_at_the_baseline(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(["grad_rollout"], on_error="raise"), tmp_path, Classifier(symmetric_vit()))
    board = events(trainer)

    def curve(tag: str) -> list[float]:
        return [event.value for event in board.Scalars(tag)]

    noise, unrelated = (
        curve(f"explain/statistics/drift_scale/grad_rollout/cosine/{bar}")[0] for bar in ("noise", "unrelated")
    )
    drift, scaled = (
        curve("explain/statistics/drift_baseline/grad_rollout/cosine"),
        curve("explain/statistics/drift_baseline_scaled/grad_rollout/cosine"),
    )
    assert noise == pytest.approx(1, abs=1e-4)
    assert scaled == pytest.approx([(value - noise) / (unrelated - noise) for value in drift], abs=1e-3)


def symmetric_vit() -> Any:
    """A ViT to which a mirrored image is the same image mirrored: position embedding and filters are symmetric."""
    vit = tiny_vit()
    with torch.no_grad():
        position = vit.pos_embed[:, 1:].view(1, 4, 4, -1)
        vit.pos_embed[:, 1:] = (position + position.flip(2)).view(1, 16, -1) / 2
        filters = vit.patch_embed.proj.weight
        vit.patch_embed.proj.weight.copy_((filters + filters.flip(3)) / 2)
    return vit


def test_spread_and_split_by_hand(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(["rollout"]), tmp_path)
    first, *_, last = saved(trainer)
    values = spearman(last.maps["rollout"], first.maps["rollout"])
    changed = last.prediction != first.prediction
    expected = {
        "spread/rollout/spearman/p10": values.quantile(0.1),
        "spread/rollout/spearman/median": values.quantile(0.5),
        "spread/rollout/spearman/p90": values.quantile(0.9),
        "split/rollout/spearman/changed": values[changed].mean(),
        "split/rollout/spearman/unchanged": values[~changed].mean(),
    }
    board = events(trainer)
    for tag, value in expected.items():
        assert board.Scalars(f"drift_baseline_{tag}")[-1].value == pytest.approx(value.item(), abs=1e-6)


def test_regions_are_measured_and_kept_for_the_page(tmp_path: Path) -> None:
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[:, :16, :16] = True
    data = Pictures()
    callback = ViTExplainCallback(
        ["rollout"], images=(data.images[:4], data.labels[:4]), regions={"corner": masks}, on_error="raise"
    )
    trainer = fit(callback, tmp_path)
    maps = saved(trainer)[-1].maps["rollout"]
    mass = (maps[:, :2, :2].sum(dim=(1, 2)) / maps.sum(dim=(1, 2))).mean().item()
    board = events(trainer)
    assert board.Scalars("explain/statistics/region/corner/rollout/mass")[-1].value == pytest.approx(mass, abs=1e-5)
    assert board.Scalars("explain/final/lift/corner/rollout")[-1].value == pytest.approx(4 * mass, abs=1e-5)


@pytest.mark.parametrize(
    ("regions", "error", "message"),
    [
        (
            {"a": torch.ones(3, 32, 32, dtype=torch.bool)},
            ValueError,
            r"`regions\['a'\]` to hold one mask for each of the 4",
        ),
        ({"a": torch.ones(4, 32, 32)}, TypeError, r"`regions\['a'\]` to be a boolean tensor"),
        ({"a": "object"}, TypeError, r"`regions\['a'\]` to be a boolean tensor"),
    ],
)
def test_wrong_regions_are_refused_before_training(regions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ViTExplainCallback(images=random_images(4), regions=regions)


def test_regions_of_validation_images_must_be_as_many(tmp_path: Path) -> None:
    callback = ViTExplainCallback(num_images=5, regions={"a": torch.ones(4, 32, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="one mask for each of the 5 probe images"):
        fit(callback, tmp_path)


def test_the_verdict_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(ViTExplainCallback(), tmp_path)
    text = Path(trainer.log_dir or "", "explanations", "summary.txt").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "16 probe images over 3 snapshots" in text
    tensor = events(trainer).Tensors("explain/summary/text_summary")[-1]
    assert tensor.tensor_proto.string_val[0].decode() == "\n".join(f"    {line}" for line in text.splitlines())


def test_a_run_that_ends_without_a_snapshot_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Classifier):
        def forward(self, images: torch.Tensor) -> Any:
            if not self.net.training:
                raise RuntimeError("broken")
            return super().forward(images)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ViTExplainCallback(), tmp_path, Broken())
    assert len(messages(caught)) == 3
    assert "Explanation drift" not in capsys.readouterr().out


def test_animations_have_a_frame_for_each_snapshot(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(["rollout"], every_n_steps=2, num_shown=1), tmp_path)
    (event,) = events(trainer).Images("explain/overlay_animation/rollout/0")
    with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
        assert picture.format == "GIF"
        assert getattr(picture, "n_frames", 1) == 5
        assert picture.size == (event.width, event.height)


def test_final_values_are_declared_beside_the_hyperparameters(tmp_path: Path) -> None:
    class WithHyperparameters(Classifier):
        def __init__(self, lr: float = 0.03, patience: int = 7) -> None:
            super().__init__(lr=lr)
            self.save_hyperparameters()

    board = events(fit(ViTExplainCallback(["rollout"]), tmp_path, WithHyperparameters()))
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment
    declared = {info.name.tag for info in experiment.metric_infos}
    assert {"explain/final/drift/rollout", "explain/final/faithfulness/rollout"} <= declared
    assert {info.name for info in experiment.hparam_infos} == {"lr", "patience"}
    last = board.Scalars("explain/drift/rank_correlation_baseline/rollout")[-1]
    final = board.Scalars("explain/final/drift/rollout")[-1]
    assert (final.step, final.value) == (last.step, last.value)


def test_margin_charts_show_tags_that_exist(tmp_path: Path) -> None:
    board = events(fit(ViTExplainCallback(["rollout"]), tmp_path))
    (tensor,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = layout.category[0].chart
    assert len(charts) == 5
    for chart in charts:
        series = chart.margin.series[0]
        assert {series.value, series.lower, series.upper} <= set(board.Tags()["scalars"])
        assert re.search("median$", series.value)
        assert re.search("p10$", series.lower)


def test_sinks_are_said_once(tmp_path: Path) -> None:
    """A patch whose key outshines all others, in a grid of which a hundredth is more than one patch."""
    vit = tiny_vit(img_size=96, patch_size=8)
    with torch.no_grad():
        vit.pos_embed[:, 50] *= 0
        for block in vit.blocks:
            block.attn.qkv.weight[:96] = 0
            block.attn.qkv.bias[:96] = 0
            block.attn.qkv.bias[:48] = 4
        # Keys see one direction, in which only that patch is large.
        vit.pos_embed[:, :, 0] = 0
        vit.pos_embed[:, 50, 0] = 40
        for block in vit.blocks:
            block.attn.qkv.weight[48:96, 0] = 0.5
    data: Any = [(image, 0) for image in random_images(8, (96, 96))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            ViTExplainCallback(["rollout"], images=random_images(2, (96, 96)), every_n_steps=4),
            tmp_path,
            Classifier(vit, lr=0.0),
            train=loader(data),
        )
    (said,) = [message for message in messages(caught) if "artifact tokens" in message]
    assert "`rollout` maps" in said
    assert events(trainer).Scalars("explain/map/sink_lift/rollout")[0].value > 8


def test_every_scalar_of_a_short_run_is_a_number(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(), tmp_path)
    board = events(trainer)
    for tag in board.Tags()["scalars"]:
        values = [event.value for event in board.Scalars(tag)]
        if not tag.startswith("final") and "_split/" not in tag and "_scaled/" not in tag:
            assert all(math.isfinite(value) for value in values), tag


def test_files_are_those_the_page_reads(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(num_shown=2, class_names=["a", "b", "c", "d", "e"]), tmp_path)
    folder = Path(trainer.log_dir or "", "explanations")
    assert {path.name for path in folder.iterdir()} == {
        "probe.safetensors",
        "summary.txt",
        *(f"step_{step:08d}.safetensors" for step in (0, 4, 8)),
    }
    assert isinstance(Snapshot.load(folder / "step_00000008.safetensors"), Snapshot)
