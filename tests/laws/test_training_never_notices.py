"""Training with the callback ends in the same bits as without it: weights, optimizer, losses and random streams.

On a GPU, where there is one, `python -m pytest -m cuda tests/laws/test_training_never_notices.py` runs the same there.
"""

from __future__ import annotations

import random
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.bits import differing
from tests.models import CLASSES, random_images, tiny_vit
from tests.processes import python
from tests.runs import QUIET
from vit_explain_callback import ViTExplainCallback


class Noisy(Dataset[Any]):
    """Random augmentation out of every global stream."""

    def __init__(self, noisy: bool) -> None:
        self.images = random_images(24, seed=7)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        noise = (torch.rand(1) + random.random() + np.random.rand()).float() if self.noisy else 0
        return self.images[index] + noise, index % CLASSES


class Model(pl.LightningModule):
    """A ViT with every kind of dropout, behind a head with batch norm; keeps its losses."""

    def __init__(
        self,
        dropout: bool = True,
        frozen: bool = False,
        checkpointing: bool = False,
        mixup: bool = False,
        compiled: str | None = None,
    ) -> None:
        super().__init__()
        rates: Any = {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.2} if dropout else {}
        self.vit = tiny_vit(**rates).train()
        self.head = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Dropout(0.3), nn.Linear(CLASSES, CLASSES))
        self.losses: list[float] = []
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES) if mixup else None
        if frozen:
            self.vit.requires_grad_(False)
            self.vit.blocks[0].eval()
        self.vit.set_grad_checkpointing(checkpointing)
        if compiled:
            self.vit.compile(backend=compiled)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.vit(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch if self.mixup is None else self.mixup(*batch)
        loss = nn.functional.cross_entropy(self(images), labels)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(1)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("validation_loss", loss)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Manual(Model):
    """Two optimizer steps a batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        for part in batch[0].chunk(2):
            optimizer.zero_grad()
            loss = self(part).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())
        return loss


@dataclass
class Configuration:
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    noisy: bool = True
    manual: bool = False
    callbacks: Callable[[], list[pl.Callback]] = list
    plugins: Callable[[str], list[Any]] = lambda device: []
    after: tuple[str, ...] = ()


CONFIGURATIONS = {
    "dropout, batch norm, random augmentation and shuffling": Configuration(),
    "two loader workers": Configuration(workers=2),
    "mixup and cutmix": Configuration(model={"mixup": True}),
    "accumulation and clipping": Configuration(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "manual optimisation": Configuration(manual=True),
    "bf16-mixed": Configuration(trainer={"precision": "bf16-mixed"}),
    "16-mixed": Configuration(
        plugins=lambda device: [MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))]
    ),
    "bf16-true": Configuration(trainer={"precision": "bf16-true"}),
    "gradient checkpointing": Configuration(model={"checkpointing": True}),
    "frozen backbone, partly in evaluation mode": Configuration(model={"frozen": True}),
    "torch.compile": Configuration(model={"compiled": "aot_eager"}),
    "stochastic weight averaging": Configuration(
        callbacks=lambda: [pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)]
    ),
    "exponential moving average": Configuration(callbacks=lambda: [pl.callbacks.EMAWeightAveraging(decay=0.9)]),
    "sanity check and validation within the epoch": Configuration(
        trainer={"num_sanity_val_steps": 2, "val_check_interval": 2}
    ),
    "overfit_batches": Configuration(trainer={"overfit_batches": 2}),
    "fast_dev_run": Configuration(trainer={"fast_dev_run": 3}),
    "validation and test after fit": Configuration(after=("validate", "test", "validate")),
    "deterministic algorithms": Configuration(trainer={"deterministic": True}),
    "no randomness at all": Configuration(model={"dropout": False}, noisy=False),
}


def outcome(
    configuration: Configuration, folder: Path, callbacks: list[pl.Callback], device: str = "cpu"
) -> dict[str, Any]:
    """Everything a run leaves behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module = Manual() if configuration.manual else Model(**configuration.model)
    data = Noisy(configuration.noisy)
    train, validation = (DataLoader(data, 6, shuffle=True, num_workers=configuration.workers) for _ in range(2))
    others = configuration.callbacks()
    options: dict[str, Any] = {"num_sanity_val_steps": 0} | configuration.trainer
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator=device,
        devices=1,
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*callbacks, *others],
        plugins=configuration.plugins(device),
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* module\\(s\\) in eval mode")
        warnings.filterwarnings("ignore", "Your `(val|test)_dataloader`'s sampler has shuffling")
        warnings.filterwarnings("ignore", "You requested to overfit but enabled")
        warnings.filterwarnings("ignore", "Swapping scheduler")
        warnings.filterwarnings("ignore", "ViTExplainCallback: .* degenerate")
        trainer.fit(module, train, validation)
        results = [getattr(trainer, stage)(module, validation, verbose=False) for stage in configuration.after]
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "grads": {name: parameter.grad for name, parameter in module.named_parameters()},
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "training": [child.training for child in module.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "averages": [getattr(callback, "_average_model", nn.Identity()).state_dict() for callback in others],
        "scaler": trainer.precision_plugin.state_dict(),
        "losses": module.losses,
        "logged": {name: value for name, value in trainer.logged_metrics.items() if "loss" in name},
        "results": results,
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "random on the GPU": torch.cuda.get_rng_state_all() if device == "cuda" else [],
        "step": trainer.global_step,
    }


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_the_callback_ends_in_the_same_bits(name: str, device: str, tmp_path: Path) -> None:
    configuration = CONFIGURATIONS[name]
    without = outcome(configuration, tmp_path, [], device)
    assert differing(without, outcome(configuration, tmp_path, [], device)) == []  # the run itself can be repeated
    for schedule in ({"every_n_steps": 1}, QUIET | {"every_n_epochs": 1}):
        options: dict[str, Any] = {"num_images": 4, "num_shown": 1, "on_error": "raise", **schedule}
        callback = ViTExplainCallback(["rollout_max_0.5", "grad_rollout"], **options)
        assert differing(without, outcome(configuration, tmp_path, [callback], device)) == []
        assert len(callback.state_dict()["snapshots"]) >= 2


