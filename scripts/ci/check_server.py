"""check_server.py VERSION, run where sglang is installed: it is of that version, and no other left files in it."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import distribution, version
from pathlib import Path


def main(expected: str) -> None:
    """Exit 1 with what is wrong, or print what was seen."""
    assert re.fullmatch(r"0\.5\.12\+lora\.\d+", expected), expected
    assert version("sglang") == expected, version("sglang")
    import sglang

    assert sglang.__version__ == expected, sglang.__version__
    package = Path(sglang.__file__).parent
    assert package.is_relative_to(sys.prefix), package
    recorded = {Path(str(file.locate())).resolve() for file in distribution("sglang").files or []}
    there = {Path(folder, name).resolve() for folder, _, names in os.walk(package) for name in names}
    strange = sorted(str(path) for path in there - recorded if path.suffix != ".pyc")
    assert not strange, f"files of another sglang: {strange[:5]} and so on, {len(strange)} in all"
    sys.stdout.write(f"importlib.metadata.version('sglang') == {expected!r}; {len(recorded)} files, no others\n")


if __name__ == "__main__":
    main(sys.argv[1])
