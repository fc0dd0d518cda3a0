"""W6: an image classifier with ReLU, small and trained here; top-1 on Fashion-MNIST. What ReLU gives without
fine-tuning, which the pretrained classifier of W3 does not have.

    bench/recipes/fetch.sh data && python bench/recipes/w6_relu_image_classifier.py --data data [--effort tiny|cpu|gpu]

A ViT of 6 x 128 x 512 on images of 28 pixels in patches of 4. --effort cpu, the default, trains it for 240 s on all
60,000 images, its FFNs for 160 s for each expert size, and 100 s for a static k; tiny only shows that all of it runs.
What is done is told with the seconds since the start, and not done again after a kill.
"""

from dataclasses import replace

import torch
from run import CPU, GPU, TINY, from_command_line
from sources import ViTClassifier
from torch import nn
from w3_image_classifier import on_fashion_mnist

SIDE, PATCH = 28, 4
EFFORTS = {
    "tiny": TINY,
    "cpu": replace(
        CPU, task=240, projections=0, sparsify=0, layers=60, routers=800, routed=100, stride=20, train=60_000,
        tests=4_000,
    ),
    "gpu": replace(GPU, projections=0, sparsify=0),
}  # fmt: skip


def untrained_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = ViTConfig(**shape, hidden_act="relu", image_size=SIDE, patch_size=PATCH)
    return ViTClassifier(ViTModel(config, add_pooling_layer=False), classes=10)


def main() -> None:
    run = from_command_line("w6", __doc__ or "", EFFORTS, sizes=(8,))
    torch.manual_seed(run.seed)
    title = "W6: a small ViT with ReLU, trained on Fashion-MNIST here"
    on_fashion_mnist(title, untrained_vit(), SIDE, PATCH, 1e-3, run)


if __name__ == "__main__":
    main()
