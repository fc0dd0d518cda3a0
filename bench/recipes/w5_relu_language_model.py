"""W5: a language model with ReLU, small and trained here; bits per byte of an unseen novel, and time of prefill and of
decoding. What a ReLU model gives without fine-tuning, which the pretrained models of W1 to W3 do not have.

    bench/recipes/fetch.sh data && python bench/recipes/w5_relu_language_model.py --data data [--effort tiny|cpu|gpu]

An OPT of 4 x 256 x 1024 with 4,096 words of its own, on five novels of Jane Austen; *Persuasion* is held out. --effort
cpu, the default, trains it for 300 s, its FFNs for 160 s for each expert size, and 100 s for a static k; tiny only
shows that all of it runs. What is done is told with the seconds since the start, and not done again after a kill.
"""

from dataclasses import replace
from typing import Any

import torch
from recipe import run_recipe, task_trained
from run import CPU, GPU, TINY, from_command_line
from sadmoe.model_report import sentence_heat
from sources import austen
from torch import Tensor, nn
from w2_language_model import BLOCK, NEW, PROMPT, BitsPerByte, blocks, same_logits
from workload import Workload

WORDS, ROWS = 4096, 8  # of the vocabulary; blocks in a batch
NOVELS = ("prideprejudice", "sensesensibility", "mansfieldpark", "emma", "northangerabbey")
SENTENCE = "She had been forced into prudence in her youth, she learned romance as she grew older."
EFFORTS = {
    "tiny": TINY,
    "cpu": replace(CPU, task=300, projections=0, sparsify=0, layers=60, routers=800, routed=100, stride=2),
    "gpu": replace(GPU, projections=0, sparsify=0),
}


def own_tokenizer(text: str) -> Any:
    """Byte pairs of this text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(
        text.split("\n\n"), vocab_size=WORDS, special_tokens=["<s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, bos_token="<s>", eos_token="<s>")


def untrained_opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return OPTForCausalLM(
        OPTConfig(**shape, **ids, word_embed_proj_dim=256, max_position_embeddings=BLOCK, dropout=0.0)
    )


def batches(tokenizer: Any, text: str) -> list[dict[str, Tensor]]:
    """All of a text, ROWS blocks at a time, with its own words as labels."""
    rows = [block["input_ids"] for block in blocks(tokenizer, text, len(text) // BLOCK)]
    made = [torch.cat(rows[i : i + ROWS]) for i in range(0, len(rows) - ROWS + 1, ROWS)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def main() -> None:
    run = from_command_line("w5", __doc__ or "", EFFORTS, sizes=(8,))
    torch.manual_seed(run.seed)
    text = austen(run.data, *NOVELS)
    tokenizer, model = own_tokenizer(text), untrained_opt()
    labelled = batches(tokenizer, text)[: run.effort.train // ROWS]
    held_out = blocks(tokenizer, austen(run.data, "persuasion")[2000:], 2 * max(1, run.effort.tests // 125))
    tests, picks = held_out[::2], held_out[1::2]
    dense = task_trained(model, labelled, None, 1e-3, run)
    one = tests[0]["input_ids"].to(run.device)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    run_recipe(
        Workload(
            title="W5: a small OPT with ReLU, trained on five novels here",
            dense=dense,
            train=[{"input_ids": batch["input_ids"]} for batch in labelled],
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
            notes=("A model of 4 million parameters trained for minutes: compare with dense only.",),
        ),
        run,
    )


if __name__ == "__main__":
    main()
