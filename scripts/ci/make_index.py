"""A package index (PEP 503) as a folder of static pages: make_index.py OUT URL=SHA256SUMS …

SHA256SUMS lists the wheels that lie under URL, as sha256sum writes it. One index for each kind of GPU, since all wheels
of sgl-kernel have one name and pip would take the highest local version: OUT/cu130/, OUT/rocm/, OUT/cpu/.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from urllib.parse import quote

PAGE = """<!DOCTYPE html>
<html>
<head><meta charset="utf-8"><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head>
<body>
{links}
</body>
</html>
"""


def project(wheel: str) -> str:
    """The normalized name of the distribution: sgl-kernel."""
    return re.sub(r"[-_.]+", "-", wheel.split("-")[0]).lower()


def variant(wheel: str) -> str:
    """Which index it is for; "" is for every one."""
    if project(wheel) != "sgl-kernel":
        return ""
    _, plus, local = wheel.split("-")[1].partition("+")
    return local if plus else "cpu"


def read_sums(url: str, sums: Path) -> dict[str, str]:
    """The address of every wheel, digest included, by its file name."""
    pairs = (re.split(r" [ *]", line, maxsplit=1) for line in sums.read_text().splitlines())
    return {name: f"{url.rstrip('/')}/{quote(name)}#sha256={digest}" for digest, name in pairs if name.endswith(".whl")}


def write_page(folder: Path, links: dict[str, str]) -> None:
    """One page of links."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f'<a href="{escape(url)}">{escape(text)}</a><br>' for text, url in sorted(links.items()))
    (folder / "index.html").write_text(PAGE.format(title=escape(folder.name), links="\n".join(lines)))


def main(out: Path, sources: list[str]) -> None:
    """Write all pages."""
    wheels: dict[str, str] = {}
    for source in sources:
        url, _, sums = source.rpartition("=")
        wheels |= read_sums(url, Path(sums))
    indexes = sorted({variant(name) for name in wheels} - {""})
    for index in indexes:
        projects: dict[str, dict[str, str]] = defaultdict(dict)
        for name, url in wheels.items():
            if variant(name) in ("", index):
                projects[project(name)][name] = url
        for name, links in projects.items():
            write_page(out / index / name, links)
        write_page(out / index, {name: f"{name}/" for name in projects})
    write_page(out, {index: f"{index}/" for index in indexes})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
