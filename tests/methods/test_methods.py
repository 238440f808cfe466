"""Names and options of the methods."""

from __future__ import annotations

import itertools

import pytest

from vit_explain_callback import AttentionFlow, GradRollout, Rollout
from vit_explain_callback.methods.base import Method, method_from_name, resolve_methods

EVERY: list[Method] = [
    kind(fusion, ratio, start)  # type: ignore[arg-type]
    for kind, fusion, ratio, start in itertools.product(
        (Rollout, GradRollout, AttentionFlow), ("mean", "max", "min"), (0.0, 0.5, 0.95), (1, 12)
    )
]


def test_names_are_unique_and_lead_back_to_the_method() -> None:
    assert len({method.name for method in EVERY}) == len(EVERY)
    for method in EVERY:
        assert method_from_name(method.name) == method


def test_names_leave_out_defaults() -> None:
    assert Rollout().name == "rollout"
    assert GradRollout("min", 0.5, 3).name == "grad_rollout_min_0.5_from3"


def test_methods_of_different_kinds_differ() -> None:
    assert len({Rollout(), GradRollout(), AttentionFlow(), Rollout()}) == 3


def test_one_name_is_one_method() -> None:
    assert resolve_methods("rollout") == (Rollout(),)
    assert resolve_methods(["grad_rollout_0.9", Rollout("max")]) == (GradRollout(discard_ratio=0.9), Rollout("max"))


@pytest.mark.parametrize("name", ["", "flows", "rollout_", "rollout_max_", "rollout_0.5_max"])
def test_misspelt_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Expected `methods` to name"):
        method_from_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rollout_median", "`head_fusion` to be one of"),
        ("rollout_1.5", r"`discard_ratio` in \[0, 1\), but got 1.5"),
        ("rollout_from0", "`start_layer` of at least 1"),
    ],
)
def test_options_outside_their_range_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from_name(name)
