"""The command line of a bench: its parser, and what was typed, for the files that it writes."""

import argparse
import os
import shlex
import sys


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is that docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def typed() -> str:
    """The command that runs."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
