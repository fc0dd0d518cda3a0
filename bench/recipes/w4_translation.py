"""W4: a small encoder-decoder with ReLU, English to Portuguese; teacher-forced perplexity on the Debian handbook.

    bench/recipes/fetch.sh data
    python bench/recipes/w4_translation.py --data data [--effort tiny|cpu|ffns|gpu]

--effort ffns, the default, leaves attention as it is, trains the FFNs for 400 s for each expert size and 250 s for a
static k, and ends within an hour on two cores; cpu makes MLPs of attention's projections, and trains for 520 s. tiny
only shows that all of it runs. What is done is told with the seconds since the start, and not done again after a kill.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from marian import EOS
from recipe import run_recipe
from run import CPU, GPU, TINY, from_command_line
from sadmoe.batches import to_device
from sadmoe.model_report import layer_heat
from sadmoe.modules import device_of
from sadmoe.report import Heat
from sources import handbook, translator
from torch import Tensor, nn
from workload import Workload, inputs

WEIGHT = 1.0  # of the logits beside the hidden states
TESTS = 200  # pairs, of some 1,700; as many to pick a setting on
IGNORED = -100
EFFORTS = {
    "tiny": TINY,
    "cpu": replace(CPU, task=0, sparsify=120, layers=50, routed=100),
    "ffns": replace(CPU, task=0, projections=0, sparsify=0, layers=150, routers=1500, routed=250),
    "gpu": replace(GPU, task=0),
}


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def batches(tokenizer: Any, pairs: list[tuple[str, str]], size: int) -> list[dict[str, Tensor]]:
    """Short pairs first. A target is predicted from the tokens before it; what stands for the first is not read."""
    tokens = [
        [[*tokenizer.encode(text, add_special_tokens=False).ids, EOS] for text in pair] for pair in pairs
    ]
    tokens.sort(key=lambda pair: len(pair[0]))
    made = []
    for i in range(0, len(tokens), size):
        sources, targets = zip(*tokens[i : i + size], strict=True)
        before = [[EOS, *target[:-1]] for target in targets]
        made.append(
            {
                "input_ids": padded(sources, EOS),
                "attention_mask": padded([[1] * len(s) for s in sources], 0),
                "decoder_input_ids": padded(before, EOS),
                "decoder_attention_mask": padded([[1] * len(t) for t in targets], 0),
                "labels": padded(targets, IGNORED),
            }
        )
    return made


def perplexity(outputs: Iterable[tuple[Tensor, Any]]) -> float:
    """Of the targets' tokens, each after the true ones before it."""
    nats, tokens = 0.0, 0
    for logits, batch in outputs:
        labels = batch["labels"].flatten()
        nats += F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum").item()
        tokens += int((labels != IGNORED).sum())
    return math.exp(nats / tokens)


def same_logits(output: Tensor, wanted: Tensor, batch: Any) -> Tensor:
    """KL of the next token to the dense model's, mean over real tokens."""
    real = batch["decoder_attention_mask"].bool()
    ours, theirs = (logits[real].float().log_softmax(-1) for logits in (output, wanted))
    return WEIGHT * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def bleu(model: nn.Module, tokenizer: Any, tests: Sequence[Any]) -> float:
    """Of greedy translations, by sacreBLEU over all pairs, 0 to 100."""
    from sacrebleu import corpus_bleu

    ours, theirs = [], []
    for batch in tests:
        batch = to_device(batch, device_of(model))
        longest = 2 * batch["input_ids"].shape[1] + 10
        ours += tokenizer.decode_batch(model.translated(batch["input_ids"], batch["attention_mask"], longest))
        labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, EOS).tolist()
        theirs += tokenizer.decode_batch([[i for i in row if i != EOS] for row in labels])
    return corpus_bleu(ours, [theirs]).score


def heat(model: nn.Module, tokenizer: Any, batch: Any) -> Heat:
    """Encoder layers by the tokens of one sentence."""
    words = [tokenizer.id_to_token(i) for i in batch["input_ids"][0].tolist()]
    return layer_heat("Experts of each source token", model, batch, words)


def main() -> None:
    run = from_command_line("w4", __doc__ or "", EFFORTS, sizes=(8, 4), effort="ffns")
    effort = run.effort
    model, tokenizer = translator()
    pairs = handbook(run.data)
    random.Random(0).shuffle(pairs)
    count = min(TESTS, effort.tests)
    train = batches(tokenizer, pairs[2 * TESTS :][: effort.train], 24)
    picks, tests = (batches(tokenizer, pairs[i:][:count], 25) for i in (TESTS, 0))
    one = inputs(to_device(tests[len(tests) // 2], run.device))
    sentence = inputs(to_device(batches(tokenizer, pairs[:1], 1)[0], run.device))
    run_recipe(
        Workload(
            title="W4: a Marian translator with ReLU, English to Portuguese",
            dense=model.to(run.device),
            train=[inputs(batch) for batch in train],
            picks=picks,
            tests=tests,
            metric=perplexity,
            metric_name="perplexity",
            higher_is_better=False,
            heat=lambda model: heat(model, tokenizer, sentence),
            timers={"25 sentences": lambda model: model(**one)},
            output_loss=same_logits,
            also={"BLEU": lambda model: bleu(model, tokenizer, tests)},
            notes=(
                "The weights carry the 8-bit rounding of the package's file, dense and converted alike.",
                "The head of 32,000 words is most of the FLOPs that are not converted.",
            ),
        ),
        run,
    )


if __name__ == "__main__":
    main()
