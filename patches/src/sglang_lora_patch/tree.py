"""An installed SGLang on disk: finding it, changing its files, putting them back.

Owns the folder `_lora_patch` inside the installed package: our runtime module, the originals and a manifest with the
hash of every file before and after. Invariants: a file is only ever replaced whole and by a new inode (package managers
share files between environments through hard links); the originals are on disk before the first replacement; whatever
goes wrong, the files end up as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import __version__, transform, versions
from .transform import Refusal

FOLDER = "_lora_patch"
State = Literal["clean", "patched", "damaged", "stale"]

# What a freshly started interpreter reports about the patched classes.
_PROBE = """
import importlib, json
runtime = importlib.import_module("sglang._lora_patch.runtime")
manager = importlib.import_module("sglang.srt.managers.tokenizer_manager").TokenizerManager
registry = importlib.import_module("sglang.srt.lora.lora_registry").LoRARegistry
print("\\n" + json.dumps({
    "TokenizerManager": sorted(runtime.patched_methods(manager)),
    "LoRARegistry": sorted(runtime.patched_methods(registry)),
}))
"""


@dataclass(frozen=True)
class Installation:
    """One `sglang` package folder and its version."""

    package: Path
    version: str

    @property
    def folder(self) -> Path:
        """The folder this patch keeps inside the package."""
        return self.package / FOLDER

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What `apply` noted, if it was here."""
        try:
            noted: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        except FileNotFoundError:
            return None
        return noted


def version_of(package: Path) -> str | None:
    """The version noted beside a package folder, else the one this interpreter has installed."""
    # A checkout earlier on the path than an installed one has its own version, next to it.
    beside = [each.version for each in importlib.metadata.distributions(name="sglang", path=[str(package.parent)])]
    if beside:
        return beside[0]
    try:
        return importlib.metadata.version("sglang") if package == _imported() else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _imported() -> Path | None:
    """The package folder this interpreter would import."""
    spec = importlib.util.find_spec("sglang")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def find(site: Path | None = None, assume: str | None = None) -> Installation:
    """Find the installation in folder `site` (one that holds `sglang/`), or the one this interpreter would import."""
    package = _imported() if site is None else site / "sglang"
    if package is None:
        raise Refusal("sglang is not installed for this interpreter; name its folder with --site")
    if not (package / "srt").is_dir():
        raise Refusal(f"{package} is no sglang package")
    version = assume or version_of(package)
    if version is None:
        raise Refusal(f"the version of {package} is unknown; say which with --assume VERSION")
    return Installation(package.resolve(), version)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def state(installation: Installation) -> State:
    """Tell an untouched tree, a patched one, one with changed files and one reinstalled over the patch apart."""
    noted = installation.manifest
    if noted is None:
        return "clean"
    kinds = set()
    for path, hashes in noted["files"].items():
        file = installation.package / path
        now = _hash(file.read_bytes()) if file.is_file() else ""
        kinds.add("patched" if now == hashes["patched"] else "unpatched" if not _calls_us(file) else "other")
    runtime = installation.folder / "runtime.py"
    if kinds == {"patched"} and runtime.is_file() and _hash(runtime.read_bytes()) == noted["runtime"]:
        return "patched"
    return "stale" if kinds == {"unpatched"} else "damaged"


def _calls_us(file: Path) -> bool:
    return file.is_file() and transform.is_patched(file.read_bytes())


def _replace(file: Path, data: bytes, like: os.stat_result, *, keep_time: bool) -> None:
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(temporary, like.st_mode & 0o7777)
        if keep_time:
            os.utime(temporary, ns=(like.st_mtime_ns, like.st_mtime_ns))
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        cached.unlink(missing_ok=True)


