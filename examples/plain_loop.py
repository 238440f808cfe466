"""Track a model in a plain PyTorch loop, without Lightning; takes seconds on a CPU, offline."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vit_explain_callback import Checks, Explainer, ExplanationTracker, Probe


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Noise with a square in one of four corners; its colour is the class."""
    colours, corners = torch.randint(3, (count,)), torch.randint(4, (count,))
    images = 0.5 * torch.randn(count, 3, 32, 32)
    for image, colour, corner in zip(images, colours, corners.tolist(), strict=True):
        image[colour, 16 * (corner // 2) :, 16 * (corner % 2) :][:16, :16] += 2
    return images, colours


torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_classes=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
folder = Path("runs/plain_loop/explanations")
probe = Probe.of(*batch(16))
# Faithfulness drops tokens: the mean colour of an image is its class here, so painting with it hides nothing.
tracker = ExplanationTracker(
    Explainer(model, ["grad_rollout"]), probe, folder=folder, target=probe.labels, checks=Checks(removal="tokens")
)

tracker.observe(step=0)  # the baseline
for step in range(1, 61):
    images, labels = batch(64)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if step % 15 == 0:
        tracker.observe(step)
print(tracker.finish())
