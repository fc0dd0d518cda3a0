"""The HTML page of a result: whole in itself, and true to its numbers."""

import copy
import json
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import sadmoe
import torch
from converted import converted
from sadmoe import ConvertConfig, ProjectionConfig, RouterConfig, cli, convert_, replace_projections_
from sadmoe.cost import cost
from sadmoe.data import Data
from sadmoe.evaluate import _Variant, evaluate, table
from sadmoe.flops import count_flops
from sadmoe.gates import DynamicK, TopK
from sadmoe.model_report import heats_of, sentence_heat, short_names, told
from sadmoe.report import Heat, Page, Panel, Series, write_page
from sadmoe.report.svg import bars, curves, heat, ticks
from tiny_models import TINY
from torch.utils.data import DataLoader

PAGE = Page(
    title="a <b> & c",
    facts={"model": "tiny <script>"},
    table=(("tau", "share"), [("0.1", "50%"), ("0.2", "40%")]),
    notes=("a note & more",),
    panels=[
        Panel("FLOPs", "x", "y", [Series("ours", [1, 2, 3], [3.0, 2.0, 1.5], ["p", "q", "r"])], "lower left")
    ],
    heats=[Heat("tokens", [[0.1, 1.0], [0.0, 0.5]], ["layer 0", "layer 1"], ["hello", "<unk>"])],
    histograms={"layer 0": [0, 4, 2, 0], "layer 1": [0] * 200 + [9]},
)
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Balance(HTMLParser):
    """Fails where a tag is closed that is not open, and notes all there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path) -> Balance:
    parser = Balance()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_a_page_is_whole_in_itself(tmp_path):
    write_page(tmp_path / "page.html", PAGE)
    page = parsed(tmp_path / "page.html")
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "http" not in (tmp_path / "page.html").read_text()


def test_a_page_says_all_that_it_was_given(tmp_path):
    write_page(tmp_path / "page.html", PAGE)
    text = parsed(tmp_path / "page.html").text
    for said in (
        "a <b> & c",
        "tiny <script>",
        "50%",
        "a note & more",
        "ours",
        "lower left",
        "hello",
        "<unk>",
        "layer 1",
    ):
        assert said in text


def test_a_page_without_charts_is_a_table(tmp_path):
    write_page(tmp_path / "page.html", Page("t", {}, (("a",), [("1",)])))
    assert "svg" not in parsed(tmp_path / "page.html").seen


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.93], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0, 100], [0, 20, 40, 60, 80, 100]),
        ([-3, 5], [-4, -2, 0, 2, 4, 6]),
        ([7.0], None),
        ([0.0], None),
    ],
)
def test_ticks_are_round_and_hold_the_values(values, expected):
    found = ticks(values)
    assert found[0] <= min(values) <= max(values) <= found[-1]
    assert len(found) > 2
    if expected is not None:
        assert found == expected


def test_a_curve_has_a_tooltip_at_every_point_and_leaves_out_what_is_not_finite():
    ours = Series("ours", [1, 2, 3], [3.0, float("nan"), 1.5], ["p", "q", "r"])
    svg = ElementTree.fromstring(curves([ours], "x", "y", {"ours": 0}))
    assert [title.text for title in svg.iter("title")] == ["ours p: 1, 3", "ours r: 3, 1.5"]


def test_a_level_is_a_dashed_line_without_points(tmp_path):
    level = Series("dense", [0, 3], [2.0, 2.0], marks=False)
    svg = ElementTree.fromstring(curves([level], "x", "y", {"dense": 0}))
    assert [path.get("stroke-dasharray") for path in svg.iter("path") if path.get("style")] == ["6 4"]
    assert not list(svg.iter("title"))
    panel = Panel("a", "x", "y", [level, Series("ours", [1, 2], [3.0, 4.0])])
    write_page(tmp_path / "page.html", Page("t", {}, (("a",), [("1",)]), [panel]))
    assert (tmp_path / "page.html").read_text().count("stroke-dasharray") == 2  # and in the legend


def test_a_curve_has_one_colour_in_every_panel(tmp_path):
    ours, theirs = Series("ours", [1, 2], [3.0, 4.0]), Series("theirs", [1, 2], [5.0, 6.0])
    panels = [Panel("a", "x", "y", [ours, theirs]), Panel("b", "x", "y", [theirs])]
    write_page(tmp_path / "page.html", Page("t", {}, (("a",), [("1",)]), panels))
    drawn = re.findall(r"stroke:var\((--c\d)\)", (tmp_path / "page.html").read_text())
    assert drawn == ["--c0", "--c1", "--c1"]


def test_bars_are_as_high_as_tokens_are_many():
    svg = ElementTree.fromstring(bars([0, 4, 2, 0]))
    heights = [float(rect.get("height")) for rect in svg.iter("rect")]
    assert heights[0] == 2 * heights[1]
    assert [t.text for t in svg.iter("title")] == [
        "1 experts: 66.7% of the tokens",
        "2 experts: 33.3% of the tokens",
    ]
    (many,) = ElementTree.fromstring(bars([0] * 200 + [9])).iter("title")
    assert many.text == "200-200 experts: 100.0% of the tokens"


@pytest.mark.parametrize("experts", [6, 192, 511])
def test_the_line_of_the_mean_is_in_the_middle_of_its_bar(experts):
    counts = [0] * (experts + 1)
    group = -(-len(counts) // 57)
    counts[3 * group : 4 * group] = [5] * group  # all of one bar
    svg = ElementTree.fromstring(bars(counts))
    (bar,) = svg.iter("rect")
    (mean,) = (path for path in svg.iter("path") if path.get("class") == "mean")
    middle = float(bar.get("x")) + (float(bar.get("width")) + 0.6) / 2
    assert float(re.match(r"M([\d.]+),", mean.get("d"))[1]) == pytest.approx(middle, abs=0.35)


def test_a_heat_map_shows_each_share():
    svg = ElementTree.fromstring(heat([[0.1, 1.0]], ["layer"], ["a", "b"], "of it"))
    assert re.findall(r"--v:([0-9.]+)", ElementTree.tostring(svg, "unicode")) == ["0.1000", "1.0000"]
    assert [t.text for t in svg.iter("title")] == ["layer a: 10.0% of it", "layer b: 100.0% of it"]


def test_names_lose_what_they_share():
    assert short_names(["a.b.0.x", "a.b.0.y", "a.b.1.x"]) == ["0.x", "0.y", "1.x"]
    assert short_names(["a.b"]) == ["b"]
    assert short_names(["a", "a.b"]) == ["a", "a.b"]


def test_evaluate_measures_and_puts_the_gates_back():
    model, batch = converted("bert"), TINY["bert"].batch()
    sadmoe.set_tau(model, 0.7)
    dense, sparse, one = evaluate(model, [batch], [0.0, 0.3, 1.0])
    assert dense.error == 0
    assert dense.flops == dense.ffn_flops == dense.share == 1
    assert 1 > sparse.share > one.share > 0
    assert sparse.ffn_flops < sparse.flops
    assert one.error > sparse.error > 0
    assert {layer.gate.tau for layer in sadmoe.moe_layers(model).values()} == {0.7}
    assert "error to tau 0" in table([sparse])


def test_the_error_is_of_the_real_tokens_of_all_batches_together():
    model, batch = converted("bert"), TINY["bert"].batch()
    real = torch.ones(batch["input_ids"].shape, dtype=torch.long)
    real[0, 5:] = 0  # padding
    batches = [batch | {"attention_mask": real}, {"input_ids": batch["input_ids"][:1, :4]}]
    wrong = size = 0.0
    with torch.no_grad():
        for one in batches:
            kept = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
            with sadmoe.tau(model, 0.0):
                wanted = model(**one).last_hidden_state[kept]
            with sadmoe.tau(model, 0.3):
                wrong += (model(**one).last_hidden_state[kept] - wanted).square().sum().item()
            size += wanted.square().sum().item()
    (point,) = evaluate(model, batches, [0.3])
    assert point.error == pytest.approx((wrong / size) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("measure", [cost, partial(evaluate, taus=[0.0, 0.3])])
def test_every_pass_is_over_the_same_batches_of_a_loader_that_shuffles(measure):
    model, ids, passes = converted("bert"), torch.randint(3, 50, (14, 9)), []
    loader = DataLoader([{"input_ids": one} for one in ids], batch_size=4, shuffle=True, drop_last=True)

    class Noted:
        def __iter__(self):
            passes.append([])
            for batch in loader:
                passes[-1].append(batch["input_ids"].sum().item())
                yield batch

    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        measure(model, Noted())
        assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(one) for one in passes if one}) == 1


@pytest.mark.parametrize(("taus", "error"), [(0.3, TypeError), ("0.3", TypeError), ([], ValueError)])
def test_taus_are_a_list(taus, error):
    with pytest.raises(error, match="taus must be a list of numbers, or None among them, got"):
        evaluate(converted("bert"), [TINY["bert"].batch()], taus)


def test_nothing_is_held_to_outputs_that_are_drawn():
    model, batch = converted("bert"), TINY["bert"].batch()
    model.register_forward_hook(lambda m, args, output: torch.randn_like(output.last_hidden_state))
    with pytest.raises(
        ValueError, match="BertModel gives other outputs when it runs on the same batch again"
    ):
        evaluate(model, [batch], [0.3])
    with pytest.raises(ValueError, match="model gives other outputs when it runs on the same batch again"):
        sadmoe.calibrate_layers_(model, [batch], budget=0.9)


@pytest.mark.parametrize("ruled_out", [torch.finfo(torch.float32).min, float("-inf")])
def test_logits_that_a_model_rules_out_are_no_perfect_fidelity(ruled_out):
    model, batch = converted("bert"), TINY["bert"].batch()
    model.register_forward_hook(
        lambda m, args, output: output.last_hidden_state.index_fill(-1, torch.tensor([3]), ruled_out)
    )
    with pytest.raises(ValueError, match="give the model without its head"):
        evaluate(model, [batch], [0.0, 0.3])
    with pytest.raises(ValueError, match="loss must be finite on the batches, got nan"):
        sadmoe.calibrate_layers_(model, [batch], budget=0.9)


def test_evaluate_beside_the_dense_model(monkeypatch):
    model, batch = converted("bert"), TINY["bert"].batch()
    original = TINY["bert"].model()
    exact, sparse = evaluate(model, [batch], [0.0, 0.3], dense=original)
    assert exact.error < 1e-5  # rounding: neurons have another order
    assert sparse.error > 1e-3
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1.1)
    ours = iter([0.5, 0.4, 0.6])
    monkeypatch.setattr(
        _Variant, "seconds", lambda variant, _: 2.0 if variant.model is original else next(ours)
    )
    (changed,) = evaluate(model, [batch], [0.0], dense=original)
    assert changed.error > 1e-2
    assert (changed.seconds, changed.spread, changed.gain) == (0.5, pytest.approx(0.4), 4.0)
    assert "error to dense" in table([changed])
    assert "500 ± 40%" in table([changed])
    assert "0.57 ±  4%" in table([replace(changed, seconds=0.00057, spread=0.04)])
    with pytest.raises(ValueError, match="is a converted one itself"):
        evaluate(model, [batch], [0.0], dense=model)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        evaluate(model, [], [0.0])
    with pytest.raises(ValueError, match="dense must be the model that this one was converted from"):
        evaluate(model, [batch], [0.0], dense=TINY["gpt2"].model())


def test_flops_beside_the_dense_model_are_of_that_one():
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    original = copy.deepcopy(model)
    replace_projections_(model, [batch], ProjectionConfig(ratio=2.0, steps=1), progress=False)
    convert_(model, [batch], ConvertConfig(expert_size=4, router=RouterConfig(steps=1)), progress=False)
    (alone,), (beside,) = evaluate(model, [batch], [0.0]), evaluate(model, [batch], [0.0], dense=original)
    found = cost(model, [batch])
    samples = len(batch["input_ids"])
    whole = samples * (found.rest + found.dense)  # with MLPs for projections
    assert alone.flops == 1.0
    assert beside.flops == pytest.approx(whole / count_flops(original, batch))
    assert beside.flops > 1.05


def test_the_command_writes_page_and_numbers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = converted("bert")
    sadmoe.hf.describe_to_transformers(model)
    sadmoe.set_tau(model, 0.3)
    model.save_pretrained(tmp_path / "model")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2 w3\n\nw4 w5 w40 w41\n")
    out = tmp_path / "report.html"
    places = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--out", str(out)]
    command = ["report", *places]
    threads = torch.get_num_threads()
    assert cli.main([*command, "--tau", "0", "0.5", "--sentence", "w7 w8"]) == 0
    page = parsed(out).text
    assert "BertModel, converted" in page
    assert "w7" in page
    assert "tau 0.3" in page
    points = json.loads(out.with_suffix(".json").read_text())
    assert [point["tau"] for point in points] == [0.0, 0.5]
    assert cli.main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert torch.get_num_threads() == threads


def test_a_sentence_is_cut_to_the_positions_and_has_tokens():
    model, asked = converted("bert"), []
    model.config.max_position_embeddings = 7

    class Tokenizer:
        def __call__(self, sentence, truncation, max_length, return_tensors):
            asked.append((truncation, max_length))
            return {"input_ids": torch.ones(1, len(sentence.split()), dtype=torch.int64)}

        def decode(self, ids):
            return "x"

    assert sentence_heat("", model, Tokenizer(), "a b c").columns == ["x"] * 3
    assert asked == [(True, 7)]
    with pytest.raises(ValueError, match="the sentence has no tokens: ' '"):
        sentence_heat("", model, Tokenizer(), " ")


def test_gates_are_told_in_words():
    assert told([DynamicK(0.2)] * 2) == "tau 0.2"
    assert told([DynamicK(0.2), DynamicK(0.05)]) == "a tau for each layer, 0.05 to 0.2"
    assert told([TopK(3)] * 2) == "TopK(k=3, true_norms=False)"
    assert told([TopK(3), DynamicK(0.2)]) == "gates of several kinds"


def test_a_heat_map_of_an_image_has_a_limit(monkeypatch):
    model = converted("vit")
    data = Data([], None, "images", {"pixel_values": TINY["vit"].batch()["pixel_values"][:1]})
    (whole,) = heats_of(model, data)
    monkeypatch.setattr("sadmoe.model_report.WIDEST", 3)
    (cut,) = heats_of(model, data)
    assert f"the first 3 of {len(whole.columns)}" in cut.heading
    assert list(cut.columns) == ["0", "1", "2"]
    assert [list(row) for row in cut.values] == [list(row[:3]) for row in whole.values]
