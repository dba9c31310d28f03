"""The `sglang` console script: `sglang serve …` and `sglang version`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sglang.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command; `argv` is the command line without the program's name, default `sys.argv[1:]`."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sglang")
    commands = parser.add_subparsers(dest="command", required=True)
    # Its flags are the server's, --help included: they are parsed there.
    commands.add_parser("serve", help="start a server (sglang serve --help lists its flags)", add_help=False)
    commands.add_parser("version", help="print the version")
    known, rest = parser.parse_known_args(arguments)
    if known.command == "serve":
        from sglang.launch_server import main as serve

        serve(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        print(f"sglang {__version__}")
