"""What --data may be: texts, pairs, images, a Python file."""

import json
import re
import sys

import pytest
import torch
from sadmoe import cli, moe_layers, texts
from sadmoe.cli import convert as convert_command
from sadmoe.data import _lines_of_pairs, load_data
from sadmoe.ffn import find_ffns

transformers = pytest.importorskip("transformers")
from command_line import WORDS, bert, converted, evaluated

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def t5(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(20):
        place = tmp_path / "photos" / f"class {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (20, 24), (12 * i, 200 - 5 * i, 90)).save(place / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("experts run\tfew tokens choose them\nfew tokens\texperts\n" * 12)
    return path


def test_a_model_of_images_is_converted_evaluated_and_reported(vit, photos, tmp_path, capsys):
    out, page = tmp_path / "moe", tmp_path / "page.html"
    assert converted(vit, photos, out, "--tau", "0.2") == 0
    assert "ViTForImageClassification.from_pretrained" in capsys.readouterr().out
    assert (out / "preprocessor_config.json").exists()
    assert evaluated(out, photos, "0", "1") == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[4]) > 0  # error
    report = ["report", "--model", str(out), "--data", str(photos), "--out", str(page)]
    assert cli.main([*report, "--sentence", "few"]) == 2
    assert "--sentence: this ViTForImageClassification is not run on text alone" in capsys.readouterr().err
    assert cli.main([*report, "--tau", "0", "0.5"]) == 0
    assert "Experts of each token of the first image" in page.read_text()
    assert "20 images" in page.read_text()
    assert cli.main(["survey", "--model", str(vit), "--max-length", "9"]) == 2
    told = "--max-length is of texts, and this ViTForImageClassification takes images: leave it out"
    assert told in capsys.readouterr().err
    bench = ["bench", "--model", str(out), "--data", str(photos), "--seconds", "0.01"]
    assert cli.main([*bench, "--max-length", "9"]) == 2
    assert "--max-length is of texts, and" in capsys.readouterr().err
    assert cli.main(bench) == 0


def test_an_encoder_decoder_is_converted_evaluated_and_reported(t5, pairs, tmp_path, capsys):
    out, page = tmp_path / "moe", tmp_path / "page.html"
    assert converted(t5, pairs, out, "--tau", "0.2") == 0
    assert len(moe_layers(transformers.T5ForConditionalGeneration.from_pretrained(out))) == 2
    capsys.readouterr()
    assert evaluated(out, pairs, "0", "1") == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[4]) > 0
    report = ["report", "--model", str(out), "--data", str(pairs), "--out", str(page)]
    assert cli.main([*report, "--sentence", "few tokens"]) == 2
    assert "is not run on text alone" in capsys.readouterr().err
    assert cli.main(report) == 0
    assert "24 pairs of texts" in page.read_text()
    titles = re.findall("<title>([^<]*)</title>", page.read_text())
    heat = [title.partition(":")[0] for title in titles if title.endswith("% of the experts")]
    words = ["[CLS]", "experts", "run", "[SEP]"]
    assert heat == [
        f"DenseReluDense {word}" for word in words
    ]  # of the encoder: the decoder sees other tokens


@pytest.fixture
def whisper(tmp_path):
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "vocab_size": 20,
    }
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_attention_heads": 2, "num_mel_bins": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(max_source_positions=10, **sizes, **ids)
    transformers.WhisperModel(config).save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


def test_a_detector_takes_images_though_it_has_a_decoder(photos, tmp_path):
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        **sizes,
        **heads,
    )
    model = transformers.DetrForObjectDetection(config).eval()
    transformers.DetrImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    found = load_data(model, tmp_path, photos, batch_size=8, max_length=9)
    assert found.kind == "images"
    assert len(find_ffns(model, batches=found.batches)) == 2


def test_a_model_of_images_and_text_needs_a_python_file(folder, text, photos, tmp_path, capsys):
    clip, out = tmp_path / "clip", tmp_path / "moe"
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config=tower | words,
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(clip)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(clip)
    assert converted(clip, photos, out, "--tau", "0.2") == 2
    assert "CLIPModel, which takes images and text: give a Python file as --data" in capsys.readouterr().err
    assert converted(clip, text, out, "--tau", "0.2") == 2
    told = (
        "this CLIPModel does not run on batch 0 .*A Python file as --data gives it whatever it is called with"
    )
    assert re.search(told, capsys.readouterr().err)


