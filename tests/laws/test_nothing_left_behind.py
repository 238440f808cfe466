"""Nothing of a snapshot is left in the model or in torch, however it ends; many of them leave no memory."""

from __future__ import annotations

import hashlib
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.leak import growth
from tests.benchmarks.measure import live_bytes
from tests.models import random_images, tiny_vit
from vit_explain_callback import explain


def digest(value: Any) -> str:
    data = value.detach().cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()


def traces(model: nn.Module) -> dict[str, Any]:
    """All that an explanation could leave behind in a model, in torch or in a random stream."""
    hooks = [
        {key: list(value) for key, value in vars(module).items() if "hooks" in key and value}
        for module in model.modules()
    ]
    gradients = [None if p.grad is None else (id(p.grad), digest(p.grad)) for p in model.parameters()]
    return {
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": hooks,
        "training": [module.training for module in model.modules()],
        "fused attention": [getattr(module, "fused_attn", None) for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": gradients,
        "state": {name: digest(value) for name, value in model.state_dict().items()},
        "functions": (F.scaled_dot_product_attention, F.softmax, torch.matmul, nn.Module.__call__, nn.Linear.forward),
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "global hooks": [len(hooks) for hooks in (nn.modules.module._global_forward_hooks,)],
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
        ),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "random": (digest(random.getstate()), digest(np.random.get_state()), digest(torch.get_rng_state())),
        "random on the GPU": list(map(digest, torch.cuda.get_rng_state_all())) if torch.cuda.is_initialized() else [],
    }


class Model(nn.Module):
    """A ViT in training, partly frozen, partly in evaluation mode, with gradients; may fail anywhere."""

    def __init__(self, error: BaseException | None = None, late: bool = False, device: str = "cpu") -> None:
        super().__init__()
        self.vit = tiny_vit(attn_drop_rate=0.1, drop_path_rate=0.2).train()
        self.norm = nn.BatchNorm1d(5)
        self.to(device)
        self(random_images(4).to(device)).sum().backward()
        self.vit.blocks[0].eval().requires_grad_(False)
        self.vit.blocks[1].register_forward_hook(lambda *_: None)
        self.error, self.late = error, late

    def forward(self, images: Tensor) -> Any:
        error = getattr(self, "error", None)
        if error is not None and not self.late:
            self.vit.blocks[0](torch.rand(1, 17, 48, device=images.device))
            raise error
        torch.rand(1)
        torch.rand(1, device=images.device)
        random.random()
        output = self.norm(self.vit(images))
        if error is not None:
            output.register_hook(self._raise)
        return output

    def _raise(self, _: Tensor) -> None:
        assert self.error is not None
        raise self.error


CIRCUMSTANCES: dict[str, Any] = {
    "training": lambda _: nullcontext(),
    "no_grad": lambda _: torch.no_grad(),
    "inference_mode": lambda _: torch.inference_mode(),
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
}
ERRORS = {"none": None, "an error": RuntimeError("no"), "Ctrl-C": KeyboardInterrupt(), "exit": SystemExit(1)}


@pytest.mark.parametrize("circumstances", CIRCUMSTANCES)
@pytest.mark.parametrize("late", [False, True], ids=["in the forward pass", "in the backward pass"])
@pytest.mark.parametrize("error", ERRORS)
def test_nothing_differs_after_an_explanation(error: str, late: bool, circumstances: str, device: str) -> None:
    model = Model(ERRORS[error], late, device)
    context: AbstractContextManager[Any] = CIRCUMSTANCES[circumstances](device)
    with context:
        before = traces(model)
        raised: type[BaseException] | None = None
        try:
            explain(model, random_images(3), ["rollout", "grad_rollout_max_0.5"])
        except (RuntimeError, KeyboardInterrupt, SystemExit) as failure:
            raised = type(failure)
        assert raised == (None if ERRORS[error] is None else type(ERRORS[error]))
        after = traces(model)
    assert {key for key in before if before[key] != after[key]} == set()


@pytest.mark.parametrize(
    ("trace", "disturb"),
    [
        ("hooks", lambda model: model.vit.register_forward_hook(lambda *_: None)),
        ("training", lambda model: model.vit.blocks[2].eval()),
        ("requires_grad", lambda model: model.vit.requires_grad_(True)),
        ("gradients", lambda model: model.zero_grad()),
        ("state", lambda model: model.norm(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))),
        ("fused attention", lambda model: setattr(model.vit.blocks[0].attn, "fused_attn", False)),
        ("random", lambda _: torch.rand(1)),
        ("random", lambda _: random.random()),
        ("random", lambda _: np.random.rand()),
    ],
)
def test_each_trace_would_be_seen(trace: str, disturb: Any) -> None:
    model = Model()
    before = traces(model)
    disturb(model)
    assert {key for key, value in traces(model).items() if value != before[key]} == {trace}


@pytest.mark.cuda
def test_a_random_number_of_the_gpu_would_be_seen() -> None:
    model = Model(device="cuda")
    before = traces(model)
    torch.rand(1, device="cuda")
    assert {key for key, value in traces(model).items() if value != before[key]} == {"random on the GPU"}


@pytest.mark.skipif(live_bytes() is None, reason="what is not freed is counted by glibc 2.33 or newer")
def test_memory_is_flat_over_many_snapshots() -> None:
    """See `python -m tests.benchmarks.leak`. One map of this run is 0.5 kB and one object, one picture 150 kB."""
    grown = growth()
    assert grown["live"] < 2
    assert {name: grown[name] for name in ("objects", "handles", "threads")} == {
        "objects": 0,
        "handles": 0,
        "threads": 0,
    }
