"""Track a model in the transformers Trainer with a callback of ten lines; takes seconds on a CPU, offline."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from vit_explain_callback import Checks, Explainer, ExplanationTracker, Probe


class TrackExplanations(TrainerCallback):
    """Observe the model before the first step, at every `every`-th step, and at the end."""

    def __init__(self, tracker: ExplanationTracker, every: int) -> None:
        self.tracker, self.every = tracker, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The baseline."""
        self.tracker.observe(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A snapshot."""
        if state.global_step % self.every == 0:
            self.tracker.observe(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The summary and the last pictures."""
        print(self.tracker.finish())


def squares(count: int) -> tuple[Tensor, Tensor]:
    """Noise with a square in one of four corners; its colour is the class."""
    colours, corners = torch.randint(3, (count,)), torch.randint(4, (count,))
    images = 0.5 * torch.randn(count, 3, 32, 32)
    for image, colour, corner in zip(images, colours, corners.tolist(), strict=True):
        image[colour, 16 * (corner // 2) :, 16 * (corner % 2) :][:16, :16] += 2
    return images, colours


def small_vit(**options: Any) -> Any:
    """A transformers ViT with random weights."""
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 3}
    width: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 192}
    config = ViTConfig(num_hidden_layers=3, num_attention_heads=3, **shape, **width, **options)
    return ViTForImageClassification(config)


def main() -> None:
    """Train for 60 steps, and write maps, pictures and the page to `runs/hf_trainer/explanations`."""
    torch.manual_seed(0)
    model, probe = small_vit(), Probe.of(*squares(16))
    data = [{"pixel_values": image, "labels": label} for image, label in zip(*squares(3840), strict=True)]
    # Faithfulness drops tokens: the mean colour of an image is its class here, so painting with it hides nothing.
    tracker = ExplanationTracker(
        Explainer(model, ["grad_rollout"]),
        probe,
        folder=Path("runs/hf_trainer/explanations"),
        target=probe.labels,
        checks=Checks(removal="tokens"),
    )
    arguments = TrainingArguments(
        "runs/hf_trainer",
        per_device_train_batch_size=64,
        num_train_epochs=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[TrackExplanations(tracker, every=15)]).train()


if __name__ == "__main__":
    main()
