"""One process of a run of several, started by `test_many_processes.py`; writes what it saw to a file of its own."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.runs import Classifier, fit, loader, messages
from vit_explain_callback import ViTExplainCallback

EXPLAINED: list[int] = []
"""Images in each forward pass in evaluation mode; a list that a twin does not copy."""


def counting(net: nn.Module) -> None:
    """Count the images of every forward pass of a model and of its twins."""

    class Counting(type(net)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not self.training:
                EXPLAINED.append(len(args[0]))
            return super().forward(*args, **kwargs)

    net.__class__ = Counting


class Faulty(Classifier):
    """Under explanation, one process only fails at step 2, and is short of memory at step 3."""

    def __init__(self) -> None:
        super().__init__()
        self.net.register_forward_pre_hook(self.fail)

    def fail(self, net: nn.Module, args: tuple[Tensor]) -> None:
        if not net.training and torch.distributed.get_rank() == 1:
            if self.global_step == 2:
                raise RuntimeError("this process cannot")
            if self.global_step == 3 and len(args[0]) > 2:
                raise torch.OutOfMemoryError("out of memory")


class Talking(Classifier):
    """Each forward pass waits for all processes, and takes as many images on each."""

    def forward(self, images: Tensor) -> Any:
        count = torch.ones(())
        torch.distributed.all_reduce(count)
        logits = super().forward(images)
        each = [torch.empty_like(logits) for _ in range(int(count))]
        torch.distributed.all_gather(each, logits.detach())
        return logits + each[torch.distributed.get_rank()] - logits.detach()


class Sharded(Classifier):
    """Parameters sharded by FSDP2."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class FSDPOnCPU(FSDPStrategy):
    """Lightning and FSDP ask for a GPU where nothing but names needs one."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class CountingDDP(DDPStrategy):
    """Keeps the size of every gradient bucket that is reduced."""

    def __init__(self, reductions: list[int]) -> None:
        super().__init__(process_group_backend="gloo")
        self.reductions = reductions

    def configure_ddp(self) -> None:
        super().configure_ddp()

        def reduce(bucket: Any) -> Any:
            self.reductions.append(bucket.buffer().numel())
            return allreduce_hook(torch.distributed.GroupMember.WORLD, bucket)  # type: ignore[arg-type]

        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, lambda _, bucket: reduce(bucket))


def strategy(name: str, reductions: list[int]) -> Strategy:
    if name == "ddp":
        return CountingDDP(reductions)
    if name == "fsdp":
        return FSDPOnCPU(process_group_backend="gloo", auto_wrap_policy={type(Classifier().net.blocks[0])})
    return ModelParallelStrategy(
        data_parallel_size=1 if name == "tensor_parallel" else 2,
        tensor_parallel_size=2 if name == "tensor_parallel" else 1,
        process_group_backend="gloo",
    )


def run(arguments: argparse.Namespace, callback: ViTExplainCallback | None) -> dict[str, Any]:
    """What this process sees of a run with or without the callback."""
    module = Sharded() if arguments.strategy in ("fsdp2", "tensor_parallel") else Classifier()
    if arguments.faulty:
        module = Faulty()
    if arguments.talking:
        module = Talking()
    EXPLAINED.clear()
    counting(module.net)
    reductions: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            callback,
            arguments.output,
            module,
            train=loader(batch_size=4 // arguments.devices),
            max_epochs=1,
            devices=arguments.devices,
            strategy=strategy(arguments.strategy, reductions),
        )
    return {
        "rank": trainer.global_rank,
        "said": messages(caught),
        "weights": {name: _whole(value).clone() for name, value in module.state_dict().items()},
        "explained": list(EXPLAINED),
        "reductions": reductions,
        "snapshots": callback.state_dict()["snapshots"] if callback else [],
        "probe": _probe(callback),
        "metrics": {tag: value for tag, value in trainer.callback_metrics.items() if "drift" in tag},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--faulty", action="store_true")
    parser.add_argument("--talking", action="store_true")
    parser.add_argument("--num-images", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_error: Any = "warn" if arguments.faulty else "raise"
    callback = ViTExplainCallback(every_n_steps=1, num_images=arguments.num_images, num_shown=1, on_error=on_error)
    seen = {"with": run(arguments, callback), "without": run(arguments, None)}
    torch.save(seen, arguments.output / f"rank_{seen['with']['rank']}.pt")


def _probe(callback: ViTExplainCallback | None) -> list[Tensor]:
    if callback is None or callback.tracker is None:
        return []
    images, labels = callback.tracker.probe.images, callback.tracker.probe.labels
    assert images is not None
    assert labels is not None
    return [images, labels]


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


if __name__ == "__main__":
    main()
