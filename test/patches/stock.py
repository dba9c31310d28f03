"""Stock releases in a scratch folder: their wheels, their trees before and after the patch, and runs of the driver.

The folder is `$STOCK_SGLANG`, or `stock-sglang` in the folder for temporary files; `patches/scripts/stock_venv.sh`
makes the environment in it. Nothing is fetched unless asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "patches" / "src"
HOME = Path(os.environ.get("STOCK_SGLANG") or Path(tempfile.gettempdir()) / "stock-sglang")
PYTHON = HOME / "venv" / "bin" / "python"
HOW = "patches/scripts/stock_venv.sh makes the scratch environment, patches/scripts/table.py fetches the wheels"


def environment():
    """One thread, no network, our package importable."""
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SOURCES), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **ours}


def wheel(version, *, fetch=False):
    """The wheel of a release, or None where it is not there and cannot be had."""
    folder = HOME / "wheels"
    found = sorted(folder.glob(f"sglang-{version}-*.whl"))
    if not found and fetch:
        command = [str(PYTHON), "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
        subprocess.run([*command, f"sglang=={version}"], check=False)
        found = sorted(folder.glob(f"sglang-{version}-*.whl"))
    return found[0] if found else None


def stock_tree(version, *, fetch=False):
    """The unpacked wheel (the folder that holds `sglang/`), or None."""
    tree = HOME / "trees" / version / "stock"
    if not tree.exists():
        archive = wheel(version, fetch=fetch)
        if archive is None:
            return None
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent) as unpacked:
            zipfile.ZipFile(archive).extractall(unpacked)
            Path(unpacked).rename(tree)
            Path(unpacked).mkdir()
    return tree


def patched_tree(version, *, fetch=False):
    """A copy of the tree, patched by the command line as it is now, or None."""
    source = stock_tree(version, fetch=fetch)
    if source is None:
        return None
    tree = HOME / "trees" / version / "patched"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(source, tree, copy_function=_link)
    command = [str(PYTHON), "-m", "sglang_lora_patch", "apply", "--no-import", "--site", str(tree)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return tree


def checked_apply(version):
    """Exit status of `apply` with its import check, then `verify` and `revert`, where stock's needs are stubbed."""
    tree = HOME / "trees" / version / "checked"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(stock_tree(version), tree, copy_function=_link)
    with tempfile.TemporaryDirectory() as stubs:
        start = (
            f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import stock_stub; stock_stub.on_demand()"
        )
        Path(stubs, "sitecustomize.py").write_text(start + "\n")
        env = environment()
        env["PYTHONPATH"] = os.pathsep.join((env["PYTHONPATH"], stubs))
        for step in ("apply", "verify", "revert"):
            command = [str(PYTHON), "-m", "sglang_lora_patch", step, "--site", str(tree)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{step}: {done.stderr.strip()}")
    return 0


def _link(source, target):
    """Hard links, as package managers make them: the patch must not write through them."""
    os.link(source, target)
    return target


def drive(tree, *paths, hook=False, seconds=300):
    """The driver's reports by path."""
    driver = Path(__file__).with_name("stock_driver.py")
    env = environment() | ({"STOCK_HOOK": "1"} if hook else {})
    command = [str(PYTHON), "-W", "ignore", str(driver), str(tree), *paths]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not reports:
        raise RuntimeError((run.stderr.strip().splitlines() or ["no output"])[-1])
    return {report["path"]: report for report in reports}


def verdict(report):
    """One cell of the table."""
    if "error" in report:
        return "error: " + report["error"][:24]
    faults = []
    if report["crash"]:
        faults.append("CRASH")
    if "HANG" in (report["unload"], report["next_load"], *report["extra"].values()):
        faults.append("HANG")
    if report["unanswered"]:
        faults.append(f"{report['unanswered']} unanswered")
    if report["early"] or report["unsafe"]:
        faults.append("early")
    if not faults and report["records"]:
        faults.append(f"{report['records']} records")
    count = f"{report['count']:+d}" if report["count"] else ""
    return " ".join([count, *faults]).strip() or "ok"
