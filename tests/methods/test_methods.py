"""Names and options of the methods."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.models import FAMILIES, random_images, tiny_vit
from vit_explain_callback import AttentionFlow, GradRollout, Rollout, explain
from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.fused_method import FusedMethod
from vit_explain_callback.methods.fusion import Fusion
from vit_explain_callback.methods.names import method_from_name, resolve_methods
from vit_explain_callback.vit.stack import find_stack

KINDS: list[type[FusedMethod]] = [Rollout, GradRollout, AttentionFlow]
EVERY: list[Method] = [
    kind(fusion, ratio, start)  # type: ignore[arg-type]
    for kind, fusion, ratio, start in itertools.product(KINDS, ("mean", "max", "min"), (0.0, 0.5, 0.95), (1, 12))
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


class Undefined(Method):
    """A method that says nothing of what it does with a block."""

    kind = "undefined"


class Unnamed(Method):
    """A method without a kind."""

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        return relevance


@dataclass(frozen=True)
class LastBlocks(Method):
    """Readout row of the mean attention, weighted by its gradient if asked, added up over the last `count` blocks."""

    count: int = 1
    of_class: bool = False

    kind = "last_blocks"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.count}{'_of_class' * self.of_class}"

    @property
    def fusion(self) -> Fusion:
        return Fusion("mean", weighted=self.of_class)

    def layers(self, blocks: int) -> range:
        return range(blocks - self.count + 1, blocks + 1)

    def start(self, readout: Tensor) -> Tensor:
        return torch.zeros_like(readout)

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        return relevance + torch.einsum("bi,bij->bj", block.readout, block.fused)


def test_a_method_of_ones_own_that_does_nothing_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Undefined.*step"):
        Undefined()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="Expected the method Unnamed to have a `kind`"):
        Unnamed()


@pytest.mark.parametrize("family", ["vit", "vit_gap"])
def test_a_method_of_ones_own_gives_its_own_maps_beside_others(family: str) -> None:
    kind = FAMILIES[family]
    model, images = kind.create(), random_images(2)
    found = oracle.matrices(model, images)
    methods = [Rollout(), LastBlocks(1), LastBlocks(2, of_class=True)]
    maps = explain(model, images, methods).maps
    assert list(maps) == ["rollout", "last_blocks_1", "last_blocks_2_of_class"]
    for image in range(2):
        plain = [oracle.fused_matrix(a[image], None, "mean") for a in found.attentions]
        both = zip(found.attentions, found.gradients, strict=True)
        weighted = [oracle.fused_matrix(a[image], g[image], "mean") for a, g in both]
        for name, expected in {
            "last_blocks_1": kind.start_row() @ plain[-1],
            "last_blocks_2_of_class": kind.start_row() @ (weighted[-1] + weighted[-2]),
        }.items():
            patches = expected[kind.prefix :].reshape(kind.grid)
            torch.testing.assert_close(maps[name][image].double(), patches, rtol=1e-4, atol=1e-6)
    assert maps["rollout"].equal(explain(model, images, ["rollout"]).maps["rollout"])


def test_the_tensors_of_a_block_are_let_go_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    references: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def seen_stack(*args: Any) -> Any:
        stack = find_stack(*args)
        references.extend(weakref.ref(tensor) for call in stack.calls for tensor in (call.output, call.value))
        return stack

    class Watching(Rollout):
        def step(self, relevance: Tensor, block: Block) -> Tensor:
            alive.append(sum(reference() is not None for reference in references))
            return super().step(relevance, block)

    monkeypatch.setattr("vit_explain_callback._explain_batch.find_stack", seen_stack)
    explain(tiny_vit(), random_images(2), [Watching(), "grad_rollout"])
    assert alive == [6, 4, 2]
