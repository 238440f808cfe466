"""Measure the cost of an explanation, relative to its lower limit and to computing it without this package.

The limit of rollout is the model's forward pass without gradients; that of gradient rollout is forward and backward to
the input, with parameters that need no gradient. Without the package one switches fused attention off, keeps
every attention matrix and its gradient, and multiplies N × N matrices (`contenders.materialised_maps`).

In each configuration one process runs all contenders in turn, `--rounds` times, in another order each round; a ratio is
the median over rounds of the ratio within a round, with its 10th and 90th percentile. Peak memory is that of one run
in a process of its own; `measure.py` says how. Weights are random. What fails, or what memory does not suffice for, is
left out with the reason. On a machine that others use too, `--threads 1 --clock process` counts the process's own CPU
time instead.

    python -m tests.benchmarks.cost                     # about 10 minutes on two cores
    python -m tests.benchmarks.cost --full --output cost.json
    python -m tests.benchmarks.cost --only 'B16-224-*-float32' --rounds 9 --threads 2
    python -m tests.benchmarks.cost --scaling           # time and memory by number of tokens
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from tqdm import tqdm

from tests.benchmarks.contenders import BACKWARD, CONTENDERS, FORWARD
from tests.benchmarks.measure import Clock, in_new_process, machine, peak_bytes, seconds

PEERS = ("torchcam", "grad-cam", "captum")


@dataclass(frozen=True)
class Configuration:
    """A timm model on a batch of random images."""

    model: str
    size: int
    batch: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.size}-b{self.batch}-{self.dtype}"

    def create(self, device: str) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            model = timm.create_model(MODELS[self.model], pretrained=False, img_size=self.size, num_classes=1000)
        return model.eval().requires_grad_(False).to(device, getattr(torch, self.dtype))

    def images(self, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        return images.to(device, getattr(torch, self.dtype))


MODELS = {
    "Ti16": "vit_tiny_patch16_224",
    "S16": "vit_small_patch16_224",
    "B16": "vit_base_patch16_224",
    "S14": "vit_small_patch14_dinov2",
    "B14": "vit_base_patch14_dinov2",
}
DEFAULT = [
    Configuration("Ti16", 224, 8),
    Configuration("B16", 224, 8),
    Configuration("S14", 518, 2),
]
FULL = [
    *(
        Configuration(model, size, batch, dtype)
        for dtype in ("float32", "bfloat16")
        for model, size in (("Ti16", 224), ("S16", 224), ("B16", 224), ("S14", 518), ("B14", 518))
        for batch in (1, 8, 32)
    ),
    Configuration("S14", 518, 2),
    Configuration("S14", 1022, 1),
]
SCALING = [Configuration("S14", size, 1) for size in (224, 336, 518, 714, 1022)]
SCALED = (FORWARD, BACKWARD, "rollout", "grad_rollout")


def refusal(configuration: Configuration, contender: str, device: str) -> str | None:
    """Why a contender is skipped: it would need more memory than the machine has."""
    model = configuration.create("meta")
    block, tokens, layers = model.blocks[0], model.patch_embed.num_patches + model.num_prefix_tokens, len(model.blocks)
    bytes_each = 2 if configuration.dtype == "bfloat16" else 4
    matrices = CONTENDERS[contender].matrices * block.attn.num_heads * tokens**2
    activations = 0 if CONTENDERS[contender].limit == FORWARD else 16 * tokens * model.embed_dim
    needed = configuration.batch * layers * (matrices + activations) * bytes_each
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return f"needs about {needed / 2**30:.0f} GiB of {free / 2**30:.0f}" if needed > 0.9 * free else None


def time_rounds(
    configuration: Configuration, contenders: Sequence[str], rounds: int, threads: int, device: str, clock: Clock
) -> dict[str, Any]:
    """Seconds of each contender in each round, and why others could not be run."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model, images = configuration.create(device), configuration.images(device)
    runs: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name in contenders:
        try:
            run = partial(CONTENDERS[name].prepare(model), images)
            run()
            runs[name] = run
        except Exception as error:  # a peer may fail in any way
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    order = list(runs)
    found = []
    for index in range(rounds):
        random.Random(index).shuffle(order)
        taken = {name: seconds(runs[name], device, clock) for name in order}
        found.append({name: taken[name] for name in runs})
    return {"rounds": found, "failed": failed}


