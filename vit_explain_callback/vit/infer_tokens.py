"""Find a model's token layout by experiment, if nothing else states it.

Three questions, each answered by the model's behaviour rather than by its name:

- Which tokens are prefix tokens? Those that enter the blocks unchanged for two different images.
- What is the grid? A change in a corner of the image changes the token of that corner.
- What does the classifier read? The tokens behind the blocks that have a gradient. If there are many, the readout is
  their mean, provided that the logits agree: replacing half of them by a token t and half by u must give the logits of
  replacing all by the mean of t and u, or the mean of the logits of replacing all by t and all by u.

Shapes: B images, N tokens, D channels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vit_explain_callback.vit.attention_ops import function_name
from vit_explain_callback.vit.ports import Ports
from vit_explain_callback.vit.recorder import is_no_grad
from vit_explain_callback.vit.sites import changing
from vit_explain_callback.vit.tokens import StatedLayout, TokenLayout, mean_of

Forward = Callable[[Tensor], Tensor]

DETACHED = (
    "Expected finite logits that depend on the tokens behind the blocks, but they are detached or not finite, so that "
    "it is unknown which tokens the classifier reads. Remove `detach()` from the model's forward."
)
NEEDS_NO_READOUT = (
    "To see what a patch attends to, use `query=(row, column)` with `rollout` or `attention`, which needs no "
    "classifier. A `MapFunction` explains any classifier."
)
_CURE = "State it: `prefix_tokens=`, `grid_size=`."


class _Differentiable(TorchFunctionMode):
    """Makes logits depend on the tokens despite `torch.no_grad()` or a new classifier that is all zero."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_no_grad(func, args):
            return None
        if function_name(func) == "linear":
            func = _linear
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Subclasses, such as quantised weights, need not support `any`.
    if type(weight) in (Tensor, nn.Parameter) and not weight.any():
        weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight)
    return F.linear(input, weight, bias)


def observed_layout(
    forward: Forward,
    vit: nn.Module,
    ports: Ports,
    tokens: int,
    images: Tensor,
    stated: StatedLayout,
    needs_readout: bool = True,
) -> TokenLayout:
    """Find the layout of a model with a few passes of its own forward in evaluation mode.

    Args:
        forward: Turns images into logits, (B, C).
        vit: The module that contains `ports`.
        ports: Where the tokens enter the first block and leave the last one.
        tokens: N, as recorded in the attention.
        images: Images of the size in question, (B, C, H, W).
        stated: What the user states about the tokens, which is then not tested.
        needs_readout: Whether it matters what the classifier reads.

    Raises:
        ValueError: If the layout cannot be told with certainty.
    """
    noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    stated_grid = stated.first_patch_and_grid(tokens, images.shape[2], images.shape[3])
    first_patch, grid = stated_grid or _grid(forward, vit, ports, tokens, noise)
    patches = range(first_patch, first_patch + grid[0] * grid[1])
    try:
        readout = _readout(forward, vit, ports, tokens, noise[:1], patches)
    except ValueError:
        if ports.pooled or not needs_readout:
            return TokenLayout(tokens, first_patch, grid, None, None, observed=True)
        raise
    most_read = int(readout.argmax())
    class_token = most_read if most_read not in patches and readout[most_read] > readout[patches.start] else None
    return TokenLayout(tokens, first_patch, grid, class_token, readout, observed=True)


