"""Runs every python block of a Markdown file, each in a fresh namespace: `python run_readme.py README.md`."""

import re
import sys
from pathlib import Path


def main(path: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", Path(path).read_text(), flags=re.DOTALL)
    if not blocks:
        sys.exit(f"{path} has no python block")
    for number, block in enumerate(blocks, 1):
        print(f"block {number} of {len(blocks)}", flush=True)
        exec(compile(block, f"{path}, block {number}", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(sys.argv[1])
