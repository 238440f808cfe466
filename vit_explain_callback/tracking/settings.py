"""Groups of options that the callback and `ExplanationTracker` share, each declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, TypeVar

from vit_explain_callback.metrics.faithfulness import Removal
from vit_explain_callback.options.rules import (
    ABOVE_ZERO,
    COUNT,
    FLAG,
    LEVEL,
    NONE,
    checked,
    one_of,
    refuse_unknown,
    rules_of,
)

RemovalOrAuto: TypeAlias = Removal | Literal["auto"]
Level: TypeAlias = Literal["brief", "full"]
G = TypeVar("G", bound="_Group")


class _Group:
    """A frozen dataclass whose fields are options; the first one may stand for all."""

    def __post_init__(self) -> None:
        for name, rule in rules_of(type(self)).items():
            object.__setattr__(self, name, checked(name, getattr(self, name), rule))

    @classmethod
    def of(cls: type[G], option: str, value: object) -> G:
        """The group that `value` stands for: a group, a mapping of its fields, or its first field alone.

        Raises:
            TypeError: If the value, or a field, is of another type, or there is no such field.
            ValueError: If one is out of range.
        """
        if isinstance(value, cls):
            return value
        rules = rules_of(cls)
        if isinstance(value, Mapping) and value:
            refuse_unknown(value, rules, within=option)
            return cls(**value)
        first, rule = next(iter(rules.items()))
        return cls(**{first: checked(option, value, rule)})


@dataclass(frozen=True)
class Checks(_Group):
    """How far maps can be trusted: which snapshots also have their noise and faithfulness measured, and how.

    A check costs one explanation more, 10 forward passes of 8 images for each method, 10 once a run, and 13 of two
    images. The baseline has its noise measured alone, as training waits for it; the next snapshot is the first with
    both, and the last snapshot always has both.

    Args:
        every_n_snapshots: Snapshots between two checks, at least 1; None: no snapshot is checked.
        removal: How faithfulness removes patches: `"mean_colour"` paints them over; `"tokens"` keeps their tokens from
            entering the blocks, which takes half the time. Blocks with rotary or relative positions, masks or
            convolutions would mistake where the other tokens are. This is measured at each check, and patches are
            then painted over. `"auto"` is `"tokens"` where the model allows it.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> Checks(every_n_snapshots=5, removal="tokens")
        Checks(every_n_snapshots=5, removal='tokens')
    """

    every_n_snapshots: Annotated[int | None, COUNT | NONE] = 20
    removal: Annotated[RemovalOrAuto, one_of("mean_colour", "tokens", "auto")] = "auto"


@dataclass(frozen=True)
class Detail(_Group):
    """How much of a run is measured and shown.

    Args:
        level: `"brief"` logs what is worth a first look, `"full"` logs everything.
        block_statistics: Whether to measure what each block attends to, which the heat map of blocks shows.
        page: Whether to write `report.html` beside the maps during the run. `vit-explain report` writes it later.
        margin_charts: Whether `"full"` lays out TensorBoard's custom scalars pane as charts of the median between p10
            and p90. TensorBoard knows one layout a run, so turn this off if you have your own.
        max_pictures_mb: Megabytes (10⁶ bytes) that all pictures of a run may take in TensorBoard's event file.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range.

    Example:
        >>> Detail("full", page=False).max_pictures_mb
        100.0
    """

    level: Annotated[Level, LEVEL] = "brief"
    block_statistics: Annotated[bool, FLAG] = True
    page: Annotated[bool, FLAG] = True
    margin_charts: Annotated[bool, FLAG] = True
    max_pictures_mb: Annotated[float, ABOVE_ZERO] = 100.0
