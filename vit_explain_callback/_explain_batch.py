"""One batch through the model: a forward pass, a backward pass for each target, and the maps folded from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.isolation.undisturbed import preserved_random_state, restored
from vit_explain_callback.methods.base import Method, check_heads, check_layers
from vit_explain_callback.methods.engine import Blocks, fold
from vit_explain_callback.methods.map_function import MapFunction
from vit_explain_callback.metrics.attention import BlockMeter
from vit_explain_callback.vit.block_logits import BlockLogit, block_logits
from vit_explain_callback.vit.blocks import Stack, find_stack
from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.recorder import AttentionRecorder
from vit_explain_callback.vit.session import Session, is_out_of_memory
from vit_explain_callback.vit.tokens import TokenLayout, mean_of


def check_query(query: tuple[int, int], methods: Sequence[Method], grid: tuple[int, int]) -> None:
    """Refuse a query that is no patch, and methods that cannot start from a patch.

    Raises:
        ValueError: If `query`, (row, column) counted from 0, lies outside the grid, or a method needs a target.
    """
    if len(query) != 2 or not all(0 <= place < size for place, size in zip(query, grid, strict=True)):
        raise ValueError(
            f"Expected `query` to be a (row, column) in 0 … {grid[0] - 1} and 0 … {grid[1] - 1}, but got {query}."
        )
    of_target = [method.name for method in methods if method.needs_target]
    if of_target:
        raise ValueError(
            f"Expected no `query` for {', '.join(of_target)}: gradients depend on a class and do not show what a "
            "patch attends to. Ask for `attention` or `rollout`."
        )


def check_target(target: Tensor, classes: int) -> None:
    """Refuse classes that the model's head does not have.

    Raises:
        ValueError: If an entry of `target`, (B,), lies outside 0 … classes - 1.
    """
    if ((target < 0) | (target >= classes)).any():
        raise ValueError(
            f"Expected `target` classes in 0 … {classes - 1} (the model's logits), but got {target.tolist()}. In the "
            "callback, `target=` names one class or `'prediction'`, and `task=` says what the outputs are if they are "
            "not the logits of classes."
        )


def explain_batch(
    session: Session,
    images: Tensor,
    methods: Sequence[Method],
    targets: Sequence[Tensor | None],
    block_statistics: bool,
    query: tuple[int, int] | None = None,
) -> list[Explanation]:
    """Explain a batch, (B, C, H, W), for each target, (B,), None for the predicted class.

    The model is in evaluation mode already. Methods that do not depend on the class are folded once for all targets.
    Without methods, an explanation has logits and targets alone.
    With a `query`, (row, column), relevance starts from that patch instead of what the classifier reads.

    Raises:
        TypeError: If the model's output is of the wrong type.
        ValueError: If a target, the query or an option is out of range, or if the model's attention cannot be rolled
            out.
    """
    if not methods:
        with torch.no_grad():
            logits = session.logits(images)
        return [Explanation({}, logits, target) for target in _classes(logits, targets)]
    logits, stack, fed = _forward(session, images, methods)
    classes = _classes(logits.detach(), targets)
    gradients = _gradients(logits, stack, classes)
    # After the backward pass: its memory is free again, and sharded parameters expect one for each forward pass.
    logits = logits.detach()
    layout = read_layout = session.layout(stack, fed, query is None)
    if query is not None:
        check_query(query, methods, layout.grid)
        layout = _read_by(query, layout)
        stack, gradients = _without_pool(stack, gradients)
    if layout.observed and layout.readout is not None:
        stack, gradients = _without_pool(stack, gradients)  # no logit depends on one
    _check_tokens(stack, layout)
    if _weighted(methods):
        _check_reached(stack, gradients[0])
    # What blocks attend to does not depend on the query.
    metered = read_layout if read_layout.readout is not None else layout
    meter = _meter(stack, metered, fed) if block_statistics else None
    logits_by_block = _block_logits(session, stack, images, classes, methods)
    # Attention is computed again here, in full precision whatever the forward pass ran in.
    with torch.autocast(logits.device.type, enabled=False):
        blocks = Blocks(stack, gradients, logits_by_block)
        del stack, gradients, logits_by_block  # the iterator frees each block, as nothing else refers to it
        maps_by_target = _maps(methods, blocks, layout, meter)
    statistics = None if meter is None else meter.result()
    return [Explanation(maps, logits, target, statistics) for maps, target in zip(maps_by_target, classes, strict=True)]


def function_maps(session: Session, images: Tensor, function: MapFunction, targets: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, h, w) of a user's function for images, (B, C, H, W), and each target, (B,).

    Raises:
        RuntimeError: If the function fails, does not return maps, or changes the model that is trained.
    """
    asked = targets if function.needs_target else targets[:1]
    with restored(session.adapter.model) as changed, session.giving_logits() as model, torch.enable_grad():
        maps = []
        for target in asked:
            with preserved_random_state(seed=0):
                maps.append(function.maps(model, images.clone(), target.to(images.device, copy=True)))
    if changed:
        raise RuntimeError(
            f"Expected the function of `{function.name}` to leave the model that is trained as it is, but it changed "
            f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}, which was put back. Use the model "
            "that the function is given: it is a copy."
        )
    return maps if function.needs_target else maps * len(targets)


def logits_without_tokens(session: Session, images: Tensor, removed: Tensor) -> Tensor:
    """Logits (b, C) of images (b, C, H, W) when the tokens of some patches, (b, grid_h, grid_w) boolean, are left out.

    Raises:
        ValueError: If the model fails without them.
    """
    with session.without_tokens(images, removed.to(images.device)):
        try:
            return session.logits(images)
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise ValueError(
                f"Expected the blocks of {type(session.vit).__name__} to take any number of tokens, but they do not "
                f"({error}): paint patches over instead, with `removal='mean_colour'`."
            ) from error


