"""Word captions: class names, whose probability a number is, a wrong prediction, steps and colour scales.

No other module words them, so that a name or a probability reads the same in every picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

NAME_LENGTH = 24
WRONG = "✗"
DEGENERATE = "degenerate map"
CHANGED_MOST = "changed most"


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """Name of a class, on one line and at most 24 characters long; `class 7` where it has none.

    Example:
        >>> class_name(1, ["cat", "dog"]), class_name(7, ["cat", "dog"]), class_name(0, None)
        ('dog', 'class 7', 'class 0')
        >>> class_name(0, ["Soft-coated Wheaten Terrier"])
        'Soft-coated …ten Terrier'
    """
    has_name = class_names is not None and 0 <= index < len(class_names)
    name = " ".join(str(class_names[index]).split()) if has_name and class_names is not None else ""
    name = "".join(letter if letter.isprintable() else "?" for letter in name[: 100 * NAME_LENGTH])
    if len(name) > NAME_LENGTH:
        # Names of breeds and species differ at both ends.
        name = f"{name[: NAME_LENGTH // 2]}…{name[1 - NAME_LENGTH // 2 :]}"
    return name or f"class {index}"


def class_caption(index: int, probabilities: Sequence[float] | Tensor, class_names: Sequence[str] | None) -> str:
    """A class with its own probability.

    Args:
        index: Of the class.
        probabilities: Of all classes, (C,).
        class_names: Name of each class, or None.

    Example:
        >>> class_caption(1, [0.2, 0.8], ["cat", "dog"])
        'dog · p 0.80'
    """
    return f"{class_name(index, class_names)} · p {float(probabilities[index]):.2f}"


def caption(
    prediction: int,
    target: int,
    label: int | None,
    probabilities: Sequence[float] | Tensor | None,
    class_names: Sequence[str] | None,
    separator: str = " · ",
) -> str:
    """Caption of an image: the predicted class, and the probability of the target class.

    Where the two differ, the probability is labelled with its class. A prediction that is not the label is marked.

    Args:
        prediction: The predicted class.
        target: The class that is explained.
        label: The true class; None or negative where it is not known.
        probabilities: Of all classes, (C,); None where there are none, as in regression, which has nothing to say.
        class_names: Name of each class, or None.
        separator: Between class and probability; a line break gives two lines.

    Example:
        >>> names = ["hexagon", "pentagon"]
        >>> caption(0, 0, 0, [0.93, 0.07], names)
        'hexagon · p 0.93'
        >>> caption(0, 1, 1, [0.54, 0.46], names)
        '✗ hexagon · p(pentagon) 0.46'
    """
    if probabilities is None:
        return ""
    wrong = label is not None and label >= 0 and label != prediction
    whose = "p" if prediction == target else f"p({class_name(target, class_names)})"
    name = class_name(prediction, class_names)
    return f"{WRONG + ' ' if wrong else ''}{name}{separator}{whose} {float(probabilities[target]):.2f}"


def quantity_caption(value: float) -> str:
    """Caption of an image where the model's output is a quantity.

    Example:
        >>> quantity_caption(41.875)
        'output 41.9'
    """
    return f"output {value:.3g}"


def title(target: int | None, label: int | None, class_names: Sequence[str] | None, separator: str = " · ") -> str:
    """Title of an image: its label, and the target class where that differs.

    Args:
        target: The class that is explained; None where there are no classes.
        label: The true class; None or negative where it is not known.
        class_names: Name of each class, or None.
        separator: Between both.

    Example:
        >>> title(1, 1, ["cat", "dog"]), title(0, 1, ["cat", "dog"]), title(0, None, None), title(None, None, None)
        ('dog', 'dog · target cat', 'target class 0', '')
    """
    if target is None:
        return ""
    parts = [class_name(label, class_names)] if label is not None and label >= 0 else []
    if target != label:
        parts.append(f"target {class_name(target, class_names)}")
    return separator.join(parts)


def step_headings(steps: Sequence[int], separator: str = "\n") -> list[str]:
    """A heading for each snapshot of a run, the baseline first and the latest last.

    Example:
        >>> step_headings([0, 12, 120], separator=", ")
        ['baseline, step 0', 'step 12', 'now, step 120']
    """
    names = [f"step {step}" for step in steps]
    if len(names) > 1:
        names[-1] = f"now{separator}{names[-1]}"
    names[0] = f"baseline{separator}{names[0]}"
    return names


def limit_caption(limit: float) -> str:
    """A value on the colour scale.

    Example:
        >>> limit_caption(17.34)
        '17.3 × uniform'
    """
    return f"{limit:.3g} × uniform"


def range_caption(limit: float, signed: bool = False) -> str:
    """The colour scale of maps, from 0 or from −`limit`.

    Example:
        >>> range_caption(17.34), range_caption(2.0, signed=True)
        ('0 to 17.3 × uniform', '±2 × uniform')
    """
    return f"±{limit_caption(limit)}" if signed else f"0 to {limit_caption(limit)}"
