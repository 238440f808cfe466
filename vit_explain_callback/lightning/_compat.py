"""Support both packages that publish Lightning: `pytorch_lightning` and `lightning.pytorch`.

The callback derives from one of them; trainers, modules and loggers may come from either.
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
    """Whether a value is an instance of the Lightning class of this name, from either package."""
    return any(base.__name__ == name and _is_lightnings(base) for base in type(value).__mro__)


def is_overridden(method: str, instance: object) -> bool:
    """Whether a module or data module overrides a hook.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> is_overridden("forward", LightningModule())
        False
    """
    defined: Any = getattr(type(instance), method, None)
    bases = (base for base in type(instance).__mro__ if _is_lightnings(base))
    default = next((vars(base)[method] for base in bases if method in vars(base)), None)
    return method in vars(instance) or (defined is not None and defined is not default)


def _is_lightnings(base: type) -> bool:
    return base.__module__.split(".")[0] in _PACKAGES


__all__ = ["Callback", "LightningModule", "Logger", "Trainer", "is_kind", "is_overridden"]
