"""Workflows, the scripts that they run and the Dockerfiles agree with each other and with the project's metadata."""

from __future__ import annotations

import functools
import re
import runpy
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="needs pyyaml, of the extra dev")

ROOT = Path(__file__).parents[2]
CI = ROOT / "scripts/ci"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPTS = sorted([*CI.rglob("*.sh"), *CI.rglob("*.py")])
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no parser for it

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(CI)))
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


@functools.cache
def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in _load(path)["jobs"].values():
        yield from job["steps"]


def test_all_are_found() -> None:
    assert {path.stem for path in WORKFLOWS} == {"lint", "nightly", "patches", "test", "wheels"}
    assert {path.stem for path in DOCKERFILES} == {"cuda", "rocm"}


# ---- workflows -------------------------------------------------------------------------------------------------------


@each_workflow
def test_a_step_is_one_script_or_make(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in _steps(path):
        if "uses" in step:
            continue
        command = step["run"].strip()
        assert "\n" not in command and "${{" not in command, command
        first, *rest = command.split()
        if first == "make":
            assert rest and rest[0] in targets, command
        else:
            assert first.startswith("scripts/ci/"), command
            assert (ROOT / first) in SCRIPTS, f"{command}: there is no such script"


@each_workflow
def test_actions_are_pinned_and_named(path: Path) -> None:
    pinned = re.findall(r"uses: +(\S+)(.*)", path.read_text())
    assert pinned
    for action, comment in pinned:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: which version is it?"


def test_an_action_has_one_version() -> None:
    used = {action for path in WORKFLOWS for action in re.findall(r"uses: +(\S+)@", path.read_text())}
    pins = {pin for path in WORKFLOWS for pin in re.findall(r"uses: +(\S+@.*)", path.read_text())}
    assert len(pins) == len(used)


@each_workflow
def test_permissions_are_the_least(path: Path) -> None:
    workflow = _load(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        granted = job["permissions"]
        writes = {scope for scope, right in granted.items() if right != "read"}
        expected = {"release": {"contents"}, "index": {"pages", "id-token"}}.get(name, set())
        assert granted and writes == expected, name
        assert job["timeout-minutes"] <= 120
        if name == "release":
            assert "ref_type == 'tag'" in job["if"] and job["needs"] == "install"


@each_workflow
def test_no_credentials_stay_in_the_checkout(path: Path) -> None:
    for step in _steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_pull_requests_do_not_reach_own_machines() -> None:
    for path in WORKFLOWS:
        workflow = _load(path)
        events = workflow[True]  # `on`, which YAML reads as a truth value
        if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
            assert set(events) == {"schedule", "workflow_dispatch"}


def test_pythons_are_the_supported_ones() -> None:
    (oldest,) = re.findall(r'^requires-python = ">=3\.(\d+)"', PROJECT, re.MULTILINE)
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    matrices = [
        job["strategy"]["matrix"]["python"]
        for path in WORKFLOWS
        for job in _load(path)["jobs"].values()
        if "python" in job.get("strategy", {}).get("matrix", {})
    ]
    assert len(matrices) == 2  # the tests and the installation
    for matrix in matrices:
        assert matrix == [f"3.{minor}" for minor in range(int(oldest), int(oldest) + len(matrix))]
        assert matrix == (classified or matrix)


def test_torch_is_of_one_version() -> None:
    (torch,) = re.findall(r"^TORCH +\?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    texts = [path.read_text() for path in (*WORKFLOWS, *SCRIPTS)]
    named = {found for text in texts for found in re.findall(r"torch==[\w.]*\d", text)}
    assert named == {torch}
    assert f"\nARG TORCH={torch.removeprefix('torch==')}\n" in (ROOT / "docker/cuda.Dockerfile").read_text()


# ---- scripts ---------------------------------------------------------------------------------------------------------


@each_script
def test_scripts_can_be_run_anywhere(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".sh":
        assert text.startswith("#!/usr/bin/env bash\n# "), "a script says what it is for"
        assert re.search(r"^set -euo pipefail$", text, re.MULTILINE)
        assert path.stat().st_mode & stat.S_IXUSR
    assert not re.search(r"(?<![\w.}])/(home|root|work|opt|usr/local)/", text), "a path of one machine"
    hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"127.0.0.1", "0-9."}
    assert not hosts, "an address of a service"


def test_every_script_is_used() -> None:
    users = [*WORKFLOWS, *SCRIPTS, *CI.rglob("action.yml"), ROOT / "CONTRIBUTING.md"]
    for script in SCRIPTS:
        told = any(script.name in user.read_text() for user in users if user != script)
        assert told or script.name == "run_workflow.sh", script.name


# ---- wheels ----------------------------------------------------------------------------------------------------------

VERSION = (ROOT / "python/sglang/version.py").read_text().split('__version__ = "')[1].split('"')[0]
KERNELS = (ROOT / "sgl-kernel/python/sgl_kernel/version.py").read_text().split('__version__ = "')[1].split('"')[0]


def _wheels() -> dict[str, str]:
    """What the workflow builds, by its name there, as on a machine with the nvcc of the build script."""
    (nvcc,) = re.findall(r"nvidia-cuda-nvcc==(\d+)\.(\d+)", (CI / "build_wheel.sh").read_text())
    policy = "manylinux_2_28_x86_64"  # of a repository whose MANYLINUX variables are set as the workflow says
    names = _load(ROOT / ".github/workflows/wheels.yml")["jobs"]["build"]["strategy"]["matrix"]["wheel"]
    local = {"cuda": "+cu{}{}".format(*nvcc), "rocm": "+rocm", "cpu": ""}
    assert set(names) == {"sglang", *local}
    kernels = {name: f"sgl_kernel-{KERNELS}{suffix}-py3-none-{policy}.whl" for name, suffix in local.items()}
    return kernels | {"sglang": f"sglang-{VERSION}-py3-none-any.whl"}


@each_dockerfile
def test_images_take_the_wheels_that_are_built(path: Path) -> None:
    wheels = _wheels()
    (line,) = re.findall(r"^COPY (.*) /wheels/$", path.read_text(), re.MULTILINE)
    patterns = [pattern.removeprefix("dist/") for pattern in line.split()]
    taken = {name for name, wheel in wheels.items() if any(fnmatch(wheel, pattern) for pattern in patterns)}
    assert taken == {"sglang", path.stem}
    assert "!dist/*.whl" in (path.parent / f"{path.name}.dockerignore").read_text().splitlines()


@each_dockerfile
def test_images_run_the_server_as_nobody_in_particular(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    assert '"-m", "sglang.launch_server"' in text


def test_an_index_holds_the_wheels_of_one_vendor(tmp_path: Path) -> None:
    wheels = _wheels()
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("".join(f"{number:064x}  {wheel}\n" for number, wheel in enumerate(wheels.values())))
    make_index = runpy.run_path(str(CI / "make_index.py"))["main"]
    make_index(tmp_path / "out", [f"https://example.org/v{VERSION.replace('+', '%2B')}={sums}"])
    cuda = next(iter(re.findall(r"\+(cu\d+)", wheels["cuda"])))
    for index, name in ((cuda, "cuda"), ("rocm", "rocm"), ("cpu", "cpu")):
        page = (tmp_path / "out" / index / "sgl-kernel/index.html").read_text()
        assert re.findall(r">([^<]+)</a>", page) == [wheels[name]]
        (url,) = re.findall(r'href="([^"]+)"', page)
        assert re.fullmatch(r"https://example\.org/v[\w.%]+/[\w.%-]+\.whl#sha256=[0-9a-f]{64}", url) and "+" not in url
        page = (tmp_path / "out" / index / "sglang/index.html").read_text()
        assert re.findall(r">([^<]+)</a>", page) == [wheels["sglang"]]
    page = (tmp_path / "out/index.html").read_text()
    assert re.findall(r'href="([^"]+)"', page) == sorted([f"{cuda}/", "cpu/", "rocm/"])
