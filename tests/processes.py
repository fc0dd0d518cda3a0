"""Several processes that belong together: where one fails, the others would wait for it for ever."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

TESTS = Path(__file__).parent


def run_together(code: str, ranks: int, *args: str, env=None, seconds: float = 300) -> list[int]:
    """Exit statuses of Python processes that run the code, each with its rank and args; killed where one fails."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(rank), *args], cwd=TESTS, env=env and env(rank)
        )
        for rank in range(ranks)
    ]
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            statuses = [worker.poll() for worker in workers]
            if None not in statuses or any(statuses):
                break
            time.sleep(0.05)
        return [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