def _save(installation: Installation, files: Mapping[str, bytes]) -> None:
    """Write the runtime module, the originals and the manifest."""
    folder = installation.folder
    folder.mkdir()
    runtime = (Path(__file__).parent / "runtime.py").read_bytes()
    (folder / "runtime.py").write_bytes(runtime)
    (folder / "__init__.py").write_text('"""Put here by sglang-lora-patch, with the originals of what it changed."""\n')
    noted: dict[str, Any] = {"tool": __version__, "sglang": installation.version, "runtime": _hash(runtime)}
    noted["files"] = {}
    for path, data in files.items():
        original = (installation.package / path).read_bytes()
        kept = folder / "original" / f"{path}.orig"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(original)
        shutil.copystat(installation.package / path, kept)
        noted["files"][path] = {"original": _hash(original), "patched": _hash(data)}
    (folder / "manifest.json").write_text(json.dumps(noted, indent=2) + "\n")


def apply(installation: Installation, *, check_import: bool = True) -> list[str]:
    """Patch the installation and return the changed paths; on any failure leave it as it was and raise."""
    reason = versions.why_not(installation.version)
    if reason is not None:
        raise Refusal(reason)
    now = state(installation)
    if now in ("patched", "damaged"):
        raise Refusal(f"{installation.package} is {now} already; `revert` first")
    files = transform.plan(installation.package)
    if now == "stale":
        shutil.rmtree(installation.folder)
    elif installation.folder.exists():
        raise Refusal(f"{installation.folder} is in the way and is not ours")
    try:
        _save(installation, files)
        for path, data in files.items():
            file = installation.package / path
            _replace(file, data, file.stat(), keep_time=False)
        if check_import:
            verify(installation)
    except BaseException:
        _restore(installation)
        raise
    return sorted(files)


def _restore(installation: Installation) -> None:
    original = installation.folder / "original"
    for kept in sorted(original.rglob("*.orig")):
        file = installation.package / kept.relative_to(original).with_suffix("")
        data = kept.read_bytes()
        if not file.is_file() or file.read_bytes() != data:
            _replace(file, data, kept.stat(), keep_time=True)
    shutil.rmtree(installation.folder, ignore_errors=True)


def revert(installation: Installation, *, force: bool = False) -> list[str]:
    """Put the originals back, bit for bit, and return their paths."""
    noted = installation.manifest
    if noted is None:
        raise Refusal(f"{installation.package} is not patched")
    now = state(installation)
    if now == "stale":
        shutil.rmtree(installation.folder)
        return []
    if now == "damaged" and not force:
        raise Refusal(f"files in {installation.package} were changed after the patch; --force puts the originals back")
    for path, hashes in noted["files"].items():
        kept = installation.folder / "original" / f"{path}.orig"
        if not kept.is_file() or _hash(kept.read_bytes()) != hashes["original"]:
            raise Refusal(f"the original of {path} is missing or changed; reinstall sglang {noted['sglang']}")
    _restore(installation)
    return sorted(noted["files"])


def verify(installation: Installation) -> dict[str, list[str]]:
    """Check the files and import them in a fresh interpreter; return the patched methods by class."""
    if state(installation) != "patched":
        raise Refusal(f"{installation.package} is {state(installation)}, not patched")
    imported = _imported()
    here = imported is not None and imported.resolve() == installation.package
    path = [] if here else [str(installation.package.parent)]
    path += [each for each in (os.environ.get("PYTHONPATH"),) if each]
    with tempfile.TemporaryDirectory() as elsewhere:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            check=False,
        )
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no output"])[-1]
        raise Refusal(
            f"the patched sglang does not import here ({last}). Where stock sglang does not import either, for "
            f"example without a GPU driver, use --no-import"
        )
    lines = [line for line in probe.stdout.splitlines() if line.startswith("{")]
    seen: dict[str, list[str]] = json.loads(lines[-1])
    wanted = {
        "TokenizerManager": sorted(each.method for each in (*transform.MANAGER.methods, *transform.CONTROL.methods)),
        "LoRARegistry": sorted(each.method for each in transform.REGISTRY.methods),
    }
    if seen != wanted:
        raise Refusal(f"another sglang is imported than the one in {installation.package}, or a part of it: {seen}")
    return seen
