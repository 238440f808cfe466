"""Compare explanation methods on models fine-tuned for a few steps, to choose the defaults.

Two tasks: DINOv2 ViT-S/14 after 24 steps on real photographs, and the example's small ViT after 60 steps on shapes;
each at several seeds of head, data and noise. Gradients are of the logit of the label. By image, and never averaged
before it is saved:

- symmetric relevance gain (SRG) as the package computes it, patches painted in the mean colour, and tokens dropped;
- insertion and deletion areas of the target's logit (how: `method_values.faithfulness`);
- lift on the object's mask;
- drift measures between an image and the same image under a change that should not matter (mirror, noise, a shift
  within a patch), and between different images. Separation is d' = (mean of others - mean of changed) / the root of the
  mean of both variances, with the sign that makes more better;
- rank correlation with the map of ten times the logits; rank correlation between methods;
- whether the prediction holds under those changes.

Maps of both signs are ranked by their values with their sign, and what needs a distribution takes the positive part, as
everywhere in the package (`metrics.maps`). Intervals are 95 % by bootstrap: seeds are drawn, and images, the same ones
for every seed drawn, since each seed explains the same images.

The rule for the defaults, written before any number was known:

1. The headline measure of drift is the one whose d' is best over the default methods: the mean over the two of them and
   all tasks, all three changes together.
2. The default pair is one method without a class and one for a class. In each of the two kinds it is the most faithful
   (SRG, mean over both removals and all tasks) whose d' by the headline measure is not worse than the present
   default's: the interval of the paired difference is not wholly below 0.
3. Ties go to the present default, the simpler one: where the interval of the paired difference of SRG includes 0.

    VIT_EXPLAIN_WEIGHTS=dinov2_vits14.safetensors python -m tests.benchmarks.methods --stamps DIR --output methods.json
    python -m tests.benchmarks.methods --from methods.json     # the tables again

DIR holds train/CLASS/*.png, val/CLASS/*.png and masks/CLASS/*.png, a mask for each image of val. Without it, or without
the weights, shapes alone are measured. `--tasks` and `--seeds` measure a part; `--from` takes several files and joins
what they hold. All of it takes about 35 minutes of one core; with `--num-images 24`, 15.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import fine_tuned, method_tables
from tests.benchmarks.measure import machine
from tests.benchmarks.method_rule import CLASS_FREE, FOR_A_CLASS, decision
from tests.benchmarks.method_values import measured, progress

TASKS = ("shapes", "photographs")


def run(tasks: Sequence[str], seeds: Sequence[int], methods: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and save what is known after each task and seed."""
    make: dict[str, Callable[[int], fine_tuned.Task]] = {
        "shapes": partial(fine_tuned.made_up_shapes, count=args.num_images),
        "photographs": partial(fine_tuned.photographs, args.stamps, count=args.num_images),
    }
    found: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "runs": []}
    with progress(len(seeds) * len(tasks), len(methods)) as bar:
        for seed in seeds:
            for task in tasks:
                values = measured(make[task](seed), methods, seed, bar.update)
                found["runs"].append({"task": task, "seed": seed, **values})
                if args.output is not None:
                    args.output.write_text(json.dumps(_plain(found)), encoding="utf-8")
    return found


def _plain(value: Any) -> Any:
    """Numbers of six digits, and null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _possible(asked: Sequence[str], stamps: Path | None) -> list[str]:
    """The tasks for which there is data."""
    missing = [
        name
        for name, known in (("--stamps", stamps), ("VIT_EXPLAIN_WEIGHTS", os.environ.get("VIT_EXPLAIN_WEIGHTS")))
        if not known
    ]
    if "photographs" in asked and missing:
        print(f"Without {' and '.join(missing)}, shapes alone are measured, not photographs.", file=sys.stderr)
        return [task for task in asked if task != "photographs"]
    return list(asked)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, help="folder of photographs, as above")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, help="images of each task; default: all")
    parser.add_argument("--methods", nargs="+", default=[*CLASS_FREE, *FOR_A_CLASS])
    parser.add_argument("--output", type=Path, help="JSON file of the values by image and of the decision")
    parser.add_argument("--from", type=Path, nargs="+", dest="files", help="make tables of such files, measure nothing")
    args = parser.parse_args(arguments)
    if args.files:
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
        found = {"machine": parts[0]["machine"], "runs": [each for part in parts for each in part["runs"]]}
    else:
        found = run(_possible(args.tasks, args.stamps), args.seeds, args.methods, args)
    found["decision"] = decision(found["runs"])
    print("\n".join(method_tables.lines(found["runs"], found["decision"])))
    if args.output is not None:
        args.output.write_text(json.dumps(_plain(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
