"""One process of several that explain a model whose forward waits for all others; started by `test_in_step.py`."""

from __future__ import annotations

import argparse
import datetime
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.distributed import all_gather, all_reduce  # bound before anything could be put in their place

from tests.models import CLASSES, random_images, tiny_vit
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.probe import Probe

PASSES: list[int] = []
"""Images in each forward pass; a list that a twin does not copy."""
STEP = [0]
BEFORE = [0]
"""Passes before this step."""
WAITS = datetime.timedelta(seconds=60)


def reduced(logits: Tensor) -> Tensor:
    """The same logits, scaled by the number of processes there and back."""
    count = torch.ones(())
    all_reduce(count)
    return logits / count * torch.distributed.get_world_size()


def gathered(logits: Tensor) -> Tensor:
    """The same logits, from among those of all processes, which must be of one size."""
    each = [torch.empty_like(logits) for _ in range(torch.distributed.get_world_size())]
    all_gather(each, logits.detach().contiguous())
    return logits + each[torch.distributed.get_rank()] - logits.detach()


def with_gradients(logits: Tensor) -> Tensor:
    """The same logits, through a collective that has another in the backward pass."""
    each = torch.distributed.nn.functional.all_gather(logits.contiguous())
    return torch.as_tensor(each[torch.distributed.get_rank()])


def functional(logits: Tensor) -> Tensor:
    """The same logits, scaled there and back by a functional collective."""
    count = collectives.all_reduce(torch.ones(1), "sum", list(range(torch.distributed.get_world_size())))
    return logits / count * torch.distributed.get_world_size()


def objects(logits: Tensor) -> Tensor:
    each: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(each, len(logits))
    assert set(each) == {len(logits)}
    torch.distributed.barrier()
    return logits


def swallowed(logits: Tensor) -> Tensor:
    try:
        return reduced(logits)
    except BaseException:
        return logits


ALL = (reduced, gathered, with_gradients, functional, objects, swallowed)
COLLECTIVES = {each.__name__: each for each in ALL}


class Talking(nn.Module):
    """Its forward waits for all processes before the model and after it, and may fail in between."""

    def __init__(self, collective: str, fault: str) -> None:
        super().__init__()
        self.net, self.collective, self.fault = tiny_vit(), collective, fault

    def forward(self, images: Tensor) -> Tensor:
        PASSES.append(len(images))
        if self.collective:
            reduced(images.new_ones(1))
        if STEP[0] == 1 and (not self.collective or torch.distributed.get_rank() == 1):
            self.fail(images)
        logits: Tensor = self.net(images)
        return COLLECTIVES[self.collective](logits) if self.collective else logits

    def fail(self, images: Tensor) -> None:
        if self.fault == "raises":
            raise KeyError("this process cannot")
        if self.fault == "unsendable":
            raise Unsendable("this process", "cannot")
        if self.fault == "once more":
            reduced(images.new_ones(1))
        if self.fault == "no memory" or (self.fault == "memory" and len(images) > 1):
            raise torch.OutOfMemoryError("out of memory")
        if self.fault == "in a check" and len(PASSES) - BEFORE[0] > 20:
            raise KeyError("this process cannot")


class Unsendable(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")  # which gives one argument to what it is made of again


def run(model: Any, count: int, ranks: Ranks, batch_size: int | None, steps: int = 3) -> dict[str, Any]:
    """What is known after snapshots of a model that changes, of which the one at step 1 may fail."""
    PASSES.clear()
    probe = Probe.of(random_images(count), torch.arange(count) % CLASSES)
    explainer = Explainer(model, ["rollout", "grad_rollout"])
    options: dict[str, Any] = {"checks": 1, "batch_size": batch_size, "target": probe.labels}
    tracker = ExplanationTracker(explainer, probe, ranks=ranks, **options)
    found: dict[str, Any] = {"values": {}, "errors": {}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for STEP[0] in range(steps):
            BEFORE[0] = len(PASSES)
            try:
                found["values"][STEP[0]] = tracker.observe(STEP[0])
            except Exception as error:
                if not model.fault:
                    raise
                found["errors"][STEP[0]] = repr(error)
            with torch.no_grad():
                model.net.blocks[1].attn.qkv.weight.mul_(0.9)
        found["summary"] = tracker.finish()
    found["said"] = [str(each.message) for each in caught if "ViTExplainCallback" in str(each.message)]
    found["snapshots"] = [snapshot.state_dict() for snapshot in tracker.history.snapshots]
    return {**found, "passes": list(PASSES)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--collective", default="reduced")
    parser.add_argument("--fault", default="")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = f"file://{arguments.folder}/meeting"
    about: dict[str, Any] = {"rank": arguments.rank, "world_size": arguments.count, "timeout": WAITS}
    torch.distributed.init_process_group("gloo", init_method=where, **about)
    model = Talking(arguments.collective, arguments.fault)
    found = run(model, arguments.images, Ranks(arguments.rank, arguments.count), arguments.batch_size)
    # What training sends afterwards arrives where it should.
    total = torch.tensor(float(arguments.rank))
    all_reduce(total)
    found["total"] = total
    torch.save(found, arguments.folder / f"{arguments.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