def tokens_read(forward: Forward, vit: nn.Module, ports: Ports, image: Tensor) -> list[int] | None:
    """Indices of the tokens out of the last block that the logits of one image, (1, C, H, W), depend on.

    None if the logits are detached from these tokens or not finite.

    Raises:
        ValueError: If the logits also depend on tokens before the last block other than through it.
    """
    leaving: list[Tensor] = []
    entering: list[Tensor] = []

    def cut_into(leaves: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def cut(tokens: Tensor) -> Tensor:
            leaves.append(tokens.detach().requires_grad_())
            return leaves[-1].clone()

        return cut

    with torch.enable_grad(), changing(vit, ports.entry, cut_into(entering)):
        logits = _logits_with(forward, vit, ports, image, cut_into(leaving))
        if not logits.requires_grad:
            return None
        probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        gradient, *bypassing = torch.autograd.grad((logits * probe).sum(), [*leaving, *entering], allow_unused=True)
    if any(part is not None for part in bypassing):
        raise ValueError(
            "Expected the classifier to read the output of the last block alone, but it also reads tokens of earlier "
            "blocks: no row of the rollout stands for its prediction. Explain a head on the last block's tokens: "
            f"`forward=lambda module, images: …`. {NEEDS_NO_READOUT}"
        )
    if gradient is None or not gradient.isfinite().all():
        return None
    return [index for index, norm in enumerate(gradient[0].abs().sum(dim=1).tolist()) if norm > 0]


def _grid(forward: Forward, vit: nn.Module, ports: Ports, tokens: int, noise: Tensor) -> tuple[int, tuple[int, int]]:
    """Index of the first patch, and (grid_h, grid_w)."""
    changed = noise[:1].repeat(3, 1, 1, 1)
    changed[0, :, 0, 0] += 10
    changed[1, :, 0, -1] += 10
    changed[2, :, -1, 0] += 10
    entering = _tokens_into(forward, vit, ports, torch.cat([noise, changed]))
    is_patch = (entering[0] != entering[1]).any(dim=1)
    indices = is_patch.nonzero().flatten().tolist()
    count = len(indices)
    if count == 0 or indices != list(range(indices[0], indices[0] + count)):
        raise ValueError(
            f"Expected the {tokens} tokens to be prefix tokens and consecutive patches, but those that depend on the "
            f"image are {indices}: the grid cannot be told. {_CURE}"
        )
    differences = (entering[2:] - entering[0]).abs().sum(dim=2)[:, is_patch]
    most = differences.amax(dim=1, keepdim=True)
    if ((differences > 0.999 * most).sum(dim=1) > 1).any():
        raise ValueError(
            f"Expected each corner of the image in one of the {count} patches, but some are in several equally, as "
            f"with a volume's tokens: the grid cannot be told. {_CURE} For a volume, stack its slices vertically."
        )
    top_left, top_right, bottom_left = differences.argmax(dim=1).tolist()
    width = top_right + 1
    height = bottom_left // width + 1
    if top_left != 0 or bottom_left % width or height * width != count or not (most > 0).all():
        raise ValueError(
            f"Expected the {count} patches to follow one another row by row, but the corners of the image are patches "
            f"{top_left}, {top_right} and {bottom_left}: the grid cannot be told. {_CURE}"
        )
    return indices[0], (height, width)


def _readout(forward: Forward, vit: nn.Module, ports: Ports, tokens: int, image: Tensor, patches: range) -> Tensor:
    """Weights, (N,), of the tokens that the classifier reads."""
    read = tokens_read(forward, vit, ports, image)
    if read is None:
        raise ValueError(DETACHED)
    prefix = [index for index in read if index not in patches]
    if read and len(read) == len(prefix):
        return torch.zeros(tokens, dtype=torch.float64).index_fill(0, torch.tensor(read), 1 / len(read))

    def is_mean(group: list[int]) -> bool:
        return _reads_mean(lambda change: _logits_with(forward, vit, ports, image, change), group)

    if read == list(range(tokens)) and prefix and is_mean(read):
        return mean_of(range(tokens), tokens)
    if read == sorted([*prefix, *patches]) and is_mean(list(patches)):
        mean = mean_of(patches, tokens)
        if not prefix:
            return mean
        # The classifier reads both, side by side: half the relevance each.
        return mean / 2 + torch.zeros_like(mean).index_fill(0, torch.tensor(prefix), 0.5 / len(prefix))
    raise ValueError(
        f"Expected the classifier to read prefix tokens, the mean of its tokens or both, but it reads {len(read)} of "
        f"{tokens} tokens in another way: no row of the rollout stands for its prediction. {NEEDS_NO_READOUT}"
    )


def _reads_mean(logits_with: Callable[[Callable[[Tensor], Tensor]], Tensor], group: list[int]) -> bool:
    """Whether the classifier reads the mean of a group of tokens, by the test that the module docstring gives."""
    half = len(group) // 2
    share = half / len(group)

    def replaced(part: list[int], other: list[int], mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        def change(leaving: Tensor) -> Tensor:
            one, two = mix(leaving[:, group[0]], leaving[:, group[-1]])
            changed = leaving.clone()
            changed[:, part] = one[:, None]
            changed[:, other] = two[:, None]
            return changed

        return logits_with(change)

    halves = replaced(group[:half], group[half:], lambda t, u: (t, u))
    blend = replaced(group, [], lambda t, u: (share * t + (1 - share) * u, u))
    only_t, only_u = replaced(group, [], lambda t, u: (t, u)), replaced(group, [], lambda t, u: (u, t))
    tolerance = 1e-3 * (only_t - only_u).abs().max()
    candidates = (blend, share * only_t + (1 - share) * only_u)
    return any(bool((halves - candidate).abs().max() < tolerance) for candidate in candidates)


def _tokens_into(forward: Forward, vit: nn.Module, ports: Ports, images: Tensor) -> Tensor:
    """The tokens, (B, N, D), that enter the first block."""
    entering: list[Tensor] = []

    def record(tokens: Tensor) -> Tensor:
        entering.append(tokens.detach().clone())
        return tokens

    with changing(vit, ports.entry, record):
        forward(images)
    return entering[0]


def _logits_with(
    forward: Forward, vit: nn.Module, ports: Ports, image: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits of one image with a change of the tokens, (1, N, D), that leave the last block."""
    with _Differentiable(), changing(vit, ports.exit, change):
        return forward(image)
