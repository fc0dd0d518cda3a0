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
def told_of(path: Path) -> Iterator[None]:
    """Errors of writing from inside, as of a full disk, name that path, where they name none."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


@contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Gives a file to write beside that one, by a name that no other writer has, or `beside`. It takes its place at
    once in the end, or is gone where anything is raised."""
    path = path.resolve()  # the file that a link leads to
    if path.exists() and not path.is_file():  # a device, a pipe
        yield path
        return
    if beside is None:
        beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with told_of(path):
            yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write(
    path: Path, tensors: Mapping[str, Tensor], key: str, header: Any, beside: Path | None = None
) -> None:
    """Replaces the file at once. tensors: on the CPU, contiguous, no two in one storage.   header: goes under `key`.
    beside: see `replacing`.

    "`key` tensors" holds a checksum of each tensor, "`key` crc32" one of both texts."""
    text, checksums = json.dumps(header), json.dumps({name: crc32(t) for name, t in tensors.items()})
    metadata = {
        "format": "pt",
        key: text,
        f"{key} tensors": checksums,
        f"{key} crc32": _crc(text + checksums),
    }
    with replacing(path, beside) as new:
        save_file(dict(tensors), new, metadata=metadata)


def read(path: Path, key: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and what is under `key`. Raises ValueError where the file is not one that `write` wrote with it, or
    a bit of it has changed."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            texts = (key, f"{key} tensors", f"{key} crc32")
            if missing := [text for text in texts if text not in metadata]:
                raise ValueError(f"it has no {missing[0]!r} in its metadata")
            # cloned, because the file is only mapped: whoever cut it short later would end the process
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file, or is cut short: {error}") from error
    text, checksums, crc = (metadata[text] for text in texts)
    if crc != _crc(text + checksums):
        raise ValueError("the checksum of its metadata is wrong; copy or save it again")
    of_tensors = json.loads(checksums)
    if of_tensors.keys() != tensors.keys():
        raise ValueError("its list of tensors is not what it holds")
    if wrong := [name for name, crc in of_tensors.items() if crc32(tensors[name]) != crc]:
        raise ValueError(f"the checksum of {wrong[0]} is wrong; copy or save it again")
    return tensors, json.loads(text)


def _crc(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `write` takes them: copies."""
    return {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Of names, dtypes, shapes and bits; what has no bits of its own does not count."""
    crc = 0
    for name, tensor in tensors.items():
        if not has_bits(tensor):
            continue
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = crc32(tensor, crc)
    return crc


def has_bits(value: Any) -> bool:
    """Whether it is a tensor with bits of its own: not on meta, no quantised or sharded kind of tensor."""
    return isinstance(value, Tensor) and not value.is_meta and type(value.data) is Tensor


def crc32(tensor: Tensor, start: int = 0) -> int:
    """Of the bits of one tensor, going on from `start`."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)
