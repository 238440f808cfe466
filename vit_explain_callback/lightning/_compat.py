"""Follow the Lightning that comes: the same classes are published as `pytorch_lightning` and as `lightning.pytorch`.

The callback has to be made from one of them, but which of them a trainer, a module or a logger is of is asked of these.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger
elif "lightning.pytorch" in sys.modules or find_spec("pytorch_lightning") is None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger

_PACKAGES = ("lightning", "pytorch_lightning")


def is_kind(value: object, name: str) -> bool:
    """Whether a value is of Lightning's class of this name, of either package."""
    return any(base.__name__ == name and _is_lightnings(base) for base in type(value).__mro__)


def is_overridden(method: str, instance: object) -> bool:
    """Whether a module or data module defines a hook of its own.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> is_overridden("forward", LightningModule())
        False
    """
    own: Any = getattr(type(instance), method, None)
    bases = (base for base in type(instance).__mro__ if _is_lightnings(base))
    default = next((vars(base)[method] for base in bases if method in vars(base)), None)
    return method in vars(instance) or (own is not None and own is not default)


def _is_lightnings(base: type) -> bool:
    return base.__module__.split(".")[0] in _PACKAGES


__all__ = ["Callback", "LightningModule", "Logger", "Trainer", "is_kind", "is_overridden"]
