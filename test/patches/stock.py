"""Stock releases in a scratch folder: their wheels, their trees before and after the patch, and runs of the driver.

The folder is `$STOCK_SGLANG`, or `stock-sglang` in the folder for temporary files; `patches/scripts/stock_venv.sh`
makes the environment in it. Nothing is fetched unless asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SOURCES = REPOSITORY / "patches" / "src"
HOME = Path(os.environ.get("STOCK_SGLANG") or Path(tempfile.gettempdir()) / "stock-sglang")
PYTHON = HOME / "venv" / "bin" / "python"
HOW = "patches/scripts/stock_venv.sh makes the scratch environment, patches/scripts/table.py fetches the wheels"

ASKED_FOR = bool(os.environ.get("STOCK_SGLANG")) and PYTHON.exists()
MISSING = f"STOCK_SGLANG names no scratch folder: {HOW}"


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
        env = stubbed(stubs, SOURCES)
        for step in ("apply", "verify", "revert"):
            command = [str(PYTHON), "-m", "sglang_lora_patch", step, "--site", str(tree)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{step}: {done.stderr.strip()}")
    return 0


def stubbed(folder, *paths, start=""):
    """Variables for interpreters in which stock imports: `folder` gets the code that all of them start with."""
    code = f"import sys; sys.path.append({str(HERE)!r}); import stock_stub; stock_stub.on_demand()\n{start}"
    Path(folder, "sitecustomize.py").write_text(code)
    return environment() | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, folder)))}


@contextlib.contextmanager
def serve(tree, **variables):
    """Stock's HTTP server, from `tree`, with these variables: its address and the file that it writes to.

    Every process of it reads our `.pth` file as the interpreter does with one in site-packages.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        env = stubbed(folder, tree, start=f"import site; site.addsitedir({str(SOURCES)!r})\n") | variables
        env["TMPDIR"] = folder  # its sockets and the model go when this ends, though it is killed
        env["SGLANG_GRPC_PORT"] = str(free_port())  # otherwise the port plus 10000, which may not exist
        log = Path(folder, "log")
        with log.open("w") as out:
            command = [str(PYTHON), "-W", "ignore", str(HERE / "stock_server.py"), str(port)]
            process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=folder, start_new_session=True)
        try:
            wait_for(log, "ready to roll", process)
            yield f"http://127.0.0.1:{port}", log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children are in its session
            process.wait()


def free_port():
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(log, text, process=None, seconds=180):
    """Until the file has this text; RuntimeError when time runs out, or the process that writes it ends."""
    deadline = time.monotonic() + seconds
    while text not in log.read_text(errors="replace"):
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise RuntimeError(f"no {text!r} in the log:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.05)


def _link(source, target):
    """Hard links, as package managers make them: the patch must not write through them."""
    os.link(source, target)
    return target


def drive(tree, *paths, hook=False, seconds=300):
    """The driver's reports by path."""
    driver = HERE / "stock_driver.py"
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
