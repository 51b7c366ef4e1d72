"""Unique names of processes."""

import os
import secrets
import socket


def process_name() -> str:
    """Return a new name: host, process id, and a random part, since containers may share both."""
    host = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
