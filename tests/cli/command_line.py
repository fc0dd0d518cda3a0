"""A small model for the command line, and the commands."""

import pytest
import torch
from sadmoe import cli

transformers = pytest.importorskip("transformers")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "experts", "run", "few", "tokens", "choose", "them"]


def bert(path, **sizes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **sizes,
    }
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **shape)).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


def converted(folder, data, out, *more):
    places = ["--model", str(folder), "--data", str(data), "--out", str(out)]
    return cli.main(["convert", *places, "--expert-size", "8", *more])


def evaluated(folder, data, *taus):
    more = ["--tau", *taus] if taus else []
    return cli.main(["evaluate", "--model", str(folder), "--data", str(data), *more])
