"""What must come out of every situation: the probe, its maps by the oracle, and the same training as without."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tests import oracle
from tests.runs import events, fit, messages, quiet, saved
from tests.situations.situation import Situation
from vit_explain_callback import ViTExplainCallback

PATCH, BLOCKS = 8, 3
METHODS = ("rollout", "grad_rollout")
FAILED = re.compile("failed|cannot (write|conclude)")


@dataclass
class Run:
    trainer: pl.Trainer
    module: Any
    callback: Any
    said: list[str]


class Applied(nn.Module):
    """The part of a module behind the ViT's input, as the test knows it."""

    def __init__(self, module: nn.Module, situation: Situation) -> None:
        super().__init__()
        self.module = module
        self._logits = situation.logits

    def forward(self, fed: Tensor) -> Tensor:
        return self._logits(self.module, fed)


def check(situation: Situation, folder: Path) -> Run:
    """Run a situation without and with the callback; give back the run with it."""
    without = run(situation, folder / "without", None)
    make = quiet if situation.kind == "classes" else ViTExplainCallback  # of numbers, all that is written is read
    found = run(situation, folder / "with", make(**situation.callback))
    for name, value in without.module.state_dict().items():
        assert value.equal(found.module.state_dict()[name]), f"training changed {name}"
    check_said(situation, found)
    check_explanations(situation, found)
    return found


def run(situation: Situation, folder: Path, callback: ViTExplainCallback | None, **trainer: Any) -> Run:
    """One epoch with the options that a Trainer has by default."""
    module = built(situation)
    train = (situation.train or situation.validation)()
    options: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 2} | dict(situation.trainer) | trainer
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = fit(callback, folder, module, situation.validation(), train, **options)
    return Run(done, module, callback, messages(caught))


def built(situation: Situation) -> pl.LightningModule:
    torch.manual_seed(0)
    return situation.module()


def reference(situation: Situation, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The same module once more, with the weights it starts with, or with those of `state`."""
    module = built(situation)
    module.setup("fit")
    if state is not None:
        module.load_state_dict(state)
    if situation.dtype != torch.float32:
        module.to(situation.dtype).float()
    return Applied(module, situation)


def check_said(situation: Situation, found: Run) -> None:
    assert [text for text in found.said if FAILED.search(text)] == []
    if situation.says is not None:
        assert len([text for text in found.said if re.search(situation.says, text)]) == 1, found.said


def check_explanations(situation: Situation, found: Run) -> None:
    """The probe holds validation samples as the ViT gets them; first and last maps are those of the oracle."""
    assert saved(found.trainer), "no snapshot was taken"
    probe = found.callback.tracker.probe
    places = found_places(probe.images, situation.fed())
    assert len(places) == situation.images
    fed = torch.stack([situation.fed()[place] for place in places])
    check_labels(situation, places, probe.labels)
    snapshots = saved(found.trainer)
    assert snapshots[0].step == found.callback.tracker.history.baseline.step == situation.first_step
    assert snapshots[-1].step == found.trainer.global_step
    if situation.first_step == 0:
        check_maps(situation, snapshots[0], reference(situation), fed, places)
    check_maps(situation, snapshots[-1], reference(situation, found.module.state_dict()), fed, places)
    check_scalars(situation, found)


def found_places(images: Tensor, fed: Any) -> list[int]:
    """Which validation sample each probe image is; all of them different ones."""
    places = []
    for image in images:
        same_size = [index for index, one in enumerate(fed) if one.shape == image.shape]
        assert same_size, f"no validation sample reaches the ViT as {tuple(image.shape)}"
        distance = torch.stack([(fed[index].double() - image.double()).abs().max() for index in same_size])
        assert distance.min() < 1e-5, f"a probe image is no validation sample: {distance.min():.3g} from the nearest"
        places.append(same_size[int(distance.argmin())])
    assert len(set(places)) == len(places), "a sample is in the probe twice"
    return places


def check_labels(situation: Situation, places: list[int], labels: Tensor | None) -> None:
    if situation.labels is None:
        assert labels is None
    else:
        assert labels is not None
        assert labels.dtype == torch.int64
        assert labels.tolist() == [situation.labels[place] for place in places]


def check_maps(situation: Situation, snapshot: Any, model: nn.Module, fed: Tensor, places: list[int]) -> None:
    target = snapshot.target.tolist()
    if situation.kind == "classes" and situation.labels is not None:
        known = [situation.labels[place] for place in places]
        assert [was for was, label in zip(target, known, strict=True) if label >= 0] == [k for k in known if k >= 0]
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):  # the oracle asks for gradients of what is inside
            vars(module)["grad_checkpointing"] = False
    with torch.no_grad():
        assert snapshot.logits.shape == model.float().eval()(fed.float()).shape, (
            "other outputs than the loss is computed of"
        )
    matrices = oracle.matrices(model, fed, target)
    torch.testing.assert_close(
        snapshot.logits.double(), matrices.logits, rtol=situation.tolerance, atol=situation.tolerance
    )
    for method, expected in oracle_maps(situation, matrices, fed.shape[2:]).items():
        actual = snapshot.maps[method].double()
        error = ((actual - expected).norm() / expected.norm()).item()
        assert error < situation.tolerance, f"{method} of step {snapshot.step}: {error:.2g} from the oracle"


def oracle_maps(situation: Situation, matrices: oracle.Matrices, size: Any) -> dict[str, Tensor]:
    grid = [side // PATCH for side in size]
    tokens = matrices.attentions[0].shape[-1]
    first = tokens - grid[0] * grid[1]
    start = torch.zeros(tokens, dtype=torch.float64)
    rows = slice(0, 1) if situation.starts == "class" else slice(first, tokens)
    start[rows] = 1 / len(start[rows])
    maps: dict[str, Tensor] = {}
    for method in METHODS:
        each = []
        for image in range(len(matrices.logits)):
            blocks = [block[image] for block in matrices.attentions[:BLOCKS]]
            slopes = [block[image] for block in matrices.gradients[:BLOCKS]] if method == "grad_rollout" else None
            each.append(oracle.rollout(blocks, slopes, start)[first:].reshape(*grid))
        maps[method] = torch.stack(each)
    return maps


def check_scalars(situation: Situation, found: Run) -> None:
    """Accuracy where there are labels, nothing of classes where there are none."""
    board = events(found.trainer)
    tags = [tag for tag in board.Tags()["scalars"] if "accuracy" in tag]
    if situation.labels is None:
        assert tags == []
    else:
        labels, baseline = found.callback.tracker.probe.labels, found.callback.tracker.history.baseline
        hits = (baseline.logits.argmax(dim=1) == labels)[labels >= 0].double().mean().item()
        (tag,) = tags
        assert board.Scalars(tag)[0].value == pytest.approx(hits)
    if situation.kind == "numbers":
        texts = [path.read_text() for path in Path(found.trainer.log_dir or "").glob("explanations/*.txt")]
        assert texts
        assert [word for text in texts for word in ("class", "accuracy", "probability") if word in text] == []
        assert [tag for tag in board.Tags()["scalars"] if "probability" in tag or "prediction" in tag] == []
