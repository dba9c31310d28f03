"""requirements_of.py WHEEL: prints what it requires, without its extras, one line each."""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser

if __name__ == "__main__":
    wheel = zipfile.ZipFile(sys.argv[1])
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    sys.stdout.writelines(f"{line}\n" for line in lines if "extra ==" not in line)
