"""Loggers that raise, take other arguments or run short of space, and what a run's hyperparameters are left to be."""

from __future__ import annotations

import io
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.hparams import plugin_data_pb2

from tests.laws.test_faults import assert_trained_alike, ending
from tests.lightning.test_loggers import Spy
from tests.processes import python
from tests.runs import Classifier, events, fit, quiet
from vit_explain_callback import ViTExplainCallback
from vit_explain_callback.tracking import run_folder as space


def short() -> ViTExplainCallback:
    return quiet(["rollout"], num_images=2, page=True, block_statistics=True)


class Leaves(Spy):
    """Its server leaves when fit starts: Lightning has asked it for everything once."""

    gone = False

    def ask(self) -> None:
        if self.gone:
            raise ConnectionError("no server")


class NoExperiment(Leaves):
    @property
    def experiment(self) -> Any:
        self.ask()
        return SimpleNamespace()


class NoHyperparameters(Leaves):
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        self.ask()


class NoFolder(Leaves):
    @property
    def save_dir(self) -> Any:
        self.ask()


class Left(Classifier):
    def on_fit_start(self) -> None:
        self.loggers[0].gone = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [NoExperiment, NoHyperparameters, NoFolder])
def test_a_logger_that_raises_when_it_is_asked(tmp_path: Path, kind: type[Leaves]) -> None:
    spy = Spy()
    _, plain, _ = ending(None, tmp_path, Classifier(), max_epochs=1)
    _, weights, said = ending(short(), tmp_path, Left(), max_epochs=1, logger=[kind(), spy])
    assert_trained_alike(weights, plain)
    asked = [text for text in said if "ConnectionError('no server')" in text]
    assert len(asked) == len(set(asked)) == {NoExperiment: 1, NoHyperparameters: 0, NoFolder: 2}[kind]
    assert spy.scalars["explain/probe/target_probability"] == [0, 4]
    assert len(list(tmp_path.rglob("step_*"))) == 2
    if kind is NoExperiment:
        with pytest.raises(ConnectionError):
            fit(quiet(["rollout"], on_error="raise"), tmp_path, Left(), logger=[kind()])


class LikeDVCLive(Spy):
    """An experiment as `DVCLiveLogger` has it: `dvclive.Live`."""

    @property
    def experiment(self) -> Any:
        def log_image(name: str, val: Any, cache: bool = True) -> None:
            raise AssertionError("it knows no step")

        return SimpleNamespace(log_image=log_image)


def test_a_log_image_that_takes_other_arguments_is_not_called(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no logger of this run shows pictures"):
        fit(short(), tmp_path, max_epochs=1, logger=LikeDVCLive())
    assert list(tmp_path.rglob("*.png"))


class Secretive(Classifier):
    def __init__(self, lr: float = 0.03, password: str = "hunter2", own: bool = False, logged: bool = False) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters(logger=logged)
        self.own = own

    def on_train_start(self) -> None:
        if self.own:
            self.loggers[0].log_hyperparams({"depth": 3}, {"best": 0.0})


def declared(folder: str) -> tuple[set[str], set[str]]:
    """Hyperparameters and metrics of the HParams pane."""
    board = events(None, folder)  # type: ignore[arg-type]
    if "_hparams_/experiment" not in board.summary_metadata:
        return set(), set()
    content = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    return {info.name for info in found.hparam_infos}, {info.name.tag for info in found.metric_infos}


@pytest.mark.parametrize(
    ("own", "logged", "expected"),
    [
        (False, False, (set(), set())),
        (True, False, ({"depth"}, {"best"})),
        (False, True, ({"lr", "password", "own", "logged"}, {"hp_metric"})),
    ],
)
def test_the_hyperparameters_pane_is_the_users(tmp_path: Path, own: bool, logged: bool, expected: Any) -> None:
    module, board, table = Secretive(own=own, logged=logged), TensorBoardLogger(tmp_path / "a"), CSVLogger(tmp_path)
    fit(short(), tmp_path, module, max_epochs=1, logger=[board, table])
    assert declared(board.log_dir) == expected
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and not logged]:
        assert b"hunter2" not in path.read_bytes(), path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_standard_output_that_cannot_show_the_summary(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding, write_through=True))
    _, _, said = ending(short(), tmp_path, Classifier(), max_epochs=1)
    assert said == []
    assert b"attention changed most in block" in output.getvalue()
    assert "→" in next(tmp_path.rglob("summary.txt")).read_text(encoding="utf-8")


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_standard_output_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken())
    trainer, _, said = ending(short(), tmp_path, Classifier(), max_epochs=1)
    assert said == []
    assert trainer.callback_metrics["explain/probe/target_probability"] < 1
    assert list(tmp_path.rglob("summary.txt"))


FULL = """
    import resource, sys, warnings
    from pathlib import Path
    from tests.runs import Classifier, fit
    from vit_explain_callback import ViTExplainCallback

    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    warnings.simplefilter("default")
    module = Classifier()
    callback = ViTExplainCallback(num_images=8, every_n_steps=1) if sys.argv[2] == "with" else None
    trainer = fit(callback, sys.argv[1], module, max_epochs=10)
    print(trainer.global_step, sum(parameter.sum().item() for parameter in module.parameters()))
    print(sum(path.stat().st_size for path in Path(sys.argv[1]).rglob("events*")))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no sizes of files")
def test_a_board_that_may_not_grow(tmp_path: Path) -> None:
    def run(which: str) -> tuple[list[str], str]:
        done = python("-c", textwrap.dedent(FULL), str(tmp_path / which), which)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-2:], done.stderr

    (plain, plain_size), _ = run("without")
    (trained, size), said = run("with")
    assert trained == plain
    assert size == plain_size
    assert said.count("cannot write to TensorBoardLogger (logger 0): ") == 1
    assert said.count("cannot write to the folder") == 1


def test_a_disk_that_fills_while_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fills(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                monkeypatch.setattr(space, "SPARE_BYTES", 2**62)
            if self.global_step == 6:
                monkeypatch.setattr(space, "SPARE_BYTES", 2**20)

    _, plain, _ = ending(None, tmp_path, Classifier())
    callback = quiet(["rollout"], num_images=2, every_n_steps=1, page=True, block_statistics=True)
    trainer, weights, said = ending(callback, tmp_path, Fills())
    assert_trained_alike(weights, plain)
    assert len(said) == 2
    assert all("can be written to" in text for text in said)
    steps = [event.step for event in events(trainer).Scalars("explain/probe/target_probability")]
    assert steps == [0, 1, 2, 3, 7, 8]
    assert len(list(tmp_path.rglob("step_*"))) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.check_space(tmp_path)