OTHER_PACKAGE = """
    import sys
    import lightning.pytorch
    sys.modules["pytorch_lightning"] = lightning.pytorch
    from pathlib import Path
    from tests.bits import differing
    from tests.laws.test_training_never_notices import Configuration, ViTExplainCallback, outcome
    assert issubclass(ViTExplainCallback, lightning.pytorch.Callback)
    folder = Path(sys.argv[1])
    callback = ViTExplainCallback(every_n_steps=1, num_images=4, num_shown=1, on_error="raise")
    assert differing(outcome(Configuration(), folder, []), outcome(Configuration(), folder, [callback])) == []
    print(len(callback.state_dict()["snapshots"]), "snapshots, the same bits")
"""


def test_a_run_of_the_other_lightning_package_ends_in_the_same_bits(tmp_path: Path) -> None:
    done = python("-c", textwrap.dedent(OTHER_PACKAGE), str(tmp_path))
    assert "9 snapshots, the same bits" in done.stdout, done.stderr


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    def graphs(callbacks: list[pl.Callback]) -> int:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        outcome(CONFIGURATIONS["torch.compile"], tmp_path, callbacks)
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    assert graphs([]) == graphs([ViTExplainCallback(every_n_steps=1, num_images=4, num_shown=1, on_error="raise")]) > 0


class Careless(pl.Callback):
    """A snapshot as one would first write it."""

    def __init__(self, carelessness: str) -> None:
        self.carelessness = carelessness

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        images = random_images(2)
        if self.carelessness == "draws one random number":
            torch.rand(1)
        elif self.carelessness == "leaves the model in evaluation mode":
            pl_module.eval()
        elif self.carelessness == "updates batch norm":
            pl_module.vit.eval()
            with torch.no_grad():
                pl_module.head[0](pl_module.vit(images))
            pl_module.vit.train()
        elif self.carelessness == "leaves dropout on":
            with torch.no_grad():
                pl_module.vit(images)
        elif self.carelessness == "adds to the gradients":
            pl_module.eval()
            pl_module(images).sum().backward()
            pl_module.train()


@pytest.mark.parametrize(
    "carelessness",
    [
        "draws one random number",
        "leaves dropout on",
        "leaves the model in evaluation mode",
        "updates batch norm",
        "adds to the gradients",
    ],
)
def test_a_careless_snapshot_is_caught(carelessness: str, tmp_path: Path) -> None:
    configuration = Configuration(trainer={"accumulate_grad_batches": 2})
    without = outcome(configuration, tmp_path, [])
    assert differing(without, outcome(configuration, tmp_path, [Careless(carelessness)])) != []
