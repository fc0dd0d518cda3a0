"""Small models of every kind that sadmoe converts, random weights, made from their config: no downloads."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from versions import transformers_before

D, F_ = 24, 60  # width and neurons: neither a multiple of 16, 60 = 2 * 2 * 3 * 5


@dataclass(frozen=True)
class Tiny:
    """build() gives the dense model, batch() what it is called with; the rest is what find_ffns must say.

    swappable: the activation is a module or an attribute.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    names: tuple[str, ...]
    adapter: str
    act: str
    gated: bool = False
    d: int = D
    f: int = F_
    needs: str | None = None
    swappable: bool = True

    def model(self) -> nn.Module:
        """A seeded model in evaluation mode; every weight, bias and norm is random, so that each matters."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            pytest.skip(f"needs {self.needs}")
        torch.manual_seed(0)
        model = self.build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.15)
        return model.eval()


def call(model: nn.Module, batch: Any) -> Tensor:
    """The first tensor that the model returns."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def waves() -> dict[str, Tensor]:
    """Two sounds of 19 and of 9 frames, as `WAVES` cuts them."""
    mask = torch.ones(2, 6400, dtype=torch.int64)
    mask[1, 3200:] = 0
    return {
        "input_values": torch.randn(2, 6400, generator=torch.Generator().manual_seed(2)) * mask,
        "attention_mask": mask,
    }


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def hidden() -> Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(2))


def _hf(model: str, config: str, **kw: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        return getattr(transformers, model)(getattr(transformers, config)(**kw))

    return build


SIZES = {"hidden_size": D, "intermediate_size": F_, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 50, "pad_token_id": 0}
LLM = TEXT | {"num_key_value_heads": 2, "head_dim": 6}
CLIP = SIZES | {"vocab_size": 50, "eos_token_id": 49}
IMAGE = {"image_size": 16, "patch_size": 8}
DINO = IMAGE | {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {
    "vocab_size": 50,
    "d_model": D,
    "d_ff": F_,
    "d_kv": 6,
    "num_layers": 1,
    "num_heads": 4,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 50,
    "n_embd": D,
    "n_inner": F_,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WAVES = SIZES | {
    "vocab_size": 50,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {
    "vocab_size": 50,
    "d_model": D,
    **{
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", F_))
    },
    "num_mel_bins": 8,
    "max_source_positions": 9,
    "max_target_positions": 16,
    **{f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "decoder_start"))},
}
OPT = {"vocab_size": 50, "hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": F_, "num_hidden_layers": 2}


def _layers(pattern: str, count: int = 2) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


def _t5_batch() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": tokens()["input_ids"]}


def _whisper_batch() -> dict[str, Tensor]:
    spectra = torch.randn(2, 8, 18, generator=torch.Generator().manual_seed(2))
    return {"input_features": spectra, "decoder_input_ids": tokens()["input_ids"]}


def _timm_vit(**kw: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 4, "num_classes": 5}
    return VisionTransformer(mlp_ratio=2.5, proj_drop_rate=0.1, **sizes, **kw)


def _timm_eva(**kw: Any) -> nn.Module:
    from timm.models.eva import Eva

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 4, "num_classes": 5}
    return Eva(mlp_ratio=2.5, swiglu_mlp=True, **sizes, **kw)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 2, 4, D, F_, dropout=0.1, num_classes=5)


def _torch_layer(**kw: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(D, 4, F_, batch_first=True, **kw)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, *args, **named):
        return self.make(*args, **named)


class Scaled(nn.Linear):
    """That holds more than a linear layer does."""

    def __init__(self, d: int, f: int):
        super().__init__(d, f)
        self.scale = nn.Parameter(torch.ones(f))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class UserFFN(nn.Module):
    """An FFN as users write it; act is a module, or a function of torch that forward calls."""

    def __init__(self, act: Any = F.relu, d: int = D, f: int = F_):
        super().__init__()
        self.expand, self.contract = nn.Linear(d, f), nn.Linear(f, d, bias=False)
        self.nonlinearity = act if isinstance(act, nn.Module) else None
        self.drop = nn.Dropout(0.25)
        self._functions = [act]  # in a list, as a closure would be: out of reach

    def forward(self, x: Tensor) -> Tensor:
        act = self.nonlinearity or self._functions[0]
        return self.drop(self.contract(act(self.expand(x))))


