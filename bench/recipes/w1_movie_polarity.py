"""W1: MiniLM-L6 fine-tuned on the polarity of film reviews; accuracy on 1,000 held-out sentences (s.e. 1.1 points).

bench/recipes/fetch.sh data && python bench/recipes/w1_movie_polarity.py --data data [--effort tiny|cpu|gpu]

--effort cpu, the default, trains for 870 s and is meant to end within 50 minutes on two cores; tiny only shows that all
of it runs. What is done is told with the seconds since the start, and not done again after a kill.
"""

from collections.abc import Iterable
from typing import Any

import torch
from recipe import run_recipe, task_trained
from run import CPU, GPU, TINY, Run, from_command_line
from sadmoe.batches import to_device
from sadmoe.model_report import sentence_heat
from sadmoe.texts import tokenized
from sources import minilm_classifier, movie_polarity
from torch import Tensor
from workload import Workload, inputs

EFFORTS = {"tiny": TINY, "cpu": CPU, "gpu": GPU}
SENTENCE = "A film of rare charm that, for all its talk, never once forgets to be funny."


def batches(tokenizer: Any, labelled: list[tuple[str, int]], size: int) -> list[dict[str, Tensor]]:
    """Those of few words first, so that a batch has little padding."""
    ordered = sorted(labelled, key=lambda one: len(one[0]))
    made = tokenized(tokenizer, [text for text, _ in ordered], batch_size=size, max_length=64)
    labels = torch.tensor([label for _, label in ordered]).split(size)
    return [batch | {"labels": part} for batch, part in zip(made, labels, strict=True)]


def right(output: Any, batch: Any) -> Tensor:
    """Which labels the model gives."""
    return output.logits.argmax(-1) == batch["labels"]


def accuracy(outputs: Iterable[tuple[Any, Any]]) -> float:
    """Share of the labels that the model gives."""
    rights = torch.cat([right(output, batch) for output, batch in outputs])
    return int(rights.sum()) / len(rights)


def workload(run: Run) -> tuple[Workload, Any]:
    """With the dense model trained on the task, and its tokenizer."""
    effort = run.effort
    torch.manual_seed(run.seed)  # of the fresh head
    data, (model, tokenizer) = movie_polarity(run.data), minilm_classifier()
    labelled = batches(tokenizer, data["train"][: effort.train], 32)
    tests = batches(tokenizer, data["test"][: effort.tests], 64)
    dense = task_trained(model, labelled, None, 1e-4, run)
    timed = [to_device(inputs(batch), run.device) for batch in tests[:: max(1, len(tests) // 4)]]
    work = Workload(
        title="W1: MiniLM-L6, polarity of film reviews",
        dense=dense,
        train=[inputs(batch) for batch in labelled],
        picks=batches(tokenizer, data["val"][: effort.tests], 64),
        tests=tests,
        metric=accuracy,
        right=right,
        metric_name="accuracy",
        higher_is_better=True,
        heat=lambda model: sentence_heat("Experts of each token", model, tokenizer, SENTENCE),
        timers={"4 batches of 64 sentences": lambda model: [model(**batch) for batch in timed]},
        output_loss="logits",
        notes=("Two sentences of one review may be in both train and test: compare with dense only.",),
    )
    return work, tokenizer


def main() -> None:
    run = from_command_line("w1", __doc__ or "", EFFORTS)
    work, _ = workload(run)
    run_recipe(work, run)


if __name__ == "__main__":
    main()
