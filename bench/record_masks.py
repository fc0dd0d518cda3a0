"""The masks that a converted model uses on text, for `layers.py --recorded`.

    python bench/record_masks.py sadmoe-demo/model masks.safetensors [--texts FILE] [--tau 0.2] [--tokens 4096]
                                 [--expert-sizes 16 32 [--budget 0.4] [--only .3. .10.]]

A folder that `save_pretrained` wrote; paragraphs of a text file, by default of Python's own documentation. Of each
converted layer the file holds the mask [T, E] of its first tokens, padding left out, and shape in the metadata.
--expert-sizes: the model is made dense again and converted anew into experts of each size; on the same texts routers
are trained, nothing else is, and tau is solved for the budget. --only: FFNs whose name has one of these.
"""

from pathlib import Path

import command
import sadmoe
import torch
from layer_problem import LayerShape
from sadmoe.demo import topics
from sadmoe.hooks import calls_seen
from sadmoe.layer import DynamicKMoE
from sadmoe.texts import load_model, load_tokenizer, paragraphs, tokenized
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


def recorded_masks(model: nn.Module, batches: list[dict[str, Tensor]], tokens: int) -> dict[str, Tensor]:
    """uint8 [tokens or fewer, E] of every converted layer, by name. Batches with an attention_mask [B, T]."""
    layers = sadmoe.moe_layers(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    real = torch.empty(0)

    def note(name: str, layer: DynamicKMoE, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        kept[name].append(layer.mask(rows[real] if len(real) == len(rows) else rows))

    with calls_seen(layers, note), torch.inference_mode():
        for batch in tqdm(batches, "masks"):
            real = batch["attention_mask"].flatten().bool()
            model(**batch)
            if all(sum(map(len, masks)) >= tokens for masks in kept.values()):
                break
    return {name: torch.cat(masks)[:tokens].to(torch.uint8) for name, masks in kept.items()}


def shape_text(layer: DynamicKMoE) -> str:
    E, s, d = layer.w_up.shape
    return LayerShape(d, E * s, s, gated=layer.w_gate is not None).text


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--tau", type=float, help="by default the model's own")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--expert-sizes", type=int, nargs="+")
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    command.check_writable(parser, args.file)
    if args.expert_sizes and args.tau is not None:
        parser.error("--tau is the model's as it is: experts of other sizes take the tau of --budget")
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    if not sadmoe.moe_layers(model):
        raise SystemExit(f"{args.model} has no converted layer: sadmoe convert, or sadmoe demo, writes one")
    if args.tau is not None:
        sadmoe.set_tau(model, args.tau)
    texts = topics() if args.texts is None else paragraphs(args.texts)
    batches = tokenized(tokenizer, texts)
    masks: dict[str, Tensor] = {}
    shapes: dict[str, str] = {}
    for size in args.expert_sizes or [None]:
        if size is not None:
            sadmoe.restore_(model, projections=False)
            config = sadmoe.ConvertConfig(
                expert_size=size,
                budget=args.budget,
                filter=lambda name: any(part in name for part in args.only),
            )
            sadmoe.convert_(model, batches, config)
        prefix = "" if size is None else f"s{size}."
        found = recorded_masks(model, batches, args.tokens)
        masks |= {prefix + name: mask for name, mask in found.items()}
        shapes |= {prefix + name: shape_text(layer) for name, layer in sadmoe.moe_layers(model).items()}
    save_file(masks, args.file, metadata=shapes)
    for name, mask in masks.items():
        print(f"{name}: {len(mask)} tokens, share {mask.float().mean():.1%}, {shapes[name]}")


if __name__ == "__main__":
    main()
