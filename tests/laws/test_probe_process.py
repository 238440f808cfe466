"""The probe is read in a process of its own: what a data set shares with the run, wherever it keeps it, is not reached.

What is named `before` happened when a copy of the data set was read in the process of the training.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.bits import differing
from tests.laws.test_user_data import NO_THREAD, RIGHT, Recording
from tests.laws.user_project import Case, check, leave, of_user
from tests.runs import quiet
from tests.situations.project import COUNT, LABELS, Samples, loader, pictures, training
from vit_explain_callback.isolation import child

pytestmark = pytest.mark.skipif(not child.can_fork(), reason="needs fork")

OTHER_NOISE = "training and validation drew other noise"
Draw = Callable[[], Any]


class Noisy(Samples):
    """Adds to every image what each of `draws` gives, and notes it."""

    def __init__(self, draws: Mapping[str, Draw]) -> None:
        super().__init__(pictures(), LABELS)
        self.draws, self.drawn = draws, {name: list[float]() for name in draws}

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        for name, draw in self.draws.items():
            self.drawn[name].append(float(draw()) / 100)
            image = image + self.drawn[name][-1]
        return image, label


class Streams:
    """As a module's globals."""

    numpy = np.random.default_rng()
    python = random.Random()
    torch = torch.Generator()
    count = 0


def numpy_generator() -> Draw:
    Streams.numpy = np.random.default_rng(3)
    return lambda: Streams.numpy.random()


def python_generator() -> Draw:
    Streams.python = random.Random(3)
    return lambda: Streams.python.random()


def torch_generator() -> Draw:
    Streams.torch = torch.Generator().manual_seed(3)
    return lambda: torch.rand((), generator=Streams.torch)


class Compose:
    """Transforms in turn, each by chance out of one generator, as albumentations does."""

    stream = random.Random()

    def __init__(self, *transforms: Callable[[float], float]) -> None:
        Compose.stream.seed(3)
        self._transforms = transforms

    def __call__(self) -> float:
        value = 0.0
        for transform in self._transforms:
            value = transform(value) if Compose.stream.random() < 0.5 else value
        return value


def composed() -> Draw:
    return Compose(lambda value: value + 1, lambda value: value * Compose.stream.gauss(0, 1), lambda value: value - 2)


def class_attribute() -> Draw:
    Streams.count = 0

    def draw() -> int:
        Streams.count += 1
        return Streams.count

    return draw


def iterator() -> Draw:
    return functools.partial(next, itertools.count())


def running_generator() -> Draw:
    values = (index / 7 for index in range(10_000))
    return lambda: next(values)


def bound_generator() -> Draw:
    return (index / 7 for index in range(10_000)).__next__


def cached() -> Draw:
    @functools.lru_cache
    def loaded() -> Tensor:
        return torch.zeros(1)

    return lambda: loaded().add_(0.1)


def global_array() -> Draw:
    values = np.zeros(1)

    def draw() -> float:
        values[0] += 0.1
        return float(values[0])

    return draw


def default_argument() -> Draw:
    def draw(seen: list[int] = []) -> int:  # noqa: B006
        seen.append(1)
        return len(seen)

    return draw


def shared_value() -> Draw:
    value = multiprocessing.Value("i", 0)

    def draw() -> int:
        with value.get_lock():
            value.value += 1
        return int(value.value)

    return draw


def shared_tensor() -> Draw:
    value = torch.zeros(1).share_memory_()
    return lambda: value.add_(0.1)


def foreign_memory() -> Draw:
    value = ctypes.c_int()

    def draw() -> int:
        value.value += 1
        return value.value

    return draw


def thread_local() -> Draw:
    local = threading.local()
    local.stream = random.Random(3)
    return lambda: local.stream.random()


def environment() -> Draw:
    os.environ["READ"] = "0"

    def draw() -> int:
        os.environ["READ"] = str(int(os.environ["READ"]) + 1)
        return int(os.environ["READ"])

    return draw


SHARED = {
    "a NumPy generator of the module": numpy_generator,
    "a Python generator of the module": python_generator,
    "a torch generator of the module": torch_generator,
    "a composition of transforms with one generator": composed,
    "a class attribute that counts": class_attribute,
    "an iterator": iterator,
    "a running generator": running_generator,
    "a method of a running generator": bound_generator,
    "a cached tensor that is written to": cached,
    "an array that is written to": global_array,
    "a default argument that grows": default_argument,
    "a value that processes share": shared_value,
    "a tensor that processes share": shared_tensor,
    "memory of another language": foreign_memory,
    "what belongs to a thread": thread_local,
    "a variable of the environment": environment,
}


