"""Runs the python blocks of Markdown files, each in a fresh namespace, in the current folder; with --bash also those.

python run_blocks.py README.md
"""

import argparse
import re
import subprocess
from pathlib import Path

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--bash", action="store_true")
    args = parser.parse_args()
    for path in args.files:
        blocks = [found for found in BLOCK.findall(path.read_text()) if args.bash or found[0] == "python"]
        if not blocks:
            parser.error(f"{path} has no block to run")
        for number, (language, code) in enumerate(blocks, 1):
            print(f"{path.name}, block {number} of {len(blocks)}", flush=True)
            if language == "python":
                exec(compile(code, f"{path}, block {number}", "exec"), {"__name__": "__main__"})
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)


if __name__ == "__main__":
    main()
