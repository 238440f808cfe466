"""Settings for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from vit_explain_callback.tracking import errors as warning

pytest.register_assert_rewrite("tests.laws.user_project", "tests.situations.check")


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        if request.node.get_closest_marker("cuda") is not None:
            if not torch.cuda.is_available():
                pytest.skip("needs a GPU that CUDA sees")
            # So that runs can be compared bit by bit, and maps are in full precision.
            torch.use_deterministic_algorithms(True)
            flags: Any = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
            stack.enter_context(torch.backends.cudnn.flags(**flags))
        yield


@pytest.fixture(autouse=True)
def _no_other_notice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A notice of ours is shown where warnings are errors; one that a test does not expect fails it all the same."""
    shown: list[str] = []
    show = warning._show

    def remember(text: str) -> None:
        shown.append(text)
        show(text)

    monkeypatch.setattr(warning, "_show", remember)
    yield
    assert request.node.get_closest_marker("warnings_as_errors") is not None or shown == []


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """For laws that hold on every device."""
    return str(request.param)


def pytest_collection_finish() -> None:
    """Leave out what imports have made when garbage is looked for, and when a fork takes hold of all objects."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "warnings_as_errors: notices of ours are shown where warnings are errors")
    if getattr(config.option, "dist", "no") == "load":  # of xdist: a worker that is done takes over what others have
        config.option.dist = "worksteal"
    # The models are tiny: more threads only wait for one another. Child processes follow the variable.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms ask for
