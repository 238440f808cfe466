"""What the callback measures besides the maps: blocks, noise, faithfulness, regions, and what it says at the end."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from tqdm import tqdm

from tests.models import random_images, steady_vit, tiny_vit
from tests.runs import Classifier, Pictures, events, fit, loader, messages, quiet, saved
from vit_explain_callback import ViTExplainCallback, explain
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.faithfulness import mean_colour, random_maps, symmetric_relevance_gain
from vit_explain_callback.metrics.reference import nudged
from vit_explain_callback.system.terminal import quoted
from vit_explain_callback.tracking.snapshot import Snapshot

CHECKED: dict[str, Any] = {"every_n_snapshots": 20}


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [0, 2, 4, 6, 8]), (2, [0, 2, 6, 8]), (3, [0, 2, 8]), (9, [0, 2, 8]), (None, [])]
)
def test_checks_begin_after_the_baseline_and_are_made_on_their_own_schedule_and_at_the_end(
    tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    options: dict[str, Any] = {"num_images": 4, "every_n_snapshots": every, "detail": "full"}
    callback = quiet(["rollout"], every_n_steps=2, **options)
    trainer = fit(callback, tmp_path)
    assert [one.step for one in saved(trainer) if one.reliability is not None] == steps
    assert [one.step for one in saved(trainer)] == [0, 2, 4, 6, 8]
    if every is not None:
        noise = events(trainer).Scalars("explain/statistics/drift_scale/rollout/spearman/noise")
        assert [event.step for event in noise] == steps
        for tag in ("explain/faithfulness/rollout", "explain/faithfulness/random"):
            assert [event.step for event in events(trainer).Scalars(tag)] == steps[1:]
    for tag in ("explain/probe/accuracy", "explain/statistics/drift_baseline/rollout/cosine"):
        assert [event.step for event in events(trainer).Scalars(tag)] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("removal", ["mean_colour", "tokens", "auto"])
def test_checks_and_blocks_are_those_of_explain(tmp_path: Path, removal: Any) -> None:
    options: dict[str, Any] = {"batch_size": 2, "removal": removal, "block_statistics": True}
    callback = quiet(num_images=5, on_error="raise", **CHECKED | options)
    module = Classifier()
    trainer = fit(callback, tmp_path, module)
    baseline, middle, last = saved(trainer)
    assert callback.tracker is not None
    images, labels = callback.tracker.probe.images, callback.tracker.probe.labels
    assert images is not None
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 4]
    expected = explain(tiny_vit(), images, target=labels, block_statistics=True)
    assert baseline.reliability is not None
    mirror = baseline.reliability.mirror
    changed = explain(tiny_vit(), nudged(images, (4, 4), mirror), target=labels)
    assert baseline.blocks is not None
    assert expected.blocks is not None
    for name in expected.maps:
        back = changed.maps[name].flip(2) if mirror else changed.maps[name]
        torch.testing.assert_close(baseline.reliability.nudged[name], back)
    for statistic, value in vars(expected.blocks).items():
        torch.testing.assert_close(getattr(baseline.blocks, statistic), value)
    assert baseline.reliability.gains == {}, "training waits for the baseline"
    explainer = Explainer(module.net, ["rollout", "grad_rollout"])
    maps = explainer(images, labels).maps
    remove = mean_colour(explainer.logits) if removal == "mean_colour" else explainer.logits_without
    assert middle.reliability is not None
    assert last.reliability is not None
    for name, gain in symmetric_relevance_gain(remove, images, maps, labels).items():
        torch.testing.assert_close(last.reliability.gains[name], gain)
    assert last.reliability.mirror is mirror
    assert last.reliability.gains["random"].equal(middle.reliability.gains["random"]), "measured once"


def test_the_control_is_a_random_order_of_the_model_at_the_first_check(tmp_path: Path) -> None:
    """Of a model that does not change, so that it can be measured again."""
    module = Classifier(lr=0.0)
    callback = quiet(["rollout"], num_images=5, **CHECKED)
    middle = saved(fit(callback, tmp_path, module))[1]
    assert callback.tracker is not None
    assert callback.tracker.probe.images is not None
    explainer = Explainer(module.net, ["rollout"])
    target = explainer(callback.tracker.probe.images, middle.target).target
    orders = {"random": random_maps(5, (4, 4))}
    found = symmetric_relevance_gain(explainer.logits_without, callback.tracker.probe.images, orders, target)
    assert middle.reliability is not None
    torch.testing.assert_close(middle.reliability.gains["random"], found["random"])


def test_faithfulness_is_measured_on_the_first_eight_images(tmp_path: Path) -> None:
    trainer = fit(quiet(["rollout"], num_images=16, **CHECKED), tmp_path)
    checked = [one.reliability.gains for one in saved(trainer) if one.reliability is not None and one.reliability.gains]
    for gains in checked:
        for gain in gains.values():
            assert gain.isfinite().tolist() == [True] * 8 + [False] * 8
    assert len(checked) == 2


def test_where_tokens_cannot_be_left_out_patches_are_painted_over(tmp_path: Path) -> None:
    def last(removal: Any) -> Snapshot:
        torch.manual_seed(0)
        vit = tiny_vit("beit_base_patch16_224")
        return saved(fit(quiet(["rollout"], removal=removal, **CHECKED), tmp_path, Classifier(vit)))[-1]

    painted, chosen = last("mean_colour").reliability, last("auto").reliability
    assert painted is not None
    assert chosen is not None
    for name, gain in painted.gains.items():
        torch.testing.assert_close(chosen.gains[name], gain, equal_nan=True)


def test_the_scale_is_fixed_at_the_baseline(tmp_path: Path) -> None:
    trainer = fit(quiet(["grad_rollout"], detail="full", **CHECKED), tmp_path, Classifier(steady_vit()))
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
    assert noise == pytest.approx(1, abs=0.1)
    assert scaled == pytest.approx([(value - noise) / (unrelated - noise) for value in drift], abs=1e-3)


def test_spread_and_split_by_hand(tmp_path: Path) -> None:
    trainer = fit(quiet(["rollout"], detail="full"), tmp_path)
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
        assert board.Scalars(f"explain/statistics/drift_baseline_{tag}")[-1].value == pytest.approx(
            value.item(), abs=1e-6
        )


def test_regions_are_measured_and_kept_for_the_page(tmp_path: Path) -> None:
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[:, :16, :16] = True
    data = Pictures()
    callback = quiet(["rollout"], images=(data.images[:4], data.labels[:4]), regions={"corner": masks}, detail="full")
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
    callback = quiet(num_images=5, regions={"a": torch.ones(4, 32, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="one mask for each of the 5 probe images"):
        fit(callback, tmp_path)


def test_one_line_at_the_start_and_the_summary_at_the_end_are_all_that_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(None, tmp_path / "without")
    without = capsys.readouterr().out
    trainer = fit(ViTExplainCallback(), tmp_path)
    text = Path(trainer.log_dir or "", "explanations", "summary.txt").read_text(encoding="utf-8")
    first, *rest = capsys.readouterr().out.removeprefix(without).splitlines()
    assert first == (
        "ViTExplainCallback watches VisionTransformer at `net` (logits of 5 classes, from the cross-entropy of "
        "`training_step`): rollout, grad_rollout of 16 images of 5 classes, with "
        f"each validation; to see them: tensorboard --logdir {tmp_path} or vit-explain report "
        f"{trainer.log_dir}/explanations"
    )
    assert rest == text.splitlines()
    assert 5 < len(rest) <= 10
    tensor = events(trainer).Tensors("explain/summary/text_summary")[-1]
    shown = tensor.tensor_proto.string_val[0].decode()
    assert shown.split() == text.split()
    assert all(line.startswith("    ") and len(line) <= 114 for line in shown.splitlines())


def test_the_line_at_the_start_stands_on_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    callbacks = [pl.callbacks.TQDMProgressBar(), quiet(["rollout"])]  # the bar is there already
    fit(None, tmp_path, more_callbacks=callbacks, enable_progress_bar=True)
    (line,) = [line for line in terminal.getvalue().split("\n") if "watches" in line]
    *bars, line = line.split("\r")
    assert line.startswith("ViTExplainCallback watches")
    assert bars[-1].strip() == "", "the bar was taken away before"


def test_a_refusal_is_all_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn, block.attn.attn_drop = False, nn.ReLU()
    with pytest.raises(ValueError, match="Expected the softmax"):
        fit(quiet(), tmp_path, Classifier(model))
    assert "watches" not in capsys.readouterr().out


def test_images_that_could_not_be_chosen_are_said_to_be_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bound(Pictures):
        """Can be read in the process alone in which it was made."""

        def __init__(self) -> None:
            super().__init__()
            self.process, self.labels = os.getpid(), self.labels * 0

        def __getitem__(self, index: int) -> Any:
            assert os.getpid() == self.process
            return super().__getitem__(index)

        def __reduce__(self) -> Any:
            raise TypeError("not to be copied")

    options: dict[str, Any] = {"num_sanity_val_steps": 2, "max_epochs": 1}
    with pytest.warns(UserWarning, match="so the first validation images are explained"):
        fit(quiet(["rollout"]), tmp_path, validation=loader(Bound(), 8), **options)
    text = "of 16 images of 1 class (the first of the validation; choose others with `images=`), with each validation"
    assert text in capsys.readouterr().out


def test_the_line_at_the_start_names_the_folder_that_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that of the fit before, and none where none can be made."""
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for folder in (tmp_path, tmp_path, tmp_path / "file"):
            fit(quiet(["rollout"]), folder, logger=False, max_epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "watches" in line]
    assert lines[0].endswith(f"vit-explain report {tmp_path / 'explanations'}")
    assert lines[1].endswith(f"vit-explain report {tmp_path / 'explanations_1'}")
    assert lines[2].endswith("with each validation")
    said = messages(caught)
    assert len([text for text in said if "PNG" in text]) == 2
    assert len([text for text in said if "cannot make the folder" in text]) == 1


