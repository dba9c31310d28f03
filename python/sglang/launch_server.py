"""`python -m sglang.launch_server`: parse the flags and serve until told to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.srt.errors import SglangError
from sglang.srt.server_args import ServerArgs, prepare_server_args


def run_server(server_args: ServerArgs) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return."""
    # Looked up when called: clients replace it.
    from sglang.srt.entrypoints import http_server

    http_server.launch_server(server_args)


def main(argv: Sequence[str]) -> None:
    """Run a server as the command line asks; a mistake in it ends the process with a message and status 1."""
    try:
        run_server(prepare_server_args(argv))
    except SglangError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
