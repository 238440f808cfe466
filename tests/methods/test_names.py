"""The grammar of names: each leads back to its method, and what a method does not have is refused."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_explain_callback import Attention, AttentionFlow, AttentionRollout, Chefer, GradientRollout
from vit_explain_callback.methods import Method, method_from_name
from vit_explain_callback.methods.base import OPTIONS
from vit_explain_callback.methods.names import METHODS, resolve_methods

BLOCK = st.one_of(st.integers(1, 100), st.integers(-100, -1))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "head_fusion": st.sampled_from(["mean", "max", "min"]),
    "discard_ratio": st.one_of(st.sampled_from([0.0, 0.5, 1e-7]), st.floats(0, 1, exclude_max=True)),
    "start_block": BLOCK,
    "block": BLOCK,
    "head": st.one_of(st.none(), st.integers(1, 100)),
}


@st.composite
def methods(draw: st.DrawFn) -> Method:
    kind = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    options = {field.name: draw(VALUES[field.name]) for field in fields(kind)}
    if options.get("head") is not None:
        options["head_fusion"] = "mean"
    return kind(**options)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(one=methods(), other=methods())
def test_names_lead_back_to_the_method_and_differ_where_methods_do(one: Method, other: Method) -> None:
    assert method_from_name(one.name) == one
    assert (one.name == other.name) == (one == other)


def test_names_leave_out_defaults_and_have_one_order() -> None:
    assert [method().name for method in METHODS.values()] == list(METHODS)
    assert GradientRollout("min", 0.5, 3).name == "grad_rollout_min_0.5_from3"
    assert AttentionRollout("max", 0.9, -4).name == "rollout_max_0.9_from-4"
    assert AttentionRollout(discard_ratio=1e-7).name == "rollout_0.0000001"
    assert Attention(block=12, head=3).name == "attention_block12_head3"
    assert Attention("max", -2).name == "attention_max_block-2"
    assert Chefer(-1).name == "chefer_from-1"


def test_methods_of_different_kinds_differ() -> None:
    assert len({AttentionRollout(), GradientRollout(), AttentionFlow(), AttentionRollout()}) == 3


def test_one_name_is_one_method() -> None:
    assert resolve_methods("rollout") == (AttentionRollout(),)
    assert resolve_methods(["grad_rollout_0.9", AttentionRollout("max")]) == (
        GradientRollout(discard_ratio=0.9),
        AttentionRollout("max"),
    )


MISSPELT = (
    "|flows|rollout_|rollout_max_|rollout_0.5_max|rollout_from2_max|attention_head3_block2|grad|rollout_max_min|Rollout"
    "|chefer_from-|chefer_from2.5|attention_head-1|rollout max"
)


@pytest.mark.parametrize("name", MISSPELT.split("|"))
def test_misspelt_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `methods` to name .* but got {name!r}"):
        method_from_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rollout_median", "`head_fusion` to be one of"),
        ("rollout_1.5", r"`discard_ratio` in \[0, 1\), but got 1.5"),
        ("rollout_from0", "`start_block` of at least 1"),
        ("attention_block0", r"`block` of at least 1 .* or negative \(-1 is the last block\), but got 0"),
        ("attention_head0", "`head` of at least 1"),
        ("attention_max_head2", "either a `head_fusion` or one `head`"),
    ],
)
def test_options_outside_their_range_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from_name(name)


PARTS = {"head_fusion": "max", "discard_ratio": "0.5", "start_block": "from2", "block": "block2", "head": "head2"}


@pytest.mark.parametrize(("kind", "option"), list(itertools.product(METHODS, OPTIONS)))
def test_options_that_a_method_does_not_have_are_refused(kind: str, option: str) -> None:
    name = f"{kind}_{PARTS[option]}"
    if option in [field.name for field in fields(METHODS[kind])]:
        assert method_from_name(name).name == name
        return
    with pytest.raises(ValueError, match=rf"`{name}` to have options of {kind} \(.*\), but `{PARTS[option]}` is none"):
        method_from_name(name)
    with pytest.raises(TypeError, match=option):
        METHODS[kind](**{option: 2})