def noisy(**made: Callable[[], Draw]) -> Case:
    def loaders() -> tuple[Any, Any]:
        data = Noisy({name: one() for name, one in made.items()})
        return DataLoader(data, 5), DataLoader(data, 5)

    return Case(NO_THREAD, OTHER_NOISE, Recording, loaders)


def test_what_a_data_set_draws_from_is_not_moved(tmp_path: Path) -> None:
    """All in one project, as the first difference names what was moved."""
    check(noisy(**SHARED), tmp_path)


def test_an_open_file_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(np.random.default_rng(3).bytes(10_000))

    def opened() -> Draw:
        file = open(tmp_path / "noise", "rb", buffering=0)  # noqa: SIM115
        files.append(file)
        return lambda: file.read(1)[0] / 256

    files: list[Any] = []
    try:
        check(noisy(opened=opened), tmp_path)
    finally:
        for file in files:
            file.close()


def test_a_stream_from_a_socket_loses_nothing(tmp_path: Path) -> None:
    """The process that reads cannot read it: the first images of validation are explained."""

    def connected() -> Draw:
        one, other = socket.socketpair()
        sockets.extend((one, other))
        other.sendall(np.random.default_rng(3).bytes(1000))
        return lambda: one.recv(1)[0] / 256

    sockets: list[Any] = []
    try:
        case = noisy(connected=connected)
        check(replace(case, trainer={"num_sanity_val_steps": 2}), tmp_path)
    finally:
        for one in sockets:
            one.close()


class Caching(Samples):
    """Holds a directory, which it deletes when it is finalised, and whose files it reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(pictures(), LABELS)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(COUNT):
            (folder / str(index)).write_text(str(index))

    def __getitem__(self, index: int) -> Any:
        assert (self.folder / str(index)).read_text() == str(index)
        return super().__getitem__(index)

    def __del__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def test_the_directory_of_a_data_set_is_not_deleted(tmp_path: Path) -> None:
    folders = (
        tmp_path / f"cache_{run}" for run in itertools.count()
    )  # the data set of the last run may still be there

    def loaders() -> tuple[Any, Any]:
        return training(), DataLoader(Caching(next(folders)), 5)

    check(Case(NO_THREAD, "the finaliser of the copy deleted it, and training died", Recording, loaders), tmp_path)


class Data(pl.LightningDataModule):
    """Makes its loaders out of what it shares with a shallow copy of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.stream = torch.Generator().manual_seed(3)
        self.rng = np.random.default_rng(3)
        self.asked: list[str] = []
        self.folder = folder
        self.validation: Any = None

    def train_dataloader(self) -> Any:
        self.asked.append("training")
        return loader(pictures(seed=6, count=10), shuffle=True, generator=self.stream)

    def val_dataloader(self) -> Any:
        self.asked.append("validation")
        torch.rand(3, generator=self.stream)
        self.validation = Caching(self.folder)
        chosen = self.rng.permutation(COUNT)
        data = Noisy({"shared": lambda: self.rng.random()})
        return [DataLoader(data, 5, sampler=chosen.tolist()), DataLoader(self.validation, 5)]


class OfTwoLoaders(Recording):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("given", [False, True], ids=["read", "given, so that names alone are asked for"])
def test_a_data_module_is_asked_for_its_loaders_by_the_trainer_alone(given: bool, tmp_path: Path) -> None:
    left = []
    for name in ("without", "with"):
        data = Data(tmp_path / f"cache_{name}")
        images = (pictures(count=4), torch.tensor(LABELS[:4])) if given else None
        callbacks = [quiet(images=images)] if name == "with" else []
        case = Case(NO_THREAD, "drew from its streams", OfTwoLoaders, lambda data=data: (data, None))  # type: ignore[misc]
        case = replace(case, trainer={"check_val_every_n_epoch": 2})  # validation has no loaders before the second
        one = leave(case, tmp_path / name, callbacks)
        left.append((one, data.asked, data.stream.get_state(), str(data.rng.bit_generator.state)))
    (without, *expected), (found, *actual) = left
    assert differing(without.everything, of_user(found.everything, without.everything)) == []
    assert differing(expected, actual) == []
    assert [text for text in found.said if "failed" in text] == []
    assert found.steps == [0, 4]


class Property(Samples):
    """Counts who asks for its classes."""

    asked = 0

    @property
    def classes(self) -> list[str]:
        Property.asked += 1
        return ["ant", "bee", "cat", "dog", "eel"]


def test_names_are_asked_for_in_the_process_too(tmp_path: Path) -> None:
    callback = quiet()
    case = Case(NO_THREAD, "asked", Recording, lambda: (training(), DataLoader(Property(pictures(), LABELS), 5)))
    leave(case, tmp_path, [callback])
    assert callback.tracker is not None
    assert callback.tracker.probe.class_names == ["ant", "bee", "cat", "dog", "eel"]
    assert Property.asked == 0


