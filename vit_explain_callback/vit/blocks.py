"""Recognise the stack of blocks in the recorded attention: all over the same tokens, in the order in which they ran."""

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
        places: Indices of these calls among all recorded ones.
        pool: The attention of a pooling head that reads the tokens, (B, H, Q, M) with M keys, or None.
        ports: Where tokens enter and leave, if the names in a timm model say so. Otherwise None, and data flow has to
            find it before the stack can be trusted.
        pool_place: Index of the pool among all recorded calls.
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
    """Tell the blocks from a pooling head among the recorded attention.

    Args:
        model: The recorded module.
        recorder: What was recorded in one forward pass.
        images: B, the number of images in that pass.

    Raises:
        ValueError: If a block's attention was not seen, or is not over all tokens of an image; if there is no
            attention.
    """
    name, calls = type(model).__name__, list(recorder.calls)
    _check_softmax(name, recorder)
    places = _self_attention(name, calls)
    block_calls = [calls[place] for place in places]
    one_each = is_timm_vit(model) and _attend_once(model, block_calls)
    tokens = max(call.shape[2] for call in block_calls)
    blocks = [_over_all_tokens(name, call, images, tokens) for call in block_calls]
    pool_place = _pool_place(name, calls, images, tokens)
    pool = None if pool_place is None else calls[pool_place]
    is_all = len(calls) == len(blocks) + (pool is not None)
    ports = _timm_ports(model, pool is not None) if one_each and is_all and _is_of_timm(model, blocks) else None
    return Stack(blocks, places, pool, ports, pool_place)


def _check_softmax(name: str, recorder: AttentionRecorder) -> None:
    """Refuse weights that are changed between their softmax and the values."""
    if changed := recorder.changed_after_softmax():
        raise ValueError(
            f"Expected the softmax in `{changed[0]}` of {name} to be multiplied with the values as it is, but it is "
            "changed in between or not used as attention: its map would not be the model's attention."
        )


def _self_attention(name: str, calls: Sequence[AttentionCall]) -> tuple[int, ...]:
    """Indices of the calls with equally many queries and keys."""
    places = tuple(place for place, call in enumerate(calls) if call.shape[2] == call.shape[3])
    if not places:
        raise ValueError(
            f"Expected attention among the tokens of an image in {name}, but saw none. Only {SEEN} can be recorded; "
            f"{ONLY_GLOBAL}."
        )
    return places


def _pool_place(name: str, calls: Sequence[AttentionCall], images: int, tokens: int) -> int | None:
    """Index of the attention of a pooling head over the tokens, None without one."""
    # With keys for less than half the tokens it is a gate, or belongs to a few tokens of something else.
    pools = [place for place, call in enumerate(calls) if call.shape[2] != call.shape[3] and 2 * call.shape[3] > tokens]
    if len(pools) > 1 or any(calls[place].shape[0] != images for place in pools):
        raise ValueError(
            f"Expected no attention in {name} beside its blocks except one pooling head over their tokens, but "
            f"captured {[(calls[place].module, calls[place].shape) for place in pools]}."
        )
    return pools[0] if pools else None


def _over_all_tokens(name: str, call: AttentionCall, images: int, tokens: int) -> AttentionCall:
    """A block's attention, with heads unfolded from the batch if the model folded them into it."""
    if call.shape[0] != images and call.shape[1] == 1 and call.shape[0] % images == 0 and call.shape[2] == tokens:
        return call.with_heads(images)
    if call.shape[0] != images or call.shape[2] != tokens:
        raise ValueError(
            f"Expected `{call.module}` of {name} to attend over all {tokens} tokens of each of {images} images, "
            f"but its attention is (B, H, N, N) = {call.shape}: {ONLY_GLOBAL}."
        )
    return call


def _attend_once(model: nn.Module, calls: Sequence[AttentionCall]) -> bool:
    """Whether each block of a timm model attended once; refuse a block that did not attend at all."""
    blocks = dict(model.blocks.named_children())  # type: ignore[union-attr]
    counts = [sum(f"{call.module}.".startswith(f"blocks.{block}.") for call in calls) for block in blocks]
    if 0 in counts:
        raise ValueError(
            f"Expected one attention operation in `blocks.{list(blocks)[counts.index(0)]}` of {type(model).__name__}, "
            f"but captured 0. Only {SEEN} can be recorded; {ONLY_GLOBAL}."
        )
    return set(counts) == {1} and len(calls) == len(counts)


def _is_of_timm(model: nn.Module, calls: Sequence[AttentionCall]) -> bool:
    """Whether timm wrote the attention modules, in which rows are surely tokens, and heads heads."""
    return all(type(model.get_submodule(call.module)).__module__.startswith("timm.") for call in calls)


def _timm_ports(model: nn.Module, pooled: bool) -> Ports:
    names = [name for name, _ in model.blocks.named_children()]  # type: ignore[union-attr]
    return Ports(
        Site(f"blocks.{names[0]}", 0, 1, "input", 0),
        Site(f"blocks.{names[-1]}", 0, 1, "output", 0),
        pooled,
    )
