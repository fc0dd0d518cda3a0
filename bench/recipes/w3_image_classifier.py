"""W3: ViT-S/14 (DINOv2's architecture) fine-tuned on Fashion-MNIST at 56 pixels; top-1 of 2,000 test images.

bench/recipes/fetch.sh data && python bench/recipes/w3_image_classifier.py --data data [--effort tiny|cpu|gpu]

--effort cpu, the default, trains for 870 s and is meant to end within 50 minutes on two cores; tiny only shows that all
of it runs. What is done is told with the seconds since the start, and not done again after a kill.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from recipe import run_recipe, task_trained
from run import CPU, GPU, TINY, Run, from_command_line
from sadmoe.model_report import layer_heat
from sadmoe.report import Heat
from sources import fashion_mnist, pixels, vit_small
from torch import Tensor, nn
from workload import Workload

EFFORTS = {"tiny": TINY, "cpu": replace(CPU, stride=6), "gpu": GPU}


def right(logits: Tensor, batch: Any) -> Tensor:
    """Which images' classes the model names."""
    return logits.argmax(-1) == batch["labels"]


def accuracy(outputs: Iterable[tuple[Tensor, Any]]) -> float:
    """Share of the images whose class the model names."""
    rights = torch.cat([right(logits, batch) for logits, batch in outputs])
    return int(rights.sum()) / len(rights)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


def batches(images: Tensor, labels: Tensor, size: int, side: int) -> list[dict[str, Tensor]]:
    """size images each, of side x side pixels."""
    parts = zip(images.split(size), labels.split(size), strict=True)
    return [{"pixel_values": pixels(part, side), "labels": classes} for part, classes in parts]


def heat(model: nn.Module, image: Tensor, patches: int) -> Heat:
    """Layers by the class token and the patches x patches, row by row, of one image."""
    labels = ["class", *(f"{i // patches},{i % patches}" for i in range(patches * patches))]
    return layer_heat(
        "Experts of each patch (row, column) of one image", model, {"pixel_values": image}, labels
    )


def on_fashion_mnist(title: str, model: nn.Module, side: int, patch: int, lr: float, run: Run) -> None:
    """The recipe on a classifier of images of side x side pixels, in patches of patch x patch, trained here first."""
    labelled = batches(*fashion_mnist(run.data, "train", run.effort.train), 64, side)
    held_out = fashion_mnist(run.data, "t10k", 2 * run.effort.tests)
    parts = batches(*held_out, min(200, run.effort.tests), side)
    tests, picks = parts[::2], parts[1::2]
    dense = task_trained(model, labelled, cross_entropy, lr, run)
    one = tests[0]["pixel_values"][:64].to(run.device)
    run_recipe(
        Workload(
            title=title,
            dense=dense,
            train=[{"pixel_values": batch["pixel_values"]} for batch in labelled],
            picks=picks,
            tests=tests,
            metric=accuracy,
            right=right,
            metric_name="top-1",
            higher_is_better=True,
            heat=lambda model: heat(model, one[:1], side // patch),
            timers={"64 images": lambda model: model(one)},
            output_loss="logits",
        ),
        run,
    )


def main() -> None:
    run = from_command_line("w3", __doc__ or "", EFFORTS)
    torch.manual_seed(run.seed)  # of the fresh head
    on_fashion_mnist("W3: ViT-S/14, Fashion-MNIST", vit_small(), 56, 14, 1e-4, run)


if __name__ == "__main__":
    main()
