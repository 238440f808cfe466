"""The Lightning in use: the same classes are published as `pytorch_lightning` and as `lightning.pytorch`.

A `Trainer` of one package takes only callbacks of that package as its own, so the one imported already is followed.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger, TensorBoardLogger
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
    from pytorch_lightning.utilities.model_helpers import is_overridden
elif "lightning.pytorch" in sys.modules or find_spec("pytorch_lightning") is None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger, TensorBoardLogger
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
    from pytorch_lightning.utilities.model_helpers import is_overridden

__all__ = [
    "Callback",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "LightningModule",
    "Logger",
    "TensorBoardLogger",
    "Trainer",
    "is_overridden",
]
