"""The command line of a bench: its parser, what was typed, and the files that it writes."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from sadmoe.files import replacing
from sadmoe.outputs import check_files


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is that docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def typed() -> str:
    """The command that runs."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def check_writable(parser: argparse.ArgumentParser, *paths: Path | None) -> None:
    """Ends with an error where one of these files, which may be there, could not be written after hours of work."""
    try:
        check_files([path for path in paths if path is not None], force=True)
    except OSError as error:
        parser.error(str(error))


def write(path: Path, text: str) -> None:
    """At once: whoever is cut off leaves what was there before, whole."""
    with replacing(path) as beside:
        beside.write_text(text)


def write_json(path: Path, **about: Any) -> None:
    """That, and the command."""
    write(path, json.dumps({"command": typed(), **about}, indent=1) + "\n")
