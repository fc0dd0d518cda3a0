"""Files of `sadmoe.save`, read and edited by hand."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def metadata(path: Path) -> dict:
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    return json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]


def loaded(path: Path) -> dict[str, Tensor]:
    """Copies: what is loaded may be mapped from the file."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def rewrite(
    path: Path, header: Callable[[dict], None] = lambda h: None, tensors: Callable = lambda t: None
) -> None:
    """The file with its header and its tensors edited."""
    values, meta = loaded(path), metadata(path)
    data = json.loads(meta["sadmoe"])
    header(data)
    tensors(values)
    text = json.dumps(data)
    crc = str(zlib.crc32((text + meta["sadmoe tensors"]).encode()))
    save_file(values, path, meta | {"sadmoe": text, "sadmoe crc32": crc})


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
