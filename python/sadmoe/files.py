"""Tensors and JSON in one safetensors file, written so that a kill leaves the old file or the new one."""

import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def check_new(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError where path is a directory, or there and not to be overwritten, FileNotFoundError where its
    folder is not there."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; give a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; pass overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written, for there is no folder {path.parent}: make it first"
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write beside that one, by a name that no other writer has. It takes its place at once in the end,
    or is gone where anything is raised."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write(path: Path, tensors: Mapping[str, Tensor], key: str, header: Any) -> None:
    """Replaces the file at once. tensors: on the CPU, contiguous, no two in one storage.   header: goes under `key`."""
    text = json.dumps(header)
    with replacing(path) as beside:
        save_file(dict(tensors), beside, metadata={"format": "pt", key: text, _crc_key(key): _crc(text)})


def read(path: Path, key: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and what is under `key`. Raises ValueError where the file is not one that `write` wrote with it."""
    try:
        with safe_open(path, "pt") as file:
            found = header(file.metadata() or {}, key)
            # cloned, because the file is only mapped: whoever cut it short later would end the process
            return {name: file.get_tensor(name).clone() for name in file.keys()}, found  # noqa: SIM118
    except KeyError as error:
        raise ValueError(f"it has no {error} in its metadata") from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def header(metadata: Mapping[str, str], key: str) -> Any:
    """What `write` was given. Raises KeyError where there is none, ValueError where it is not what was written."""
    text = metadata[key]
    if metadata.get(_crc_key(key), _crc(text)) != _crc(text):  # files of earlier versions have none
        raise ValueError("the checksum of its metadata is wrong")
    return json.loads(text)


def _crc_key(key: str) -> str:
    return f"{key} crc32"


def _crc(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `write` takes them: copies."""
    return {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Of names, dtypes, shapes and bits; what else a state_dict holds does not count."""
    crc = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = crc32(tensor, crc)
    return crc


def crc32(tensor: Tensor, start: int = 0) -> int:
    """Of the bits of one tensor, going on from `start`."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)
