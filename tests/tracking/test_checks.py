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
from vit_explain_callback.tracking.checks import MOST_CHECKED, Checks, RemovalOrAuto
from vit_explain_callback.tracking.distributed import Ranks
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
    return Checks(1, removal, None, ranks or Ranks()).of(explainer, images, explanation, None, with_gains=True)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_faithfulness_is_of_the_same_images_however_many_processes_share_them(count: int) -> None:
    whole = checked()
    for name, gain in whole.gains.items():
        assert gain.isfinite().tolist() == [True] * MOST_CHECKED + [False] * (IMAGES - MOST_CHECKED)
        shares = [checked(ranks=OneOf(rank, count)).gains[name] for rank in range(count)]
        parts = [share[: len(share) - (IMAGES - MOST_CHECKED)] for share in shares]
        torch.testing.assert_close(torch.cat(parts), gain[:MOST_CHECKED])


def test_a_mirror_is_used_where_the_output_holds_in_it() -> None:
    assert checked(None, vit=steady_vit()).mirror
    explainer, images, _ = explained()
    alike = images[:1] + 0.1 * images  # nearer to one another than to their mirror images
    assert not Checks(1, None, None, Ranks()).of(explainer, alike, explainer(alike), None, with_gains=False).mirror
    explainer, images, explanation = explained(vit=steady_vit())
    for mirror in (True, False):
        baseline = Reliability({}, {}, mirror)
        later = Checks(1, None, None, Ranks()).of(explainer, images, explanation, baseline, with_gains=True)
        assert later.mirror is mirror, "as at the baseline"
        assert later.gains == {}


def test_the_control_is_measured_once_and_kept_by_a_run_that_goes_on() -> None:
    explainer, images, explanation = explained()
    first = Checks(1, "auto", None, Ranks())
    known = first.of(explainer, images, explanation, None, with_gains=True)
    assert first.removal == "tokens"
    assert first.passes(2, with_gains=True) == 1 + 20
    marked = Reliability(known.nudged, {**known.gains, "random": known.gains["random"] + 1}, known.mirror)
    cases: list[tuple[RemovalOrAuto, bool]] = [("auto", True), ("tokens", True), ("mean_colour", False)]
    for removal, kept in cases:
        checks = Checks(1, removal, None, Ranks())
        checks.go_on("tokens", marked)
        assert checks.removal == ("tokens" if kept else "mean_colour")
        assert checks.passes(2, with_gains=True) == 1 + (20 if kept else 30)
        found = checks.of(explainer, images, explanation, known, with_gains=True).gains["random"]
        assert found.nan_to_num().equal(marked.gains["random"].nan_to_num()) is kept
    fresh = Checks(1, "auto", None, Ranks())
    fresh.go_on(None, None)
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
