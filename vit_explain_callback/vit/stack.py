"""The stack of blocks that recorded attention belongs to: every block once, all over the same tokens, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vit_explain_callback.vit.capture import AttentionCall, AttentionRecorder

ONLY_GLOBAL = "windowed, hierarchical and convolutional models have no global attention to roll out"


@dataclass(frozen=True)
class Stack:
    """The attention that a model's blocks ran, and where their tokens come in and out.

    Attributes:
        entry: The module whose input are the tokens that enter the first block.
        exit: The module whose output are the tokens that leave the last block, or those after a final norm.
        calls: The attention of each block, first block first, (B, H, N, N).
        pool: The attention of a pooling head that reads the tokens, (B, H, Q, M) with M keys, or None.
    """

    entry: nn.Module
    exit: nn.Module
    calls: list[AttentionCall]
    pool: AttentionCall | None

    @property
    def tokens(self) -> int:
        """N, the number of tokens."""
        return self.calls[0].shape[2]


def find_stack(model: nn.Module, recorder: AttentionRecorder, images: int) -> Stack:
    """Tell blocks from an attention pool among the recorded calls, and check that nothing is missing.

    Args:
        model: The recorded module.
        recorder: What was recorded in one forward pass.
        images: B, the number of images in that pass.

    Raises:
        ValueError: If a block's attention was not seen, was seen more than once, or is not over all tokens of an image;
            if there is no attention, or several stacks of blocks.
    """
    name = type(model).__name__
    if changed := recorder.changed_after_softmax():
        raise ValueError(
            f"Expected the softmax in `{changed[0]}` of {name} to be multiplied with the values as it is, but it is "
            "changed in between or not used as attention: its map would not be the model's attention."
        )
    square = [call for call in recorder.calls if call.shape[2] == call.shape[3]]
    if not square:
        raise ValueError(
            f"Expected attention among the tokens of an image in {name}, but saw none. Only "
            "`scaled_dot_product_attention`, `nn.MultiheadAttention` and a plain softmax times the values can be seen; "
            f"{ONLY_GLOBAL}."
        )
    container = _container(model, square)
    blocks = _blocks(model, container, square)
    calls = []
    for path in blocks:
        found = [call for call in square if f"{call.module}.".startswith(f"{path}.")]
        if len(found) != 1:
            raise ValueError(
                f"Expected one attention operation in `{path}` of {name}, but captured {len(found)}. Only "
                "`scaled_dot_product_attention`, `nn.MultiheadAttention` and a plain softmax times the values can be "
                f"seen; {ONLY_GLOBAL}. Where the model runs its blocks several times, say which run counts: "
                "`forward=lambda module, images: …`."
            )
        calls.append(found[0])
    tokens = max(call.shape[2] for call in calls)
    for call in calls:
        if call.shape[0] != images and call.shape[1] == 1 and call.shape[0] % images == 0:
            raise ValueError(
                f"Expected the attention of `{call.module}` of {name} as (B, H, N, N) with {images} images, but got "
                f"{(call.shape[0], *call.shape[2:])}. Where that is images times heads, give each a dimension of its "
                "own before the softmax, as `reshape` does."
            )
        if call.shape[0] != images or call.shape[2] != tokens:
            raise ValueError(
                f"Expected `{call.module}` of {name} to attend over all {tokens} tokens of each of {images} images, "
                f"but its attention is (B, H, N, N) = {call.shape}: {ONLY_GLOBAL}."
            )
    others = [call for call in recorder.calls if call.shape[2] != call.shape[3]]
    if len(others) > 1 or any(call.shape[0] != images for call in others):
        raise ValueError(
            f"Expected no attention of {name} outside `{container}` but that of one pooling head over its tokens, but "
            f"captured {[(call.module, call.shape) for call in others]}."
        )
    first, *_, last = [*blocks.values()] * 2
    if isinstance(first, nn.ModuleList):  # a block that is only a list is never called itself
        first, last = next(iter(first)), model.get_submodule(container.rpartition(".")[0])
    return Stack(first, last, calls, others[0] if others else None)


def _blocks(model: nn.Module, container: str, calls: list[AttentionCall]) -> dict[str, nn.Module]:
    """The blocks in a list by their path; those of lists in it, where it holds blocks in chunks."""
    prefix = f"{container}." if container else ""
    blocks: dict[str, nn.Module] = {}
    for name, child in model.get_submodule(container).named_children():
        attending = {
            call.module.removeprefix(f"{prefix}{name}.").partition(".")[0]
            for call in calls
            if call.module.startswith(f"{prefix}{name}.")
        }
        parts = dict(child.named_children()) if isinstance(child, nn.ModuleList | nn.Sequential) else {}
        others = [part for part_name, part in parts.items() if part_name not in attending]
        if (
            attending <= set(parts)
            and parts
            and (len(attending) > 1 or all(isinstance(o, nn.Identity) for o in others))
        ):
            blocks |= {f"{prefix}{name}.{part}": parts[part] for part in parts if part in attending}
        else:
            blocks[f"{prefix}{name}"] = child
    return blocks


def _container(model: nn.Module, calls: list[AttentionCall]) -> str:
    """Path of the list of blocks: the outermost one of which several elements attend, or else the innermost."""
    lists_of: list[list[tuple[str, str]]] = []  # for each call, from outside in: path of a list, and element in it
    for call in calls:
        parts = call.module.split(".") if call.module else []
        paths = [".".join(parts[:depth]) for depth in range(len(parts))]
        is_list = [isinstance(model.get_submodule(path), nn.ModuleList | nn.Sequential) for path in paths]
        lists_of.append([(path, parts[depth]) for depth, path in enumerate(paths) if is_list[depth]])
    elements: dict[str, set[str]] = {}
    for lists in lists_of:
        for path, element in lists:
            elements.setdefault(path, set()).add(element)
    chosen = set()
    for call, lists in zip(calls, lists_of, strict=True):
        if not lists:
            raise ValueError(
                f"Expected the blocks of {type(model).__name__} in a `ModuleList` or `Sequential`, but "
                f"`{call.module}`, which attends, is in none."
            )
        chosen.add(next((path for path, _ in lists if len(elements[path]) > 1), lists[-1][0]))
    if len(chosen) > 1:
        example = min(chosen)
        raise ValueError(
            f"Expected one stack of blocks in {type(model).__name__}, but found {', '.join(sorted(chosen))}; "
            f"{ONLY_GLOBAL}. Where it holds several models, name the one to explain, as in "
            f"`vit={example.rpartition('.')[0]!r}`."
        )
    return chosen.pop()
