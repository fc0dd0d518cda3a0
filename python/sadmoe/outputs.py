"""Folders and files that a command writes: what is there already is replaced only when asked, and lost never."""

import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# What a model is saved in, of which the next one may have less: none of the former one's is left beside it.
SAVED = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(config|generation_config)\.json|tokenizer(_config)?\.(json|model)"
    r"|(special_tokens_map|added_tokens|vocab|(pre|video_pre)?processor_config|chat_template)\.json|vocab\.txt|merges\.txt"
    r"|chat_template\.jinja|(spiece|sentencepiece(\.bpe)?|source|target)\.(model|spm)|vocab\.bpe|additional_chat_templates"
    r"|(modules|config_sentence_transformers|sentence_bert_config)\.json"
)


LEFT = re.compile(r"\.sadmoe\.[0-9a-f]{8}\.(new|former)")  # what `replaced` writes in, until it is done
logger = logging.getLogger(__name__)


def check_folder(folder: Path, force: bool, reads: Sequence[Path] = ()) -> None:
    """Raises an error unless `folder` can be written: absent or empty, or with `force` what sadmoe wrote, and nothing
    of what the command `reads` is in it. Leaves all as it is."""
    if inside := [path for path in reads if path.resolve().is_relative_to(folder.resolve())]:
        where = "is" if inside[0].resolve() == folder.resolve() else f"would hold {inside[0]}, which is"
        raise ValueError(
            f"{folder} {where} read by this command, and would be replaced: write to another folder"
        )
    above = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, and a folder is to be written: choose another name")
    if not above.is_dir():
        raise NotADirectoryError(f"{folder} cannot be written: {above} is a file")
    if left := [path for path in folder.iterdir() if LEFT.fullmatch(path.name)] if folder.exists() else []:
        names = ", ".join(str(path) for path in left)
        logger.warning(
            "of a command that was killed while it saved, and of no use if it runs no more: %s", names
        )
    if not folder.exists() or all(path in left for path in folder.iterdir()):
        check_writable(above, folder)
        return
    if not force:
        raise FileExistsError(f"{folder} is not empty: choose another folder, or replace it with --force")
    if not _is_ours(folder):
        raise FileExistsError(f"{folder} was not written by sadmoe, so --force does not replace it")
    check_writable(folder, folder)


def place_for(folder: Path, force: bool) -> Path:
    """Where to write in the end what `check_folder` allowed at the start: that folder, or a new one beside it where
    somebody has filled it since. So neither is lost."""
    try:
        check_folder(folder, force)
    except (FileExistsError, NotADirectoryError):
        whole = folder.resolve()  # "." has no name
        return whole.with_name(f"{whole.name}-{secrets.token_hex(4)}")
    return folder


def check_files(paths: Sequence[Path], force: bool, reads: Sequence[Path] = ()) -> None:
    """Raises an error unless each of them can be written: absent, or with `force` a file, in a folder that is there,
    and neither what the command `reads` nor a file of a model in a folder that it reads."""
    for path in paths:
        whole = path.resolve()
        if any(
            whole == read.resolve() or (whole.is_relative_to(read.resolve()) and SAVED.fullmatch(whole.name))
            for read in reads
        ):
            raise ValueError(f"{path} is read by this command, and would be replaced: write to another file")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, and a file is to be written: choose another name")
        if path.exists() and not force:
            raise FileExistsError(f"{path} is there already: choose another, or replace it with --force")
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{path} cannot be written, for there is no folder {path.parent}: make it first"
            )
        if path.exists() and not path.is_file():  # a device, a pipe
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} cannot be written: Permission denied")
        else:  # it is written beside, and renamed
            check_writable(path.resolve().parent, path)


def files_for(paths: Sequence[Path], force: bool) -> list[Path]:
    """Where to write in the end what `check_files` allowed at the start: those files, or new ones beside them where
    somebody has written one since. So neither is lost."""
    try:
        check_files(paths, force)
    except (FileExistsError, IsADirectoryError):
        mark = secrets.token_hex(4)
        return [path.with_name(f"{path.stem}-{mark}{path.suffix}") for path in paths]
    return list(paths)


def check_writable(place: Path, wanted: Path) -> None:
    """Raises PermissionError, or what else the system says, where nothing can be made in the folder `place`."""
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise type(error)(f"{wanted} cannot be written: {error.strerror} in {place}") from error


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, beside that one or, where it is there, inside it. In the end what is new takes its
    place, and the model that was there goes; all else stays, for it may be the user's. Whatever is raised, `folder` is
    as it was. It stays the same folder, for somebody may be in it."""
    folder = folder.resolve()
    place = folder if folder.exists() else folder.parent
    new, former = (place / f".sadmoe.{secrets.token_hex(4)}.{kind}" for kind in ("new", "former"))
    made = [above for above in (folder.parent, *folder.parent.parents) if not above.exists()]
    moved: list[tuple[Path, Path]] = []
    try:
        new.mkdir(parents=True)
        yield new
        if place == folder:
            _exchange(new, folder, former, moved, keep=(new, former))
        else:
            new.rename(folder)
    except BaseException:
        for before, after in reversed(moved):
            if after.exists() and not before.exists():  # the last one may not have been moved yet
                after.rename(before)
        for left in (new, former):
            shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):  # somebody else's may be in them
            for above in made:
                above.rmdir()
        raise
    for left in (new, former):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(
    new: Path, folder: Path, former: Path, moved: list[tuple[Path, Path]], keep: Sequence[Path] = ()
) -> None:
    """Moves what is in `new` into the folder, and what it takes the place of, or is of a model saved there, to
    `former`. moved: from where to where, so far.   keep: what stays where it is."""
    former.mkdir()

    def move(path: Path, to: Path) -> None:
        moved.append((path, to / path.name))
        path.rename(to / path.name)

    for path in [path for path in folder.iterdir() if path not in keep]:
        if path.is_dir() and not path.is_symlink() and (new / path.name).is_dir():
            _exchange(new / path.name, path, former / path.name, moved)
        elif (new / path.name).exists() or SAVED.fullmatch(path.name):
            move(path, former)
    for path in [path for path in new.iterdir() if not (folder / path.name).exists()]:
        move(path, folder)


def _is_ours(folder: Path) -> bool:
    """Whether it holds a converted model, or what the demo wrote."""
    for place in (folder, *folder.glob(".sadmoe.*.former")):  # a kill may have left it there
        with suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((place / "config.json").read_text())
            if config["quantization_config"]["quant_method"] == "sadmoe":
                return True
    return _is_of_the_demo(folder / "demo.json")


def _is_of_the_demo(file: Path) -> bool:
    """Whether it is the demo's table: rows, with the FLOPs at each."""
    try:
        rows = json.loads(file.read_text())
        return bool(rows) and all("tau" in row and "flops" in row for row in rows)
    except (OSError, ValueError, TypeError):
        return False
