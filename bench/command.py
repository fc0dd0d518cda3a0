"""The command that runs, for the files that it writes."""

import os
import shlex
import sys


def command() -> str:
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
