"""The demo's model beside pruned ones: as many FLOPs, for as long, by the same data and the same losses.

python bench/recipes/pruned_demo.py [--budgets 0.408 0.25] [--seconds 198]

A pruned model keeps the neurons that add most on average, the same for every token, and no router runs. "from dense":
pruned at once, with its GELU, and trained for all of the time; "from sparse": sparsified as the demo's model first, and
trained for what is left. Of the demo's own table, `sadmoe demo`, compare the row of as many FLOPs.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

from pruning import pruned, trained
from sadmoe.demo import Fidelity, embeddings, fidelity, long_topics, minilm, recombined, split, topics
from sadmoe.demo.recipe import BUDGET, SECONDS, SPARSIFY, by_length, embedding_error, scaled, train_ffns_
from sadmoe.flops import count_flops
from sadmoe.mixed import fast_training
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.tables import format_table
from sadmoe.texts import tokenized
from sadmoe.timing import machine
from torch import Tensor, nn


def row(
    name: str, model: nn.Module, tests: Sequence[Any], dense_flops: int, wanted: Tensor
) -> tuple[str, ...]:
    found: Fidelity = fidelity(embeddings(model, tests), wanted)
    flops = sum(count_flops(model, batch) for batch in tests)
    return name, f"{flops / dense_flops:.1%}", f"{found.cosine:.4f}", f"{found.spearman:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[BUDGET, 0.25], help="shares of the neurons"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training, for each (%(default)s)")
    args = parser.parse_args()
    dense, tokenizer = minilm()
    texts, held_out = split(topics())
    texts += long_topics()
    tests = tokenized(tokenizer, by_length(tokenizer, held_out), batch_size=32)
    some = by_length(tokenizer, [*texts, *recombined(texts, len(texts))])
    batches = tokenized(tokenizer, some, batch_size=24)
    wanted, dense_flops = embeddings(dense, tests), sum(count_flops(dense, batch) for batch in tests)
    train_ffns_(dense)
    sparse = copy.deepcopy(dense)
    first = scaled(SPARSIFY, args.seconds)
    with fast_training(sparse, dense):
        sparsify_(sparse, batches, first)
    assert first.seconds is not None
    rows = []
    for share in args.budgets:
        for name, start, seconds in (
            ("from dense", dense, args.seconds),
            ("from sparse", sparse, args.seconds - first.seconds),
        ):
            config = SparsifyConfig(seconds=seconds, alpha=0.0)
            model = trained(pruned(start, batches[::6], share), dense, batches, config, embedding_error)
            rows.append(row(f"{share:.1%} of the neurons, {name}", model, tests, dense_flops, wanted))
            print(*rows[-1], flush=True)
    print(machine())
    print(format_table(("pruned", "FLOPs", "cosine", "Spearman"), rows))


if __name__ == "__main__":
    main()
