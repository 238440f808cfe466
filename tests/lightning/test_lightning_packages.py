"""Both packages that Lightning is published as, and its command line, each in a process of its own."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.processes import python
from vit_explain_callback import load_run

PROGRAM = """
    import torch, timm
    import {package} as pl
    from torch.utils.data import DataLoader, TensorDataset
    from vit_explain_callback import ViTExplainCallback

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.vit(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4) % 3), 2)

        val_dataloader = train_dataloader
"""
RUN = """
    assert issubclass(ViTExplainCallback, pl.Callback), ViTExplainCallback.__mro__
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[ViTExplainCallback(on_error="raise")],
                         default_root_dir=".", enable_progress_bar=False)
    trainer.fit(Model(), datamodule=Data())
"""
CLI = """
    from {package}.cli import LightningCLI
    if __name__ == "__main__":
        LightningCLI(Model, Data)
"""
CONFIG = """
    trainer:
      accelerator: cpu
      max_epochs: 1
      default_root_dir: .
      enable_progress_bar: false
      callbacks:
        - class_path: vit_explain_callback.ViTExplainCallback
          init_args:
            methods: [rollout, grad_rollout_max_0.9]
            every_n_steps: 1
            checks: {every_n_snapshots: 2, removal: tokens}
            detail: {block_statistics: false, margin_charts: false}
            num_images: 2
            num_shown: 1
            target: 1
            class_names: [ant, bee, cat]
            normalisation: [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
            batch_size: 1
            save_maps: true
            on_error: raise
"""
FUNCTIONS = """
    import torch

    def saliency(model, images, target):
        images.requires_grad_()
        logits = model(images).gather(1, target[:, None])
        return torch.autograd.grad(logits.sum(), images)[0].abs().amax(dim=1)

    def total(maps, reference):
        return (maps - reference).abs().sum(dim=(1, 2))
"""
OWN = """
    trainer:
      accelerator: cpu
      max_epochs: 1
      default_root_dir: .
      enable_progress_bar: false
      callbacks:
        - class_path: vit_explain_callback.ViTExplainCallback
          init_args:
            methods:
              - class_path: vit_explain_callback.MapFunction
                init_args: {name: saliency, function: own.saliency}
              - class_path: vit_explain_callback.adapters.captum
                init_args: {attribution: captum.attr.Saliency, name: of_captum}
              - rollout
            metrics:
              - class_path: vit_explain_callback.DriftMetric
                init_args: {name: total, function: own.total, unchanged: 0}
            num_images: 2
            checks: null
            on_error: raise
"""


def run(folder: Path, *arguments: str) -> None:
    done = python(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_callback_belongs_to_the_package_in_use(package: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent((PROGRAM + RUN).format(package=package)), encoding="utf-8")
    run(tmp_path, "program.py")
    assert len(list(tmp_path.rglob("step_*.safetensors"))) == 2


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_callback_from_a_yaml_file(package: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent((PROGRAM + CLI).format(package=package)), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(textwrap.dedent(CONFIG), encoding="utf-8")
    run(tmp_path, "program.py", "fit", "--config", "config.yaml")
    assert len(list(tmp_path.rglob("step_*.safetensors"))) == 3


def test_a_function_of_ones_own_from_a_yaml_file(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    program = textwrap.dedent((PROGRAM + CLI).format(package="lightning.pytorch"))
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    (tmp_path / "own.py").write_text(textwrap.dedent(FUNCTIONS), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(textwrap.dedent(OWN), encoding="utf-8")
    run(tmp_path, "program.py", "fit", "--config", "config.yaml")
    (folder,) = {path.parent for path in tmp_path.rglob("step_*.safetensors")}
    found = load_run(folder)
    assert {name: tuple(maps.shape[2:]) for name, maps in found.maps.items()} == {
        "rollout": (2, 2),
        "saliency": (32, 32),
        "of_captum": (32, 32),
    }
