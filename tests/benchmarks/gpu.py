"""Check a GPU in one command within ten minutes: tests, kernels, time, memory, and both targets.

First the tests marked `cuda` run, for at most two fifths of the time. Then each configuration runs in a process of its
own: `cost` times the limits, rollout and gradient rollout in turn and takes their peak memory, and the profiler sees
each once more and says

- which attention kernel ran, by the operation that torch chose. The model keeps its own: if an explanation runs another
  than the plain pass that is its limit, the command fails. (On a CPU it may: there the package forms attention itself.)
- how long the GPU was busy: the sum of its kernels, beside the time without the profiler, which slows the CPU alone. A
  GPU that is idle for long waits for launches: there `torch.compile` or CUDA graphs can win, elsewhere they cannot.

A configuration is begun only if twice what the slowest took so far is left, and else is named as left out. The last
lines say of each configuration whether rollout takes at most 1.25 × a forward pass, and gradient rollout at most 1.25 ×
forward and backward; the exit code is 1 if a test failed, a kernel was another or nothing could be measured, and not if
a target is missed.

    python -m tests.benchmarks.gpu --output gpu.json
    python -m tests.benchmarks.gpu --device cpu         # tiny models, to see that the command works
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import cost
from tests.benchmarks.contenders import BACKWARD, CONTENDERS, FORWARD
from tests.benchmarks.cost import Configuration
from tests.benchmarks.measure import in_new_process, machine

ROOT = Path(__file__).parents[2]
TARGET = 1.25
COMPARED = {FORWARD: None, "rollout": FORWARD, BACKWARD: None, "grad_rollout": BACKWARD}
"""What is run, and the limit that it is to be near."""
ON_GPU = [
    Configuration(model, size, batch, dtype)
    for batch in (8, 32)
    for model, size in (("Ti16", 224), ("B16", 224), ("S14", 518))
    for dtype in ("float32", "bfloat16")
]
TINY = [Configuration("Ti16", 32, 1, dtype) for dtype in ("float32", "bfloat16")]
_ATTENTION = "aten::_scaled_dot_product_"


def kernels(names: Iterable[str]) -> dict[str, int]:
    """How often each kind of attention ran forward, among the names of operations.

    Example:
        >>> kernels(["aten::mm", *["aten::_scaled_dot_product_flash_attention"] * 2])
        {'flash_attention': 2}
    """
    found = [name.removeprefix(_ATTENTION) for name in names if name.startswith(_ATTENTION)]
    return dict(Counter(name for name in found if not name.endswith("_backward")))


def watched(run: Callable[[], object], device: str) -> dict[str, Any]:
    """Kernels of one call, the GPU's own names of those of attention, and the seconds that the GPU was busy."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    on_gpu = [event for event in seen.events() if event.device_type.name == "CUDA"]
    attending = {event.name for event in on_gpu if any(word in event.name for word in ("flash", "fmha", "sdpa"))}
    busy = sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6
    return {
        "kernels": kernels(event.name for event in seen.events() if event.device_type.name == "CPU"),
        "names": sorted(attending),
        "busy": busy or None,
    }


def examine(configuration: Configuration, rounds: int, device: str) -> dict[str, Any]:
    """Everything about one configuration, as it goes to the JSON file."""
    threads = torch.get_num_threads()
    refused = {name: reason for name in COMPARED if (reason := cost.refusal(configuration, name, device))}
    possible = [name for name in COMPARED if name not in refused]
    timed = cost.time_rounds(configuration, possible, rounds, threads, device, "wall")
    names = list(timed["rounds"][0])
    model, images = configuration.create(device), configuration.images(device)
    return {
        "name": configuration.name,
        "seconds": timed["rounds"],
        "skipped": refused | timed["failed"],
        "watched": {name: watched(partial(CONTENDERS[name].prepare(model), images), device) for name in names},
        "peak_bytes": {name: cost.memory_of(configuration, name, threads, device) for name in names},
    }


def other_kernels(result: Mapping[str, Any]) -> list[str]:
    """What ran another kernel than its limit did, in words."""
    ran = {name: set(seen["kernels"]) for name, seen in result["watched"].items()}
    return [
        f"{result['name']}: {name} ran {_listed(ran[name])}, but {limit} ran {_listed(ran[limit])}"
        for name, limit in COMPARED.items()
        if limit is not None and name in ran and limit in ran and ran[name] != ran[limit]
    ]