def memory_of(configuration: Configuration, contender: str, threads: int, device: str) -> int:
    """Peak bytes of one run, after one on a single image."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    images = configuration.images(device)
    run = CONTENDERS[contender].prepare(configuration.create(device))
    run(images[:1])
    return peak_bytes(lambda: run(images), device)


def measure(
    configuration: Configuration, contenders: Iterable[str], rounds: int, threads: int, device: str, clock: Clock
) -> dict[str, Any]:
    """Everything about one configuration, as it goes to the JSON file."""
    wanted = list(contenders)
    reasons = {name: refusal(configuration, name, device) for name in wanted}
    possible = [name for name in wanted if reasons[name] is None]
    timed = in_new_process(time_rounds, configuration, possible, rounds, threads, device, clock)
    skipped = {name: reason for name, reason in reasons.items() if reason} | timed["failed"]
    memory: dict[str, int] = {}
    for name in timed["rounds"][0]:
        try:
            memory[name] = in_new_process(memory_of, configuration, name, threads, device)
        except BrokenProcessPool:
            skipped[name] = "its process was killed, perhaps for want of memory"
    return {
        "name": configuration.name,
        "seconds": timed["rounds"],
        "peak_bytes": memory,
        "skipped": skipped,
    }


def ratio(rounds: Sequence[Mapping[str, float]], name: str, reference: str | None) -> str:
    """Median over rounds of seconds over seconds, and p10 to p90."""
    if reference is None or any(key not in rounds[0] for key in (name, reference)):
        return ""
    values = [taken[name] / taken[reference] for taken in rounds]
    low, high = np.quantile(values, [0.1, 0.9])
    return f"{statistics.median(values):.2f} ({low:.2f}–{high:.2f})"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a row for each contender in each configuration."""
    rows = [["configuration", "contender", "seconds", "× limit", "× ours", "peak MB", "× limit", "× ours"]]
    for result in found:
        rounds, memory = result["seconds"], result["peak_bytes"]
        for name in rounds[0]:
            contender = CONTENDERS[name]
            median = statistics.median(taken[name] for taken in rounds)
            rows.append(
                [
                    result["name"],
                    name,
                    f"{median:.3g}",
                    ratio(rounds, name, contender.limit),
                    ratio(rounds, name, contender.ours),
                    f"{memory[name] / 1e6:.0f}" if name in memory else "",
                    _quotient(memory, name, contender.limit),
                    _quotient(memory, name, contender.ours),
                ]
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def _quotient(memory: Mapping[str, int], name: str, reference: str | None) -> str:
    if reference is None or name not in memory or not memory.get(reference):
        return ""  # also where nothing was needed that had not been there before
    return f"{memory[name] / memory[reference]:.2f}"


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """p of the power law N^p that fits best in logarithms.

    Example:
        >>> round(exponent([10, 20, 40], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def scaling(found: Sequence[Mapping[str, Any]]) -> str:
    """Exponents of time and memory over the number of tokens, over all sizes and over the largest three."""
    tokens = [(configuration.size // 14) ** 2 + 1 for configuration in SCALING[: len(found)]]
    lines = [f"exponent over N = {', '.join(map(str, tokens))} (over the last three)"]
    for name in SCALED:
        times = [statistics.median(taken[name] for taken in result["seconds"]) for result in found]
        memory = [float(result["peak_bytes"][name]) for result in found]
        parts = [
            f"{what} N^{exponent(tokens, values):.2f} (N^{exponent(tokens[-3:], values[-3:]):.2f})"
            for what, values in (("time", times), ("memory", memory))
        ]
        lines.append(f"{name:24s} {', '.join(parts)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--full", action="store_true", help=f"all {len(FULL)} configurations")
    choice.add_argument("--scaling", action="store_true", help="one model over image sizes, and the fitted exponents")
    parser.add_argument("--only", default="*", help="configurations whose name matches, of all with --full")
    parser.add_argument("--contenders", default="*", help="contenders whose name matches; the limits always run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file: machine, versions, every round")
    args = parser.parse_args(arguments)
    configurations = SCALING if args.scaling else FULL if args.full or args.only != "*" else DEFAULT
    configurations = [one for one in configurations if fnmatch(one.name, args.only)]
    contenders = [
        name
        for name, contender in CONTENDERS.items()
        if name == contender.limit or (name in SCALED if args.scaling else fnmatch(name, args.contenders))
    ]
    about = machine(args.threads, ("torch", "timm", "numpy", *PEERS))
    print(json.dumps(about))
    found = []
    for configuration in tqdm(configurations, unit="configuration"):
        result = measure(configuration, contenders, args.rounds, args.threads, args.device, args.clock)
        found.append(result)
        tqdm.write(table([result]))
        for name, reason in result["skipped"].items():
            tqdm.write(f"left out of {result['name']}: {name} ({reason})")
        if args.output is not None:
            args.output.write_text(json.dumps({"machine": about, "configurations": found}, indent=1), encoding="utf-8")
    if len(found) > 1:
        print(table(found))
    if args.scaling and len(found) > 2:
        print(scaling(found))


if __name__ == "__main__":
    main()