def test_a_model_that_reads_text_alone_too_keeps_what_makes_its_images(folder, text, tmp_path, capsys):
    llava, out = tmp_path / "llava", tmp_path / "moe"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=len(WORDS), **sizes),
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        image_token_index=4,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(llava)
    images = transformers.CLIPImageProcessor(size={"height": 16, "width": 16})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    transformers.LlavaProcessor(images, tokenizer, patch_size=8, image_token="[MASK]").save_pretrained(llava)
    assert converted(llava, text, out, "--tau", "0.2", "--only", "*language_model*") == 0, capsys.readouterr()
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert processor.image_processor.size == {"height": 16, "width": 16}
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_classifier_of_images_gets_no_tokenizer(photos, tmp_path):
    clip, out = tmp_path / "clip", tmp_path / "moe"
    config = transformers.CLIPConfig(
        text_config=SIZES, vision_config=SIZES | {"image_size": 16, "patch_size": 8}
    )
    transformers.CLIPForImageClassification(config).save_pretrained(clip)
    square = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size=square, crop_size=square).save_pretrained(clip)
    assert converted(clip, photos, out, "--tau", "0.2") == 0
    assert (out / "preprocessor_config.json").exists()
    assert not list(out.glob("*token*"))


def test_any_model_takes_the_batches_of_a_python_file(whisper, tmp_path, capsys):
    data, out, page = tmp_path / "mine.py", tmp_path / "moe", tmp_path / "page.html"
    data.write_text(
        "import torch\n"
        "def batches():\n"
        "    ids = torch.randint(3, 20, (2, 6))\n"
        "    return [{'input_features': torch.randn(2, 8, 20), 'decoder_input_ids': ids} for _ in range(8)]\n"
    )
    assert converted(whisper, data, out, "--tau", "0.2") == 0
    assert len(moe_layers(transformers.WhisperModel.from_pretrained(out))) == 2
    capsys.readouterr()
    assert evaluated(out, data, "0", "1") == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[4]) > 0
    for flag in ("--batch-size", "--max-length"):
        assert converted(whisper, data, tmp_path / "other", flag, "16") == 2
        assert f"{flag}: the batches of {data} are as it makes them" in capsys.readouterr().err
    assert cli.main(["report", "--model", str(out), "--data", str(data), "--out", str(page)]) == 0
    assert "WhisperModel, converted" in page.read_text()
    data.write_text("batches = 3")
    assert converted(whisper, data, tmp_path / "other") == 2
    assert "must set `batches` to a list of what the model is called with" in capsys.readouterr().err
    assert [file.name for file in out.iterdir() if "token" in file.name] == [], "the model had no tokenizer"
    for wrong, told in (
        ("x = 1\nbatches = [x / 0]", "mine.py, line 2 raised ZeroDivisionError: division by zero"),
        ("batches = [", "mine.py raised SyntaxError: '[' was never closed (mine.py, line 1)"),
        ("import sys\nsys.exit()", "mine.py, line 2 raised SystemExit"),
        ("batches = [{'input_features': [1.0]}]", "WhisperModel does not run on batch 0 of"),
    ):
        data.write_text(wrong)
        assert converted(whisper, data, tmp_path / "other") == 2
        assert told in capsys.readouterr().err


def test_a_python_file_sees_arguments_of_its_own(folder, tmp_path, capsys):
    data, before = tmp_path / "mine.py", list(sys.argv)
    data.write_text(
        "import argparse, torch\nargparse.ArgumentParser().parse_args()\n"
        "batches = [{'input_ids': torch.ones(2, 4, dtype=torch.long)}]"
    )
    assert cli.main(["survey", "--model", str(folder), "--data", str(data)]) == 0
    assert sys.argv == before


@pytest.mark.parametrize("command", ["survey", "convert"])
def test_no_batch_of_a_python_file_ends_in_a_traceback(folder, tmp_path, capsys, command):
    data = tmp_path / "mine.py"
    data.write_text("import torch\nbatches = [{'input_ids': torch.full((1, 4), i)} for i in (1, 99)]")
    out = ["--out", str(tmp_path / "out")] if command == "convert" else []
    assert cli.main([command, "--model", str(folder), "--data", str(data), *out]) == 2
    assert "this BertModel does not run on batch 1 of" in capsys.readouterr().err


