"""Arguments that several commands of the command line share."""

import argparse
from typing import Any

from sadmoe.texts import paragraphs, tokenized


def add_text(command: argparse.ArgumentParser) -> None:
    """How text becomes batches."""
    command.add_argument(
        "--batch-size", type=int, default=16, help="paragraphs in a batch (default: %(default)s)"
    )
    command.add_argument(
        "--max-length",
        type=int,
        default=128,
        help="tokens after which a paragraph is cut (default: %(default)s)",
    )


def add_common(command: argparse.ArgumentParser) -> None:
    """What every command has."""
    command.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    command.add_argument("--force", action="store_true", help="replace what a former run wrote")


def batches_of(arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """The paragraphs of --text, short ones first, as batches."""
    texts = sorted(paragraphs(arguments.text), key=len)
    return tokenized(tokenizer, texts, batch_size=arguments.batch_size, max_length=arguments.max_length)
