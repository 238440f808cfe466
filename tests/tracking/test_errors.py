"""Warnings of a loop in which Lightning was never imported, and of one process of several."""

from __future__ import annotations

import subprocess
import textwrap
import warnings

import pytest
import torch

from tests.processes import python
from vit_explain_callback.tracking.errors import warn

LOOP = """
    import sys, torch
    from tests.models import random_images, tiny_vit
    from vit_explain_callback import Explainer, ExplanationTracker, Probe

    class Broken:
        def scalars(self, values, step): raise OSError("no room")
        def pictures(self, pictures, step): ...
        def finish(self, *what): ...

    model = tiny_vit()
    torch.nn.init.zeros_(model.head.weight)  # so that the maps are degenerate
    probe = Probe.of(random_images(2), torch.tensor([0, 1]))
    tracker = ExplanationTracker(Explainer(model, ["grad_rollout"]), probe, checks=None, writers=[Broken()])
    tracker.observe(0)
    tracker.load_state_dict({})
    assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
    print("went on")
"""
SAID = ["maps are degenerate", "cannot write to", "checkpoint's explanations cannot be read"]


def loop(**environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", textwrap.dedent(LOOP), environment=environment)


def test_a_loop_without_lightning_is_warned_and_goes_on() -> None:
    done = loop()
    assert done.stdout.strip() == "went on", done.stderr
    assert [words for words in SAID if words in done.stderr] == SAID
    assert done.stderr.count("UserWarning: ViTExplainCallback:") == len(SAID)


def test_other_processes_of_torchrun_say_nothing() -> None:
    done = loop(RANK="1")
    assert done.stdout.strip() == "went on", done.stderr
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_group_says_which_is_first(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(1 - rank))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("look")
    assert [(str(each.message), each.filename) for each in caught] == [("ViTExplainCallback: look", __file__)][rank:]