def _forward(session: Session, images: Tensor, methods: Sequence[Method]) -> tuple[Tensor, Stack, Tensor]:
    """Logits (B, C), in the autograd graph if a method needs it, the blocks, and the images that reached the ViT."""
    weighted = _weighted(methods)
    with (
        torch.set_grad_enabled(weighted),
        AttentionRecorder(session.vit, weighted, session.twin.state, explicit=True) as recorder,
        session.fed(weighted) as fed,
    ):
        logits = session.logits(images)
    stack = find_stack(session.vit, recorder, len(images))
    check_layers(methods, len(stack.calls))
    check_heads(methods, [call.shape[1] for call in stack.calls])
    return logits, stack, fed[0] if fed else images


def _weighted(methods: Sequence[Method]) -> bool:
    return any(method.fusion.of == "weighted" for method in methods)


def _classes(logits: Tensor, targets: Sequence[Tensor | None]) -> list[Tensor]:
    predicted = logits.argmax(dim=1)
    # Copies: what the user made in inference mode could not be saved for a backward pass.
    classes = [predicted if target is None else target.to(logits.device, copy=True) for target in targets]
    for target in classes:
        check_target(target, logits.shape[1])
    return classes


def _gradients(logits: Tensor, stack: Stack, targets: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """∂y_c/∂O of each block, then of the pool, for each target; None where no graph leads from it to y_c."""
    outputs = [call.output for call in _with_pool(stack)]
    attached = [index for index, output in enumerate(outputs) if output.requires_grad]
    gradients: list[list[Tensor | None]] = [[None] * len(outputs) for _ in targets]
    if not logits.requires_grad or not attached:
        return gradients
    # Images do not mix in evaluation mode, so one pass serves the whole batch.
    with torch.enable_grad():
        chosen = [logits.gather(1, target[:, None]).sum() for target in targets]
    for place, logit in enumerate(chosen):
        of_outputs = torch.autograd.grad(
            logit,
            [outputs[index] for index in attached],
            retain_graph=place < len(chosen) - 1,
            allow_unused=True,
        )
        for index, gradient in zip(attached, of_outputs, strict=True):
            gradients[place][index] = gradient
    return gradients


def _block_logits(
    session: Session, stack: Stack, images: Tensor, targets: Sequence[Tensor], methods: Sequence[Method]
) -> dict[int, BlockLogit]:
    """The logits of the blocks that a method asks for, by number."""
    count = len(stack.calls)
    by_method = [method.layers(count) for method in methods if method.fusion.of == "block_gradient"]
    layers = [layer for layer in range(1, count + 1) if any(layer in of_method for of_method in by_method)]
    return block_logits(session, stack, images, targets, layers) if layers else {}


def _without_pool(stack: Stack, gradients: list[list[Tensor | None]]) -> tuple[Stack, list[list[Tensor | None]]]:
    return replace(stack, pool=None), [of_target[: len(stack.calls)] for of_target in gradients]


def _read_by(query: tuple[int, int], layout: TokenLayout) -> TokenLayout:
    """The layout of a model whose classifier reads one patch."""
    place = layout.first_patch + query[0] * layout.grid[1] + query[1]
    return replace(layout, readout=mean_of(range(place, place + 1), layout.tokens))


def _maps(
    methods: Sequence[Method], blocks: Blocks, layout: TokenLayout, meter: BlockMeter | None
) -> list[dict[str, Tensor]]:
    """Maps (B, grid_h, grid_w) by name for each target."""
    with torch.no_grad():
        folded = fold(methods, blocks, layout, meter)
    return [{method.name: layout.to_grid(row) for method, row in rows.items()} for rows in folded]


def _meter(stack: Stack, layout: TokenLayout, images: Tensor) -> BlockMeter:
    like = images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[2:]
    return BlockMeter(layout, (height, width), len(images), [call.shape[1] for call in stack.calls], like)


def _check_tokens(stack: Stack, layout: TokenLayout) -> None:
    patches = layout.grid[0] * layout.grid[1]
    if stack.tokens != layout.tokens:
        raise ValueError(
            f"Expected `{stack.calls[0].module}` to attend over all {layout.tokens} tokens ({layout.tokens - patches} "
            f"prefix + {layout.grid[0]}x{layout.grid[1]} patches), but its attention is {stack.tokens}x{stack.tokens}: "
            "there is no global attention to roll out."
        )
    if (stack.pool is None) == (layout.readout is None) or (
        stack.pool is not None and stack.pool.shape[3] not in (layout.tokens, patches)
    ):
        seen = "none" if stack.pool is None else f"`{stack.pool.module}` with {stack.pool.shape[3]} keys"
        raise ValueError(
            f"Expected {'an' if layout.readout is None else 'no'} attention-pooling head over the tokens after the "
            f"blocks, but saw {seen}."
        )


def _with_pool(stack: Stack) -> list[AttentionCall]:
    return stack.calls if stack.pool is None else [*stack.calls, stack.pool]


def _check_reached(stack: Stack, gradients: Sequence[Tensor | None]) -> None:
    for call, gradient in zip(_with_pool(stack), gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"Expected gradients to reach `{call.module}`, but its output is cut off from the logits. Take "
                "`detach()` and `torch.inference_mode()` out of the model's forward (freeze parameters with "
                "`requires_grad` instead), or leave out the methods that depend on the class."
            )
