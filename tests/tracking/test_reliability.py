"""What is measured of how far maps can be trusted: on which images, by whom, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_images, steady_vit, tiny_vit
from vit_explain_callback import MapFunction
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.errors import Guard
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.reliability import MOST_CHECKED, ReliabilityMeter
from vit_explain_callback.tracking.settings import RemovalOrAuto
from vit_explain_callback.tracking.snapshot import Reliability

IMAGES = 11


@dataclass(frozen=True)
class OneOf(Ranks):
    """One of several processes, of which the others say nothing."""

    def together(self, work: Callable[[], Any]) -> list[Any]:
        return [work()]


def explained(methods: Any = ("rollout", "grad_rollout"), vit: Any = None) -> tuple[Explainer, Tensor, Explanation]:
    explainer = Explainer(tiny_vit() if vit is None else vit, methods)
    images = random_images(IMAGES, (4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return explainer, images, explainer(images)


def checked(removal: RemovalOrAuto | None = "auto", ranks: Ranks | None = None, **options: Any) -> Reliability:
    explainer, images, explanation = explained(**options)
    return measured(ReliabilityMeter(1, removal, None, ranks or Ranks()), explainer, images, explanation)


def removal_of(checks: ReliabilityMeter) -> object:
    return checks.removal


def measured(
    checks: ReliabilityMeter,
    explainer: Explainer,
    images: Tensor,
    explanation: Explanation,
    baseline: Reliability | None = None,
    with_gains: bool = True,
) -> Reliability:
    found = checks.of(explainer, images, explanation, baseline, with_gains)
    assert found is not None
    return found


@pytest.mark.parametrize("count", [2, 3, 5])
def test_faithfulness_is_of_the_same_images_however_many_processes_share_them(count: int) -> None:
    whole, each = checked(), [checked(ranks=OneOf(rank, count)) for rank in range(count)]
    for name, gain in whole.gains.items():
        assert gain.isfinite().tolist() == [True] * MOST_CHECKED + [False] * (IMAGES - MOST_CHECKED)
        shares = [one.gains[name] for one in each]
        parts = [share[: len(share) - (IMAGES - MOST_CHECKED)] for share in shares]
        torch.testing.assert_close(torch.cat(parts), gain[:MOST_CHECKED])


def test_a_mirror_is_used_where_the_output_holds_in_it() -> None:
    assert checked(None, vit=steady_vit()).mirror
    explainer, images, _ = explained()
    alike = images[:1] + 0.1 * images  # nearer to one another than to their mirror images
    assert not measured(
        ReliabilityMeter(1, None, None, Ranks()), explainer, alike, explainer(alike), with_gains=False
    ).mirror
    explainer, images, explanation = explained(vit=steady_vit())
    for mirror in (True, False):
        baseline = Reliability({}, {}, mirror)
        later = measured(ReliabilityMeter(1, None, None, Ranks()), explainer, images, explanation, baseline)
        assert later.mirror is mirror, "as at the baseline"
        assert later.gains == {}


def test_the_control_is_measured_once_and_kept_by_a_run_that_goes_on() -> None:
    explainer, images, explanation = explained()
    first = ReliabilityMeter(1, "auto", None, Ranks())
    known = measured(first, explainer, images, explanation)
    assert first.removal == "tokens"
    assert first.passes(2, with_gains=True) == 1 + 20
    marked = Reliability(known.nudged, {**known.gains, "random": known.gains["random"] + 1}, known.mirror)
    cases: list[tuple[RemovalOrAuto, bool]] = [("auto", True), ("tokens", True), ("mean_colour", False)]
    for removal, kept in cases:
        checks = ReliabilityMeter(1, removal, None, Ranks())
        checks.resume("tokens", marked)
        assert checks.removal == ("tokens" if kept else "mean_colour")
        assert checks.passes(2, with_gains=True) == 1 + (20 if kept else 30)
        found = measured(checks, explainer, images, explanation, known).gains["random"]
        assert found.nan_to_num().equal(marked.gains["random"].nan_to_num()) is kept
    fresh = ReliabilityMeter(1, "auto", None, Ranks())
    fresh.resume(None, None)
    assert fresh.removal == "auto"


def test_cells_that_are_no_tokens_are_painted_over() -> None:
    def pixels(model: Any, images: Tensor, target: Tensor) -> Tensor:
        return images.abs().mean(dim=1)

    for methods in ([MapFunction("pixels", pixels)], ["rollout", MapFunction("pixels", pixels)]):
        painted, chosen = checked("mean_colour", methods=methods), checked("auto", methods=methods)
        for name, gain in painted.gains.items():
            torch.testing.assert_close(chosen.gains[name], gain, equal_nan=True)


def test_only_what_says_that_tokens_cannot_be_left_out_makes_them_painted_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Explainer, "logits_without", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        checked()


class Learnt(torch.nn.Module):
    """Blocks that add what they learnt of positions, at first nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_vit()
        self.positions = torch.zeros(17, 48)
        self.net.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] + self.positions[: args[0].shape[1]],))

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


