"""The command line: `python -m sglang_lora_patch apply|verify|revert|status`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import tree
from .transform import Refusal


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_lora_patch", description="Repair stock SGLang's LoRA count."
    )
    parser.add_argument("command", choices=("apply", "verify", "revert", "status"))
    parser.add_argument("--site", type=Path, metavar="DIR", help="the folder that holds sglang/ (default: as imported)")
    parser.add_argument("--assume", metavar="VERSION", help="take the sglang there for this release")
    parser.add_argument("--no-import", action="store_true", help="apply without importing the result")
    parser.add_argument("--force", action="store_true", help="revert although files were changed after the patch")
    return parser


def _run(arguments: argparse.Namespace) -> str:
    found = tree.find(arguments.site, arguments.assume)
    where = f"sglang {found.version} in {found.package}"
    if arguments.command == "apply":
        changed = tree.apply(found, check_import=not arguments.no_import)
        checked = "not imported" if arguments.no_import else "imported and checked"
        return "\n".join([f"patched {where} ({checked}):", *(f"  {path}" for path in changed)])
    if arguments.command == "verify":
        methods = tree.verify(found)
        return "\n".join([f"{where} is patched:", *(f"  {cls}: {', '.join(names)}" for cls, names in methods.items())])
    if arguments.command == "revert":
        restored = tree.revert(found, force=arguments.force)
        return "\n".join([f"put back {where}:", *(f"  {path}" for path in restored)])
    return f"{where}: {tree.state(found)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it was done, 1 with the reason on stderr when it was not."""
    try:
        print(_run(_parser().parse_args(argv)))  # noqa: T201
    except (Refusal, OSError) as error:
        print(f"sglang-lora-patch: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
