"""Ports for processes that find each other, of tests that may run at the same time."""

import socket


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