def test_all_batches_of_a_python_file_are_tried_before_anything_is_trained(
    folder, tmp_path, capsys, monkeypatch
):
    data = tmp_path / "mine.py"
    data.write_text(
        "import torch\nbatches = [{'input_ids': torch.full((1, 4), i)} for i in (1, 2, 99)]  # of 11 words"
    )
    monkeypatch.setattr(convert_command, "sparsify_", lambda *_, **__: pytest.fail("it was trained"))
    assert converted(folder, data, tmp_path / "out", "--sparsify", "9") == 2
    assert "this BertModel does not run on batch 2 of" in capsys.readouterr().err


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_pair(pairs):
    pairs.write_text("\ufeff" + pairs.read_text(), encoding="utf-8")  # as some editors begin a file
    assert _lines_of_pairs(pairs, "t5")[0] == ["experts run", "few tokens choose them"]


def test_the_shortest_texts_and_pairs_come_first(folder, t5, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("tokens choose few experts\n\nrun\n\nfew tokens\n\n")
    found = load_data(texts.load_model(folder), folder, data, batch_size=1, max_length=8).batches
    assert [batch["input_ids"].shape[1] for batch in found] == [3, 4, 6]
    data.write_text("tokens choose few experts\trun\nrun\tfew tokens\n")
    found = load_data(texts.load_model(t5), t5, data, batch_size=1, max_length=8).batches
    lengths = [batch["input_ids"].shape[1] for batch in found]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[1]


def test_what_an_encoder_decoder_reads(t5, pairs):
    model = texts.load_model(t5)
    data = load_data(model, t5, pairs, batch_size=2, max_length=8)
    names = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert names <= data.first.keys()
    assert len(data.batches) == 12
    target = data.processor("few tokens choose them")["input_ids"]
    assert data.first["decoder_input_ids"].tolist() == [[0, *target[:-1]]]
    assert data.words[1:3] == ["experts", "run"]
    assert [len(batch["input_ids"]) for batch in data.batches] == [2] * 12


def test_a_target_begins_with_its_start_wherever_the_tokenizer_pads(t5, tmp_path):
    left, data, model, start = tmp_path / "left", tmp_path / "pairs.txt", texts.load_model(t5), 4
    model.config.decoder_start_token_id = start  # not that of padding, as T5's is
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    tokenizer.save_pretrained(left)
    config = json.loads((left / "tokenizer_config.json").read_text())
    (left / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    data.write_text("run\tfew\nexperts run\tfew tokens choose them\n")
    (batch,) = load_data(model, left, data, batch_size=2, max_length=8).batches
    assert batch["attention_mask"][:, -1].all(), "sources are padded as the tokenizer does"
    both = zip(batch["decoder_input_ids"], batch["decoder_attention_mask"], strict=True)
    rows = [ids[mask.bool()].tolist() for ids, mask in both]
    assert rows == [[start, *tokenizer(text)["input_ids"][:-1]] for text in ("few", "few tokens choose them")]


def test_images_are_read_by_batches_and_turned_as_they_were_taken(vit, tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    wide = image.new("RGB", (32, 16), (250, 0, 0))
    turned = image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    wide.save(tmp_path / "photos/0.jpg", exif=turned)
    wide.save(tmp_path / "photos/1.jpg")
    seen = []
    model = texts.load_model(vit).bfloat16()
    data = load_data(model, vit, tmp_path / "photos", batch_size=2, max_length=8)
    processor = data.batches.processor
    object.__setattr__(
        data.batches, "processor", lambda images, **kw: seen.extend(images) or processor(images, **kw)
    )
    assert len(data.batches) == 1
    assert data.batches[0]["pixel_values"].dtype == torch.bfloat16
    assert [one.size for one in seen] == [(16, 32), (32, 16)]
    assert data.batches[-1:][0]["pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(IndexError):
        data.batches[1]


def test_what_is_mostly_cut_is_told(folder, tmp_path, caplog):
    model, data = texts.load_model(folder), tmp_path / "lines.txt"
    for blank, told in (("", 0), ("\n\n", 1)):  # one text a line, and a blank line somewhere
        data.write_text("\n".join(["experts run few tokens"] * 50) + blank + "choose them\n" * 50)
        load_data(model, folder, data, batch_size=8, max_length=16)
        assert len(caplog.records) == told
    assert "of its 2 texts 2 are cut after 16 tokens" in caplog.text
    data.write_text("experts run few tokens\n" * 9 + "run " * 20)  # one of ten
    load_data(model, folder, data, batch_size=8, max_length=16)
    assert len(caplog.records) == 1


def test_pairs_that_are_mostly_cut_are_told(t5, tmp_path, caplog):
    model, data = texts.load_model(t5), tmp_path / "pairs.txt"
    short, long = "few tokens", "experts run few tokens " * 12
    for pair, told in (
        (f"{short}\t{long}", "targets"),
        (f"{long}\t{short}", "sources"),
        (f"{short}\t{short}", ""),
    ):
        data.write_text(f"{pair}\n" * 3)
        caplog.clear()
        load_data(model, t5, data, batch_size=2, max_length=16)
        assert [f"of its 3 {told} 3 are cut after 16 tokens" in line for line in caplog.messages] == [
            True
        ] * bool(told)


def test_a_length_that_only_the_tokenizers_own_tokens_fill_is_refused(folder, text):
    with pytest.raises(
        ValueError, match="--max-length must be at least 3, as the tokenizer puts 2 tokens of its own"
    ):
        load_data(texts.load_model(folder), folder, text, batch_size=8, max_length=2)


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    data = tmp_path / "lines.txt"
    data.write_text(
        "one two\u2028three four\r\nfive\x0bsix\x0cseven\x85eight\n", encoding="utf-8", newline=""
    )
    assert texts.paragraphs(data) == ["one two three four", "five six seven eight"]


def test_a_tokenizer_without_a_padding_mask_will_do(tmp_path):
    bert(tmp_path)
    tokenizer = transformers.BertTokenizer(
        vocab=str(tmp_path / "vocab.txt"), model_input_names=["input_ids", "token_type_ids"]
    )
    tokenizer.save_pretrained(tmp_path)
    data = tmp_path / "text.txt"
    data.write_text("experts run\nfew tokens choose them\n")
    found = load_data(texts.load_model(tmp_path), tmp_path, data, batch_size=2, max_length=8)
    assert "attention_mask" not in found.batches[0]


def test_images_that_cannot_be_read_are_named(vit, tmp_path):
    images = pytest.importorskip("PIL.Image")
    images.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"of another system")
    (tmp_path / "folder.png").mkdir()
    model = texts.load_model(vit)
    data = load_data(model, vit, tmp_path, batch_size=1, max_length=8)
    assert len(data.batches) == 1
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        list(load_data(model, vit, tmp_path, batch_size=1, max_length=8).batches)
    (tmp_path / "b.png").unlink()
    images.effect_noise((200, 200), 90).save(tmp_path / "b.jpg")
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    assert len(load_data(model, vit, tmp_path, batch_size=1, max_length=8).batches) == 2, "by their heads"
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read as an image: .*truncated"):
        load_data(model, vit, tmp_path, batch_size=1, max_length=8, whole=True)
    (tmp_path / "b.jpg").unlink()
    images.new("I;16", (20, 20)).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").touch()
    told = r"b\.png has more than 8 bits a colour.*; .*c\.jpg cannot be read as an image"
    with pytest.raises(ValueError, match=told):  # of all of them, before any is trained on
        load_data(model, vit, tmp_path, batch_size=1, max_length=8)


def test_what_a_processor_gives_beside_pixels_is_kept_where_the_model_takes_it(photos, vit, monkeypatch):
    class WithMask(transformers.ViTImageProcessor):
        def __call__(self, images, **settings):
            made = super().__call__(images, **settings)
            return made | {
                "pixel_mask": torch.ones(len(images), 2, dtype=torch.int64),
                "sizes": [1] * len(images),
            }

    model = texts.load_model(vit).half()
    forward = model.forward
    model.forward = lambda pixel_values, pixel_mask=None: forward(pixel_values)
    monkeypatch.setattr(
        transformers.AutoImageProcessor, "from_pretrained", lambda *a, **k: WithMask.from_pretrained(vit)
    )
    batch = load_data(model, vit, photos, batch_size=4, max_length=8).batches[0]
    assert {key: tensor.dtype for key, tensor in batch.items()} == {
        "pixel_values": torch.float16, "pixel_mask": torch.int64
    }  # fmt: skip


def test_a_processor_that_does_not_load_is_told(folder, tmp_path, monkeypatch, caplog):
    def fails(*args, **settings):
        raise ImportError("it needs sentencepiece")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fails)
    assert texts.load_processor(folder) is None
    assert (
        "does not load what makes its inputs, so no converted model gets that: it needs sentencepiece"
        in caplog.text
    )
    caplog.clear()
    (tmp_path / "preprocessor_config.json").write_text("{}")  # of a model of more than text
    assert texts.processor_around("its tokenizer", tmp_path) == "its tokenizer"
    assert "it needs sentencepiece" in caplog.text


def test_a_python_file_may_import_what_lies_beside_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside_the_data.py").write_text("import torch\nids = torch.ones(1, 4, dtype=torch.long)\n")
    (tmp_path / "data.py").write_text("from beside_the_data import ids\nbatches = [{'input_ids': ids}]\n")
    data = load_data(texts.load_model(folder), folder, tmp_path / "data.py", batch_size=1, max_length=8)
    assert data.batches[0]["input_ids"].shape == (1, 4)


def test_data_of_another_kind_is_refused(folder, vit, t5, whisper, text, pairs, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for model, data, message in (
        (vit, text, "a ViTForImageClassification takes images, and"),
        (vit, tmp_path / "empty", "holds no image, by the names *.bmp"),
        (folder, photos, "a BertModel takes text, and"),
        (t5, text, "takes lines of a source, a tab and a target; line 1 of"),
        (
            whisper,
            text,
            "which takes input_features and a decoder that has its own, and not text or images alone",
        ),
    ):
        assert converted(model, data, tmp_path / "out") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".JSON"])
def test_tables_are_not_read_as_text(folder, t5, tmp_path, capsys, suffix):
    data = tmp_path / f"table{suffix}"
    data.write_text('{"text": "experts run"}\t{"text": "few tokens"}\n')
    for model, form in ((folder, "plain text"), (t5, "lines of a source, a tab and a target")):
        assert converted(model, data, tmp_path / "out") == 2
        assert f"takes {form}, and all of {data} would be read as that" in capsys.readouterr().err
    assert load_data(
        texts.load_model(t5), t5, data.rename(tmp_path / "pairs.tsv"), batch_size=1, max_length=8
    )


def test_a_tokenizer_is_given_back_as_it_was(folder):
    tokenizer = texts.load_tokenizer(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    (batch,) = texts.tokenized(tokenizer, ["few", "few tokens choose"])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert tokenizer.pad_token is None


def test_a_tokenizer_is_saved_as_it_was(folder, t5, text, pairs, tmp_path):
    for model, data, out in ((folder, text, tmp_path / "texts"), (t5, pairs, tmp_path / "pairs")):
        assert converted(model, data, out, "--tau", "0.2", "--router-width", "4") == 0
        texts.load_tokenizer(model).save_pretrained(tmp_path / "untouched")
        former = (tmp_path / "untouched" / "tokenizer.json").read_text()
        assert (out / "tokenizer.json").read_text() == former, "neither cuts nor padding"


def test_an_encoder_decoder_that_classifies_takes_text(folder, text, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "d_model": 32,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 3}
    config = transformers.BartConfig(vocab_size=len(WORDS), **sizes, **heads, **tokens)
    transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "bart")
    texts.load_tokenizer(folder).save_pretrained(tmp_path / "bart")
    out = tmp_path / "moe"
    assert converted(tmp_path / "bart", text, out, "--tau", "0.2", "--router-width", "4") == 0
    assert len(moe_layers(texts.load_model(out))) == 2


@pytest.mark.parametrize(("longest", "batch"), [(0, 0), (5, 21)])
def test_a_text_that_a_model_does_not_run_on_is_an_error(
    folder, text, tmp_path, capsys, monkeypatch, longest, batch
):
    forward = transformers.BertModel.forward

    def fails(self, **inputs):
        if inputs["input_ids"].shape[1] > longest:
            raise IndexError("index 7 is out of range")
        return forward(self, **inputs)

    monkeypatch.setattr(transformers.BertModel, "forward", fails)
    assert converted(folder, text, tmp_path / "out", "--tau", "0.2", "--batch-size", "1") == 2
    told = f"BertModel does not run on batch {batch} of {text}: IndexError: index 7 is out of range"
    assert told in capsys.readouterr().err


def test_texts_are_paragraphs_in_batches(folder, text, tmp_path):
    found = texts.paragraphs(text)
    assert found[:2] == ["experts run", "few tokens choose them"]
    tokenizer = texts.load_tokenizer(folder)
    first, *_ = texts.tokenized(tokenizer, found, batch_size=2)
    assert first["input_ids"].shape == (2, 6)
    assert (first["attention_mask"] == 0).sum() == 2
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    assert texts.paragraphs(lines) == ["one", "two"]
    lines.write_text("\ufeffone\ntwo\n \t\nthree\n", encoding="utf-8")
    assert texts.paragraphs(lines) == ["one two", "three"], (
        "without a byte order mark; a blank line may have blanks"
    )
    lines.write_text(" \n\n")
    with pytest.raises(ValueError, match="has no text"):
        texts.paragraphs(lines)
