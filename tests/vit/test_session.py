"""Sessions: the rows of the images that an adapter is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from tests.models import random_images, tiny_vit
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.tracking.distributed import Ranks, explain_together
from vit_explain_callback.vit.adapter import PlainAdapter

T = TypeVar("T")


@dataclass
class Recording(PlainAdapter):
    rows: list[range] = field(default_factory=list)

    def outputs(self, twin: nn.Module, images: Tensor, rows: range) -> object:
        assert len(rows) == len(images)
        self.rows.append(rows)
        return super().outputs(twin, images, rows)


class Alone(Ranks):
    """One of several processes, without the others."""

    def together(self, work: Callable[[], T]) -> list[T]:
        return [work()]


def test_the_adapter_is_told_the_rows_of_each_part() -> None:
    adapter = Recording(tiny_vit())
    explainer = Explainer(adapter, ["rollout"])
    explainer.starting_at(4).logits(random_images(5), batch_size=2)
    explainer.logits(random_images(2))
    assert adapter.rows == [range(4, 6), range(6, 8), range(8, 9), range(2)]


def test_the_share_of_a_process_starts_behind_those_before() -> None:
    adapter = Recording(tiny_vit())
    explain_together(Alone(1, 2), Explainer(adapter, ["rollout"]), random_images(5), None, None)
    assert adapter.rows[0] == range(3, 6)
