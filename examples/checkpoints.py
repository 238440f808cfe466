"""Load a checkpoint file into a timm model, offline."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
from torch import nn


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what fits from any file that timm can read, and print what was left fresh.

    Position embeddings are resized as timm does; tensors of another shape (a classifier for other classes) stay fresh.
    """
    if not path.is_file():
        raise SystemExit(f"--checkpoint: there is no file {path}.")
    state = timm.models.load_state_dict(str(path))
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = adapt(state, model) if adapt else state
    own = model.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise SystemExit(f"--checkpoint: {path} holds nothing that fits {type(model).__name__}.")
    model.load_state_dict(fitting, strict=False)
    fresh = [name for name in own if name not in fitting]
    print(f"{path.name}: {len(fitting)} of {len(own)} tensors loaded; fresh: {', '.join(fresh) or 'none'}")