def test_positions_that_blocks_learn_later_are_found(recwarn: pytest.WarningsRecorder) -> None:
    """From there on the gains, and the control's, are those of patches painted over."""
    model = Learnt()
    explainer, images, explanation = explained(vit=model)
    checks, painted = ReliabilityMeter(1, "auto", None, Ranks()), ReliabilityMeter(1, "mean_colour", None, Ranks())
    assert measured(checks, explainer, images, explanation)
    assert removal_of(checks) == "tokens"
    model.positions += torch.randn(17, 48)
    changed = explainer(images)
    for _ in range(2):
        found = measured(checks, explainer, images, changed)
        expected = measured(painted, explainer, images, changed)
        for name, gain in expected.gains.items():
            torch.testing.assert_close(found.gains[name], gain, equal_nan=True)
    assert removal_of(checks) == "mean_colour"
    (said,) = [str(each.message) for each in recwarn]
    assert "faithfulness is measured with patches painted over from here on" in said


def test_with_a_classifier_that_is_all_zero_nothing_is_settled() -> None:
    vit = tiny_vit()
    weight = vit.head.weight.detach().clone()
    torch.nn.init.zeros_(vit.head.weight)
    explainer, images, explanation = explained(vit=vit)
    checks = ReliabilityMeter(1, "auto", None, Ranks())
    first = measured(checks, explainer, images, explanation)
    assert first.gains["random"][:MOST_CHECKED].abs().max() < 1e-6
    assert removal_of(checks) == "auto"
    vit.head.weight.data.copy_(weight)
    found = measured(checks, explainer, images, explainer(images))
    assert removal_of(checks) == "tokens"
    for name, gain in checked("tokens").gains.items():
        torch.testing.assert_close(found.gains[name], gain, equal_nan=True)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_tokens_that_cannot_be_left_out_after_all(
    on_error: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise ValueError("the model fails without tokens")

    explainer, images, explanation = explained()
    expected = checked("mean_colour")
    monkeypatch.setattr(Explainer, "logits_without", broken)
    checks = ReliabilityMeter(1, "auto", None, Ranks(), Guard(on_error))
    if on_error == "raise":
        with pytest.raises(ValueError, match="the model fails without tokens"):
            measured(checks, explainer, images, explanation)
        return
    found = measured(checks, explainer, images, explanation)
    for name, gain in expected.gains.items():
        torch.testing.assert_close(found.gains[name], gain, equal_nan=True)
    (said,) = [str(each.message) for each in recwarn]
    assert "patches painted over from here on" in said
    assert "the model fails without tokens" in said


WHAT_FAILS: dict[str, tuple[dict[int, int], list[str], list[str]]] = {  # passes that do not, by step; what is known
    "noise": ({1: 1, 2: 1}, [], []),
    "the measure of tokens": ({1: 2, 2: 2}, ["rollout"], []),
    "faithfulness": ({1: 30, 2: 30}, ["rollout"], []),
    "once only": ({1: 30}, ["rollout"], ["random", "rollout"]),
    "at the baseline": ({0: 2}, ["rollout"], ["random", "rollout"]),
    "nothing": ({}, ["rollout"], ["random", "rollout"]),
}


@pytest.mark.parametrize("what", WHAT_FAILS)
def test_a_check_that_fails_takes_no_maps_with_it(what: str, recwarn: pytest.WarningsRecorder) -> None:
    """The maps of each snapshot are those of a run without checks; what failed is said once."""
    passes, nudged, gains = WHAT_FAILS[what]
    left = 999

    def forward(model: torch.nn.Module, images: Tensor) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("no more")
        return model(images)

    probe = Probe.of(random_images(2), torch.tensor([0, 1]))
    plain = ExplanationTracker(Explainer(tiny_vit(), ["rollout"], forward=forward), probe, checks=None)
    tracker = ExplanationTracker(Explainer(tiny_vit(), ["rollout"], forward=forward), probe, checks=1)
    for step in range(3):
        left = 999
        plain.observe(step)
        left = passes.get(step, 999)
        tracker.observe(step)
    snapshots = tracker.history.snapshots
    assert [each.step for each in snapshots] == [0, 1, 2]
    for one, other in zip(snapshots, plain.history.snapshots, strict=True):
        assert one.maps["rollout"].equal(other.maps["rollout"])
    known = snapshots[-1].reliability
    assert sorted(known.nudged if known else []) == nudged
    assert sorted(known.gains if known else []) == gains
    assert len(recwarn) == (what != "nothing")
    assert tracker.finish()