class Elsewhere(Samples):
    """Does something else in a process that is not the one that made it."""

    def __init__(self, what: Callable[[], Any]) -> None:
        super().__init__(pictures(), LABELS)
        self.process, self.what = os.getpid(), what

    def __getitem__(self, index: int) -> Any:
        if os.getpid() != self.process:
            self.what()
        return super().__getitem__(index)


def hang() -> None:
    threading.Event().wait()


def fail() -> None:
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")


GIVEN_UP = {
    "hangs": (hang, 2.0, "nothing was read in 2 s"),
    "exits": (lambda: os._exit(3), 60.0, "exit status 3"),
}


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_process_that_gives_nothing_is_given_up_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, patience, why = GIVEN_UP[name]
    monkeypatch.setattr(child, "PATIENCE", patience)
    case = Case(NO_THREAD, RIGHT, Recording, lambda: (training(), DataLoader(Elsewhere(what), 5)))
    case = replace(case, trainer={"max_epochs": 3})
    without, found = leave(case, tmp_path / "without", []), leave(case, tmp_path / "with", [quiet()])
    assert differing(without.everything, of_user(found.everything, without.everything)) == []
    said = [text for text in found.said if "in a separate process" in text]
    assert len(said) == 1, found.said
    assert why in said[0]
    assert "Pass `images=(images, labels)`" in said[0]
    assert found.steps == [2, 4, 6]


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_an_error_in_that_process_is_said_and_the_images_that_go_by_are_explained(
    sanity_steps: int, tmp_path: Path
) -> None:
    case = Case(NO_THREAD, RIGHT, Recording, lambda: (training(), DataLoader(Elsewhere(fail), 5)))
    case = replace(
        case, trainer={"num_sanity_val_steps": sanity_steps}, warned=(0 if sanity_steps else 1,), snapshots=2
    )
    check(case, tmp_path)
    said = leave(case, tmp_path / "again", [quiet()]).said
    told = [text for text in said if "Cannot re-initialize CUDA" in text]
    assert told
    assert all("images=(images, labels)" in text for text in told)


class WithLabels:
    """A batch that cannot be sent to another process."""

    def __init__(self, items: Any) -> None:
        self.images = torch.stack([image for image, _ in items])
        self.labels = torch.tensor([label for _, label in items])
        self.named = [lambda label=label: label for _, label in items]


class TakesOwnBatches(Recording):
    def step(self, batch: Any) -> Tensor:
        return super().step((batch.images, batch.labels))


def test_a_batch_that_cannot_be_sent_is_watched(tmp_path: Path) -> None:
    def loaders() -> tuple[Any, Any]:
        return training(collate_fn=WithLabels), loader(collate_fn=WithLabels)

    check(Case(NO_THREAD, RIGHT, TakesOwnBatches, loaders, snapshots=2), tmp_path)


class Printing(Samples):
    def __getitem__(self, index: int) -> Any:
        print(f"read {index}", flush=index % 2 == 0)
        os.write(2, b"read\n")
        return super().__getitem__(index)


def test_what_a_data_set_prints_is_printed_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counts = []
    for name, callbacks in (("without", []), ("with", [quiet()])):
        case = Case(NO_THREAD, "twice", Recording, lambda: (training(), DataLoader(Printing(pictures(), LABELS), 5)))
        leave(case, tmp_path / name, callbacks)
        said = capfd.readouterr()
        counts.append((said.out.count("read "), said.err.count("read\n")))
    assert counts[0] == counts[1] == (2 * COUNT, 2 * COUNT)


def test_handlers_of_the_project_run_in_no_other_process(tmp_path: Path) -> None:
    def note() -> None:
        (tmp_path / str(os.getpid())).touch()

    atexit.register(note)
    try:
        check(replace(noisy(), loaders=lambda: (training(), loader())), tmp_path / "run")
    finally:
        atexit.unregister(note)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]


def test_a_project_with_locks_and_threads(tmp_path: Path) -> None:
    rest, lock = threading.Event(), threading.Lock()

    def locked() -> Draw:
        def draw() -> float:
            with lock:
                return 0.5

        return draw

    def work() -> None:
        while not rest.wait(0.001):
            with warnings.catch_warnings():
                torch.rand(8, 8, generator=torch.Generator()).sum()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        check(noisy(locked=locked), tmp_path)
    finally:
        rest.set()
        thread.join()


def test_the_law_sees_a_reading_in_the_process_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_explain_callback.lightning.probe_batch.can_fork", lambda: False)
    with pytest.raises(AssertionError):
        check(noisy(generator=numpy_generator), tmp_path)
