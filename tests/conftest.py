"""Settings for every test."""

from __future__ import annotations

import os

import pytest
import torch

pytest.register_assert_rewrite("tests.laws.user_project", "tests.situations.check")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "dist", "no") == "load":  # of xdist: a worker that is done takes over what others have
        config.option.dist = "worksteal"
    # The models are tiny: more threads only wait for one another. Child processes follow the variable.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