def test_classes_are_counted_only_where_every_image_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = random_images(4), torch.tensor([0, -1, 3, 3])
    fit(quiet(["rollout"], images=(images, labels)), tmp_path, max_epochs=1)
    assert "rollout of 4 images, with each validation" in capsys.readouterr().out


def test_paths_are_one_word_on_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    path = r"C:\Users\Zoë Müller\runs"
    monkeypatch.setattr("vit_explain_callback.system.terminal.sys", SimpleNamespace(platform="win32"))
    assert quoted(path) == f'"{path}"'
    monkeypatch.setattr("vit_explain_callback.system.terminal.sys", SimpleNamespace(platform="linux"))
    assert quoted("/home/Zoë Müller") == "'/home/Zoë Müller'"


class Unwritable(io.TextIOBase):
    def write(self, text: str) -> int:
        raise OSError("the disk is full")


@pytest.mark.parametrize("kind", ["ascii", "cp1252", "closed", "none", "unwritable"])
def test_a_run_needs_no_standard_output(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream: Any = {"none": None, "unwritable": Unwritable()}.get(kind)
    if kind in ("ascii", "cp1252", "closed"):
        stream = io.TextIOWrapper(raw, "ascii" if kind == "closed" else kind)
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(
        "vit_explain_callback.system.terminal.sys", SimpleNamespace(stdout=stream, stderr=stream, platform=sys.platform)
    )
    fit(quiet(["rollout"], on_error="raise", class_names=["ä→"] * 5, **CHECKED), tmp_path)
    if kind in ("ascii", "cp1252"):
        lines = raw.getvalue().decode(kind).splitlines()
        assert lines[0].startswith("ViTExplainCallback watches")
        assert len(lines) > 3


def test_the_bar_is_shown_where_the_trainers_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: dict[str, tuple[int, int]] = {}

    class Noting(tqdm):  # type: ignore[misc]
        def close(self) -> None:
            done[self.desc] = (self.n, self.total)
            super().close()

    monkeypatch.setattr("vit_explain_callback.system.terminal.SECONDS", 0.0)
    monkeypatch.setattr("tqdm.tqdm", Noting)
    fit(quiet(["rollout"], **CHECKED), tmp_path)
    assert capsys.readouterr().err == ""
    assert done == {}
    fit(quiet(["rollout"], **CHECKED), tmp_path, enable_progress_bar=True)
    assert "explaining 16 images at step 0" in capsys.readouterr().err
    # One of the images, one of the nudged ones, ten for the method and for a random order each.
    assert done == {
        "ViTExplainCallback: explaining 16 images at step 0": (2, 2),
        "ViTExplainCallback: explaining 16 images at step 4": (22, 22),
        "ViTExplainCallback: explaining 16 images at step 8": (1, 1),
        "ViTExplainCallback: checking the maps at step 8": (11, 11),
    }


def test_nothing_is_shown_of_what_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vit_explain_callback.system.terminal.SECONDS", 600.0)
    fit(quiet(["rollout"], **CHECKED), tmp_path, enable_progress_bar=True)
    assert "ViTExplainCallback" not in capsys.readouterr().err


def test_a_run_that_ends_without_a_snapshot_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.register_forward_pre_hook(self.fail)

        def fail(self, net: torch.nn.Module, _args: Any) -> None:
            if not net.training:
                raise RuntimeError("broken")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(quiet(), tmp_path, Broken())
    (said,) = messages(caught)
    assert "`on_error='raise'`" in said
    assert "changed" not in capsys.readouterr().out


def test_animations_have_a_frame_for_each_snapshot(tmp_path: Path) -> None:
    trainer = fit(quiet(["rollout"], every_n_steps=2, num_shown=1, detail="full"), tmp_path)
    (event,) = events(trainer).Images("explain/overlay_animation/rollout/0")
    with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
        assert picture.format == "GIF"
        assert getattr(picture, "n_frames", 1) == 5
        assert picture.size == (event.width, event.height)


def test_final_values_are_the_last_ones(tmp_path: Path) -> None:
    board = events(fit(quiet(["rollout"], detail="full"), tmp_path))
    last = board.Scalars("explain/drift/baseline_rank_correlation/rollout")[-1]
    final = board.Scalars("explain/final/drift/rollout")[-1]
    assert (final.step, final.value) == (last.step, last.value)


def test_margin_charts_show_tags_that_exist(tmp_path: Path) -> None:
    board = events(fit(quiet(["rollout"], detail="full"), tmp_path))
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
            quiet(["rollout"], images=random_images(2, (96, 96)), every_n_steps=4, block_statistics=True),
            tmp_path,
            Classifier(vit, lr=0.0),
            train=loader(data),
        )
    (said,) = [message for message in messages(caught) if "artifact tokens" in message]
    assert "`rollout` maps" in said
    assert events(trainer).Scalars("explain/map/sink_lift/rollout")[0].value > 8


def test_every_scalar_of_a_short_run_is_a_number(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(detail="full"), tmp_path)
    board = events(trainer)
    for tag in board.Tags()["scalars"]:
        values = [event.value for event in board.Scalars(tag)]
        if not tag.startswith("explain/final") and "_split/" not in tag and "_scaled/" not in tag:
            assert all(math.isfinite(value) for value in values), tag


def test_files_are_those_the_page_reads(tmp_path: Path) -> None:
    trainer = fit(ViTExplainCallback(num_shown=2, class_names=["a", "b", "c", "d", "e"]), tmp_path)
    folder = Path(trainer.log_dir or "", "explanations")
    assert {path.name for path in folder.iterdir()} == {
        "probe.safetensors",
        "report.html",
        "run.txt",
        "summary.txt",
        *(f"step_{step:08d}.safetensors" for step in (0, 4, 8)),
    }
    assert isinstance(Snapshot.load(folder / "step_00000008.safetensors"), Snapshot)