def report(result: Mapping[str, Any]) -> list[str]:
    """Kernels and idle time of one configuration, a line for each of what was run, and what was not."""
    lines = []
    for name, seen in result["watched"].items():
        ran = ", ".join(f"{count} × {kernel}" for kernel, count in seen["kernels"].items()) or "no fused attention"
        idle = _idle(result, name)
        said = "GPU's idle time not known" if idle is None else f"GPU idle for {idle:.0%}"
        lines.append(f"{result['name']}: {name}: {said}; {ran} {' '.join(seen['names'])[:200]}".rstrip())
    return lines + [f"{result['name']}: left out: {name} ({reason})" for name, reason in result["skipped"].items()]


def _idle(result: Mapping[str, Any], name: str) -> float | None:
    busy = result["watched"][name]["busy"]
    if busy is None:
        return None
    return float(max(0.0, 1 - busy / statistics.median(taken[name] for taken in result["seconds"])))


def targets(result: Mapping[str, Any]) -> list[str]:
    """Whether each target is met, in words."""
    lines = []
    for name, limit in COMPARED.items():
        if limit is None:
            continue
        if any(each not in result["seconds"][0] for each in (name, limit)):
            lines.append(f"{result['name']}: {name}: not measured")
            continue
        ratio = statistics.median(taken[name] / taken[limit] for taken in result["seconds"])
        word = "met" if ratio <= TARGET else "missed"
        lines.append(f"{result['name']}: {name}: {ratio:.2f} × {limit}, {word} (at most {TARGET})")
    return lines


def run_tests(seconds: float) -> bool:
    """Whether the tests marked `cuda` passed; they are stopped where the time does not suffice."""
    parallel = ["-n", "4"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/laws", *parallel]
    print(f"tests: {' '.join(command[1:])}", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"tests: stopped after {seconds:.0f} s, so that whether they pass is not known")
        return False
    print(f"tests: {'passed' if done.returncode == 0 else f'FAILED (pytest ended with {done.returncode})'}", flush=True)
    return done.returncode == 0


def measure(
    configurations: Sequence[Configuration], rounds: int, device: str, end: float, keep: Callable[[Any], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Results of the configurations that there is time for, and in words what there is not, or what failed."""
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    slowest = 0.0
    for configuration in configurations:
        begun = time.perf_counter()
        if end - begun < 2 * slowest:
            left_out.append(f"{configuration.name}: left out, as {max(0.0, end - begun):.0f} s were left")
            continue
        try:
            result = in_new_process(examine, configuration, rounds, device)
        except Exception as error:
            left_out.append(f"{configuration.name}: FAILED, {type(error).__name__}: {error}".splitlines()[0])
            continue
        slowest = max(slowest, time.perf_counter() - begun)
        found.append(result)
        keep(found)
        print("\n".join(report(result)), flush=True)
    return found, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=10, help="for everything")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file: machine, versions, every round")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"Expected a GPU that CUDA sees, but torch {torch.__version__} sees none. `--device cpu` tries the command."
        )
    end = time.perf_counter() + 60 * args.minutes
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of the other processes is silent
    about = machine(torch.get_num_threads()) | {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    print(json.dumps(about), flush=True)
    passed: bool | None = None
    if args.device == "cuda" and not args.no_tests:
        passed = run_tests(0.4 * 60 * args.minutes)
    else:
        print("tests: not run")

    def keep(found: Any) -> None:
        if args.output is not None:
            whole = {"machine": about, "tests passed": passed, "configurations": found}
            args.output.write_text(json.dumps(whole, indent=1), encoding="utf-8")

    configurations = ON_GPU if args.device == "cuda" else TINY
    found, left_out = measure(configurations, args.rounds, args.device, end, keep)
    wrong = [line for result in found for line in other_kernels(result)] if args.device == "cuda" else []
    if found:
        print(cost.table(found))
    print("\n".join([*left_out, *(f"ANOTHER KERNEL: {line}" for line in wrong)]))
    print("\n".join(line for result in found for line in targets(result)) or "NOTHING was measured")
    return int(bool(wrong) or passed is False or not found or any("FAILED" in line for line in left_out))


def _listed(kernels: Iterable[str]) -> str:
    return " and ".join(sorted(kernels)) or "no fused attention"


if __name__ == "__main__":
    sys.exit(main())
