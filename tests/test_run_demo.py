"""`sadmoe demo`, whole, on a tiny encoder with random weights in the place of its pretrained one."""

import json
import re
from dataclasses import replace

import pytest
import torch
from sadmoe import cli, demo
from sadmoe.demo import recipe as run_demo
from sadmoe.dial import converted_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS, HELD_OUT = 120, 40


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """An encoder of 2 x 128 x 512 that knows the words of a tenth of the demo's text, which is all the demo has."""
    texts, longer = demo.topics()[:TEXTS], demo.long_topics()[:10]
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join([*texts, *longer]).lower())))
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(SPECIAL) + len(words), **shape))
    tokenizer = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    monkeypatch.setattr(run_demo, "minilm", lambda: (model.eval(), tokenizer))
    monkeypatch.setattr(run_demo, "topics", lambda: texts)
    monkeypatch.setattr(run_demo, "long_topics", lambda: longer)
    monkeypatch.setattr(run_demo, "split", lambda some: demo.split(some, HELD_OUT))
    monkeypatch.setattr(run_demo, "ROUTERS", replace(run_demo.ROUTERS, steps=100))


def test_the_demo_prints_and_writes_what_it_promises(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--seconds", "2"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "sadmoe-demo"
    assert (out / "demo.txt").read_text().strip() == printed.strip()
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"{TEXTS - HELD_OUT + 10} paragraphs to train on, {HELD_OUT} held out" in printed

    rows = json.loads((out / "demo.json").read_text())
    dense, *controls = rows[:4]
    ours = [row for row in rows if row["name"] == "converted"]
    (rounded,) = [row for row in rows if "int8" in row["name"]]
    assert dense["fidelity"]["cosine"] == pytest.approx(1)
    assert max(row["fidelity"]["cosine"] for row in controls) < 1
    shares = [row["share"] for row in ours]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 1
    assert [row["tau"] for row in ours] == sorted({0.0, *run_demo.TAUS, rounded["tau"]})
    assert rounded["share"] == pytest.approx(
        next(r["share"] for r in ours if r["tau"] == rounded["tau"]), abs=0.05
    )
    assert all(row["seconds"] > 0 and row["gain"] > 0 for row in (*ours, rounded))

    again = transformers.AutoModel.from_pretrained(out / "model")
    taus = {layer.gate.tau for layer in converted_layers(again).values()}
    assert taus == {rounded["tau"]}
    assert cli.main(["demo", "--seconds", "2"]) != 0, "it does not replace what is there"
    assert "--force" in capsys.readouterr().err
