"""What is remembered of a model is checked against what the model is now: a run that changes it is explained anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tests.models import CLASSES, random_images, randomised, tiny_vit
from tests.runs import Classifier, fit, quiet, saved
from vit_explain_callback import explain
from vit_explain_callback.explainer import Explainer

IMAGES, METHODS = random_images(2), ["rollout", "grad_rollout"]


class Headless(pl.LightningModule):
    """Has no `forward`: the ViT alone makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_vit()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


def average(module: Any) -> None:
    """Read the mean of the patches instead of the class token."""
    module.net.reset_classifier(CLASSES, "avg")
    randomised(module.net.head, 5)


def another(module: Any) -> None:
    """Take another ViT."""
    module.net = tiny_vit("vit_tiny_patch16_224", 9, global_pool="avg")


@pytest.mark.parametrize("change", [average, another])
def test_a_model_that_changes_between_two_explanations(change: Callable[[Any], None]) -> None:
    module = Classifier().eval()
    explainer = Explainer(module, METHODS)
    explainer(IMAGES)
    before = explainer(IMAGES)
    change(module)
    module.eval()
    found, expected = explainer(IMAGES), explain(module, IMAGES, METHODS)
    for name, maps in expected.maps.items():
        assert found.maps[name].equal(maps)
        assert (maps - before.maps[name]).abs().max() > 0.1 * maps.max()


@pytest.mark.parametrize("kind", [Classifier, Headless])
@pytest.mark.parametrize("change", [average, another])
def test_a_model_that_changes_in_a_run(tmp_path: Path, change: Callable[[Any], None], kind: Any) -> None:
    class Changes(kind):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 2:
                change(self)
                self.net.train()

    callback = quiet(METHODS, every_n_steps=4, num_images=2, images=(IMAGES, torch.tensor([0, 1])))
    module = Changes()
    trainer = fit(callback, tmp_path, module, max_epochs=1)
    last = saved(trainer)[-1]
    expected = explain(module.net.eval(), IMAGES, METHODS, target=torch.tensor([0, 1]))
    for name, maps in expected.maps.items():
        torch.testing.assert_close(last.maps[name], maps)


@pytest.mark.parametrize("stated", [{"grid_size": (3, 3)}, {"grid_size": (2, 8)}, {"prefix_tokens": 8}])
def test_a_grid_that_the_model_does_not_have_is_refused(tmp_path: Path, stated: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="grid_size"):
        explain(tiny_vit(), IMAGES, **stated)
    with pytest.raises(ValueError, match="grid_size"):
        fit(quiet(**stated), tmp_path)
    assert explain(tiny_vit(), IMAGES, grid_size=(4, 4), prefix_tokens=1).maps["rollout"].shape == (2, 4, 4)
