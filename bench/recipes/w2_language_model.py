"""W2: SmolLM2-135M; bits per byte of held-out *Persuasion*, Brown news and Python's documentation, and time of prefill
and of decoding.

    bench/recipes/fetch.sh data && python bench/recipes/w2_language_model.py --data data [--effort tiny|cpu|ffns|gpu]

--effort ffns, the default, trains the FFNs alone, which keep their SiLU, for 360 s for each expert size, and 230 s for
a static k; in one size it is meant to end within 50 minutes on two cores. cpu makes MLPs of attention's projections and
ReLU of SiLU, and trains for 690 s in one size. tiny only shows that all of it runs. What is done is told with the
seconds since the start, and not done again after a kill.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from recipe import run_recipe
from run import CPU, GPU, TINY, from_command_line
from sadmoe.model_report import sentence_heat
from sources import austen, brown_news, python_docs, smollm2
from torch import Tensor
from workload import Workload

BLOCK = 512  # tokens, the first of them BOS
PROMPT, NEW = 64, 16  # tokens, of the decoding that is timed
SENTENCE = (
    "The yield statement suspends the generator, and its local state is kept until the next call resumes it."
)
WEIGHT = 0.1  # of the logits beside the hidden states
TAUS = (0.0, 0.03, 0.1, 0.2, 0.3, 0.4, 0.55)
EFFORTS = {  # 150 layers, and slow to run: less of everything than the others
    "tiny": TINY,
    "cpu": replace(
        CPU, task=0, projections=80, sparsify=270, layers=120, routers=200, routed=150, tokens=6000,
        stride=7, timed=0.3, taus=TAUS,
    ),
    "ffns": replace(
        CPU, task=0, projections=0, sparsify=0, layers=130, routers=200, routed=230, tokens=6000, stride=7,
        timed=0.3, share=0.5, budget=0.7, taus=TAUS,
    ),
    "gpu": replace(GPU, task=0, tokens=20_000),
}  # fmt: skip


def blocks(tokenizer: Any, text: str, count: int) -> list[dict[str, Tensor]]:
    """The first blocks of a text, each a batch of one."""
    ids = tokenizer(text[: count * BLOCK * 8], add_special_tokens=False)["input_ids"]
    parts = [ids[i * (BLOCK - 1) : (i + 1) * (BLOCK - 1)] for i in range(count)]
    return [
        {"input_ids": torch.tensor([[tokenizer.bos_token_id, *part]])}
        for part in parts
        if len(part) == BLOCK - 1
    ]


class BitsPerByte:
    """Cross-entropy of all but the BOS, by the bytes of the text that those tokens are."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, outputs: Iterable[tuple[Any, Any]]) -> float:
        bits, length = 0.0, 0
        for output, batch in outputs:
            logits, ids = output.logits[0, :-1].float(), batch["input_ids"][0, 1:]
            bits += F.cross_entropy(logits, ids, reduction="sum").item() / math.log(2)
            length += len(self.tokenizer.decode(ids.tolist()).encode())
        return bits / length


def same_logits(output: Any, wanted: Any, batch: Any) -> Tensor:
    """KL of the next token to the dense model's, mean over tokens."""
    ours, theirs = (o.logits.float().flatten(0, -2).log_softmax(-1) for o in (output, wanted))
    return WEIGHT * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def main() -> None:
    run = from_command_line("w2", __doc__ or "", EFFORTS, sizes=(8,), effort="ffns")
    effort = run.effort
    model, tokenizer = smollm2()
    docs, held_out_docs = python_docs()
    count, least = max(2, effort.train // 128), max(1, effort.tests // 750)
    novels = austen(run.data, "prideprejudice", "sensesensibility")
    train = [batch for text in (docs, novels) for batch in blocks(tokenizer, text, count // 2)]
    held_out = (austen(run.data, "persuasion")[2000:], brown_news(run.data), held_out_docs)
    told = [blocks(tokenizer, text, 2 * least) for text in held_out]
    tests, picks = ([batch for text in told for batch in text[i::2]] for i in (0, 1))
    one = tests[0]["input_ids"].to(run.device)
    settings = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id,
    }
    run_recipe(
        Workload(
            title="W2: SmolLM2-135M",
            dense=model.to(run.device),
            train=train,
            picks=picks,
            tests=tests,
            metric=BitsPerByte(tokenizer),
            metric_name="bits per byte",
            higher_is_better=False,
            heat=lambda model: sentence_heat("Experts of each token", model, tokenizer, SENTENCE),
            timers={
                f"prefill of {BLOCK} tokens": lambda model: model(input_ids=one),
                f"decoding of {NEW} tokens": lambda model: model.generate(one[:, :PROMPT], **settings),
            },
            output_loss=same_logits,
            notes=(
                "The novels are probably in the model's own training data: compare with dense only.",
                "The weights carry the 4-bit rounding of the GGUF file, dense and converted alike.",
            ),
        ),
        run,
    )


if __name__ == "__main__":
    main()
