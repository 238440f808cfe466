"""The stack of blocks that recorded attention belongs to: all over the same tokens, in the order in which they ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.ports import SEEN, Ports
from vit_explain_callback.vit.recorder import AttentionRecorder
from vit_explain_callback.vit.sites import Site
from vit_explain_callback.vit.timm import ONLY_GLOBAL, is_timm_vit


@dataclass(frozen=True)
class Stack:
    """The attention that a model's blocks ran.

    Attributes:
        calls: The attention of each block, first block first, (B, H, N, N).
        places: Of these among all that was recorded.
        pool: The attention of a pooling head that reads the tokens, (B, H, Q, M) with M keys, or None.
        pool_place: Of that among all that was recorded.
        ports: Where tokens enter and leave, if it is known from the names in a model of timm's; else it is to be found
            by data flow, and the stack is not to be trusted before that.
    """

    calls: list[AttentionCall]
    places: tuple[int, ...]
    pool: AttentionCall | None
    ports: Ports | None
    pool_place: int | None = None

    @property
    def tokens(self) -> int:
        """N, the number of tokens."""
        return self.calls[0].shape[2]


def find_stack(model: nn.Module, recorder: AttentionRecorder, images: int) -> Stack:
    """Tell blocks from an attention pool among the recorded calls.

    Args:
        model: The recorded module.
        recorder: What was recorded in one forward pass.
        images: B, the number of images in that pass.

    Raises:
        ValueError: If a block's attention was not seen, or is not over all tokens of an image; if there is no
            attention.
    """
    name = type(model).__name__
    if changed := recorder.changed_after_softmax():
        raise ValueError(
            f"Expected the softmax in `{changed[0]}` of {name} to be multiplied with the values as it is, but it is "
            "changed in between or not used as attention: its map would not be the model's attention."
        )
    calls = list(recorder.calls)
    places = tuple(place for place, call in enumerate(calls) if call.shape[2] == call.shape[3])
    if not places:
        raise ValueError(
            f"Expected attention among the tokens of an image in {name}, but saw none. Only {SEEN} can be seen; "
            f"{ONLY_GLOBAL}."
        )
    plain = _check_blocks(model, [calls[place] for place in places]) if is_timm_vit(model) else False
    tokens = max(calls[place].shape[2] for place in places)
    blocks = [_of_all_tokens(name, calls[place], images, tokens) for place in places]
    # Fewer keys than half the tokens are no pool over these, but a gate, or a few tokens of something else.
    others = [call for call in calls if call.shape[2] != call.shape[3] and 2 * call.shape[3] > tokens]
    if len(others) > 1 or any(call.shape[0] != images for call in others):
        raise ValueError(
            f"Expected no attention of {name} beside its blocks but that of one pooling head over its tokens, but "
            f"captured {[(call.module, call.shape) for call in others]}."
        )
    trusted = plain and len(others) + len(places) == len(calls) and _is_known(model, blocks)
    ports = _ports_by_name(model, bool(others)) if trusted else None
    if not others:
        return Stack(blocks, places, None, ports)
    return Stack(blocks, places, others[0], ports, next(place for place, c in enumerate(calls) if c is others[0]))


def _of_all_tokens(name: str, call: AttentionCall, images: int, tokens: int) -> AttentionCall:
    """A block's attention, with heads of its own where they were folded into the batch."""
    if call.shape[0] != images and call.shape[1] == 1 and call.shape[0] % images == 0 and call.shape[2] == tokens:
        return call.with_heads(images)
    if call.shape[0] != images or call.shape[2] != tokens:
        raise ValueError(
            f"Expected `{call.module}` of {name} to attend over all {tokens} tokens of each of {images} images, "
            f"but its attention is (B, H, N, N) = {call.shape}: {ONLY_GLOBAL}."
        )
    return call


def _check_blocks(model: nn.Module, calls: Sequence[AttentionCall]) -> bool:
    """Whether each of timm's blocks attended once; a block that did not attend at all is refused."""
    blocks = dict(model.blocks.named_children())  # type: ignore[union-attr]
    counts = [sum(f"{call.module}.".startswith(f"blocks.{block}.") for call in calls) for block in blocks]
    if 0 in counts:
        raise ValueError(
            f"Expected one attention operation in `blocks.{list(blocks)[counts.index(0)]}` of {type(model).__name__}, "
            f"but captured 0. Only {SEEN} can be seen; {ONLY_GLOBAL}."
        )
    return set(counts) == {1} and len(calls) == len(counts)


def _is_known(model: nn.Module, calls: Sequence[AttentionCall]) -> bool:
    """Whether timm wrote the attention: of its own it is known that rows are tokens, and heads heads."""
    return all(type(model.get_submodule(call.module)).__module__.startswith("timm.") for call in calls)


def _ports_by_name(model: nn.Module, pooled: bool) -> Ports:
    names = [name for name, _ in model.blocks.named_children()]  # type: ignore[union-attr]
    return Ports(
        Site(f"blocks.{names[0]}", 0, 1, "input", 0),
        Site(f"blocks.{names[-1]}", 0, 1, "output", 0),
        pooled,
    )