class UserGLU(nn.Module):
    """A gated FFN with biases, its linear layers in an order that no name gives away."""

    def __init__(self, d: int = D, f: int = F_):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(f, d), nn.Linear(d, f), nn.Linear(d, f, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(F.silu(self.c(x)) * self.b(x))


class Residual(nn.Module):
    """x + inner(norm(x))."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(D), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def _user(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(Residual(make()), Residual(make()))


def _plain_sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(D, F_), nn.ReLU(), nn.Linear(F_, D))


def _normed_sequential() -> nn.Module:
    inner = [nn.LayerNorm(D), nn.Linear(D, F_), nn.GELU(), nn.Dropout(0.1), nn.Linear(F_, D), nn.Dropout(0.1)]
    return nn.Sequential(*inner)


BERT = "encoder.layer.{}.intermediate"
HF = "transformers"
TINY: dict[str, Tiny] = {
    "bert": Tiny(_hf("BertModel", "BertConfig", **TEXT), tokens, _layers(BERT), "in_pair", "gelu", needs=HF),
    "bert classifier": Tiny(
        _hf("BertForSequenceClassification", "BertConfig", hidden_act="relu", **TEXT),
        tokens,
        _layers(f"bert.{BERT}"),
        "in_pair",
        "relu",
        needs=HF,
    ),
    "roberta": Tiny(
        _hf("RobertaForMaskedLM", "RobertaConfig", **TEXT),
        tokens,
        _layers(f"roberta.{BERT}"),
        "in_pair",
        "gelu",
        needs=HF,
    ),
    "roberta prenorm": Tiny(
        _hf("RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", **TEXT),
        tokens,
        _layers(f"{BERT}.dense"),
        "in_pair",
        "gelu",
        needs=HF,
    ),
    "albert": Tiny(
        _hf("AlbertModel", "AlbertConfig", embedding_size=16, **TEXT),
        tokens,
        ("encoder.albert_layer_groups.0.albert_layers.0.ffn",),
        "in_block",
        "gelu_tanh",
        needs=HF,
    ),
    "gpt2": Tiny(
        _hf("GPT2LMHeadModel", "GPT2Config", **GPT2),
        tokens,
        _layers("transformer.h.{}.mlp"),
        "whole_plain",
        "gelu_tanh",
        needs=HF,
    ),
    "opt": Tiny(
        _hf("OPTForCausalLM", "OPTConfig", num_attention_heads=4, **OPT),
        tokens,
        _layers("model.decoder.layers.{}.fc1"),
        "in_block",
        "relu",
        needs=HF,
    ),
    "t5": Tiny(
        _hf("T5ForConditionalGeneration", "T5Config", **T5),
        _t5_batch,
        ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"),
        "whole_plain",
        "relu",
        needs=HF,
    ),
    "t5 v1.1": Tiny(
        _hf("T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", **T5),
        _t5_batch,
        ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"),
        "whole_gated",
        "gelu_tanh",
        gated=True,
        needs=HF,
    ),
    "llama": Tiny(
        _hf("LlamaForCausalLM", "LlamaConfig", mlp_bias=True, **LLM),
        tokens,
        _layers("model.layers.{}.mlp"),
        "whole_gated",
        "silu",
        gated=True,
        needs=HF,
    ),
    "qwen3": Tiny(
        _hf("Qwen3ForCausalLM", "Qwen3Config", **(LLM | {"head_dim": 12})),
        tokens,
        _layers("model.layers.{}.mlp"),
        "whole_gated",
        "silu",
        gated=True,
        needs=HF,
    ),
    "gemma": Tiny(
        _hf("GemmaForCausalLM", "GemmaConfig", **LLM),
        tokens,
        _layers("model.layers.{}.mlp"),
        "whole_gated",
        "gelu_tanh",
        gated=True,
        needs=HF,
    ),
    "phi3": Tiny(
        _hf("Phi3ForCausalLM", "Phi3Config", **{k: v for k, v in LLM.items() if k != "head_dim"}),
        tokens,
        _layers("model.layers.{}.mlp"),
        "whole_fused",
        "silu",
        gated=True,
        needs=HF,
    ),
    "wav2vec2": Tiny(
        _hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES),
        waves,
        _layers("wav2vec2.encoder.layers.{}.feed_forward"),
        "whole_plain",
        "gelu",
        needs=HF,
    ),
    "whisper": Tiny(
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        _whisper_batch,
        ("model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"),
        "in_block",
        "gelu",
        needs=HF,
    ),
    "vit": Tiny(
        _hf("ViTForImageClassification", "ViTConfig", **IMAGE, **SIZES),
        pixels,
        _layers("vit.encoder.layer.{}.intermediate" if transformers_before("5.9") else "vit.layers.{}.mlp"),
        "in_pair" if transformers_before("5.9") else "whole_plain",
        "gelu",
        needs=HF,
    ),
    "clip": Tiny(
        _hf("CLIPModel", "CLIPConfig", text_config=CLIP, vision_config=CLIP | IMAGE, projection_dim=8),
        lambda: tokens() | pixels(),
        (*_layers("text_model.encoder.layers.{}.mlp"), *_layers("vision_model.encoder.layers.{}.mlp")),
        "whole_plain",
        "quick_gelu",
        needs=HF,
    ),
    "nemotron": Tiny(
        _hf("NemotronForCausalLM", "NemotronConfig", **LLM),
        tokens,
        _layers("model.layers.{}.mlp"),
        "whole_plain",
        "relu2",
        needs=HF,
    ),
    "dinov2": Tiny(
        _hf("Dinov2Model", "Dinov2Config", mlp_ratio=3, **DINO),
        pixels,
        _layers("encoder.layer.{}.mlp"),
        "whole_plain",
        "gelu",
        f=72,
        needs=HF,
    ),
    "dinov2 swiglu": Tiny(
        _hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True, **DINO),
        pixels,
        _layers("encoder.layer.{}.mlp"),
        "whole_fused" if transformers_before("5.18") else "whole_gated",
        "silu",
        gated=True,
        f=64,
        needs=HF,
        swappable=not transformers_before("5.18"),
    ),
    "timm vit": Tiny(
        _timm_vit,
        lambda: pixels()["pixel_values"],
        _layers("blocks.{}.mlp"),
        "whole_plain",
        "gelu",
        needs="timm",
    ),
    "timm eva02": Tiny(
        _timm_eva,
        lambda: pixels()["pixel_values"],
        _layers("blocks.{}.mlp"),
        "whole_fused",
        "silu",
        gated=True,
        needs="timm",
    ),
    "timm eva02 split": Tiny(
        lambda: _timm_eva(swiglu_align_to=4),
        lambda: pixels()["pixel_values"],
        _layers("blocks.{}.mlp"),
        "whole_gated",
        "silu",
        gated=True,
        needs="timm",
    ),
    "torchvision vit": Tiny(
        _torchvision_vit,
        lambda: pixels()["pixel_values"],
        _layers("encoder.layers.encoder_layer_{}.mlp"),
        "whole_plain",
        "gelu",
        needs="torchvision",
    ),
    "torch layer": Tiny(lambda: _torch_layer(activation="gelu"), hidden, ("linear1",), "in_block", "gelu"),
    "torch encoder": Tiny(
        lambda: nn.TransformerEncoder(_torch_layer(), 2),
        hidden,
        _layers("layers.{}.linear1"),
        "in_block",
        "relu",
    ),
    "torch transformer": Tiny(
        lambda: nn.Transformer(D, 4, 1, 1, F_, activation=F.gelu, batch_first=True),
        lambda: (hidden(), hidden()),
        ("encoder.layers.0.linear1", "decoder.layers.0.linear1"),
        "in_block",
        "gelu",
    ),
    "user module": Tiny(
        _user(lambda: UserFFN(nn.GELU(approximate="tanh"))),
        hidden,
        _layers("{}.inner"),
        "whole_plain",
        "gelu_tanh",
    ),
    "user functional relu": Tiny(
        _user(UserFFN), hidden, _layers("{}.inner"), "whole_plain", "relu", swappable=False
    ),
    "user functional gelu": Tiny(
        _user(lambda: UserFFN(F.gelu)), hidden, _layers("{}.inner"), "whole_plain", "gelu", swappable=False
    ),
    "user glu": Tiny(
        _user(UserGLU), hidden, _layers("{}.inner"), "whole_gated", "silu", gated=True, swappable=False
    ),
    "sequential": Tiny(_user(_plain_sequential), hidden, _layers("{}.inner"), "whole_plain", "relu"),
    "sequential alone": Tiny(_plain_sequential, hidden, ("0",), "in_block", "relu"),
    "sequential with norm": Tiny(
        _user(_normed_sequential), hidden, _layers("{}.inner.1"), "in_block", "gelu"
    ),
}
