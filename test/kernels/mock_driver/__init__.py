"""The compiled library on a driver that only records: what the host code would have asked a real one for.

`Machine` starts the library in a process of its own, with a mock libcuda or libamdhip64 first on its path. Tensors are
addresses; nothing reads them.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from kernels.mock_driver.build import Build
from kernels.mock_driver.code_objects import Kernels

HERE = Path(__file__).parent
DEVICE_TYPES = {"cuda": 2, "rocm": 10}
DRIVERS = {"cuda": ("cuda.c", "libcuda.so.1"), "rocm": ("hip.c", "libamdhip64.so.6")}
BF16, FLOAT32, INT32, INT64, UINT8 = (4, 16), (2, 32), (0, 32), (0, 64), (1, 8)


class DriverError(Exception):
    """What the library raised: the name of the exception's class, and its text."""


@dataclass
class Tensors:
    """Makes tensors at addresses that tell them apart."""

    device: tuple[int, int]
    used: int = 0x10000
    made: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, *shape: int, dtype: tuple[int, int] = BF16, pad: int = 0) -> dict[str, Any]:
        """Rows are `pad` elements longer than they say."""
        strides = [1] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * (shape[axis + 1] + (pad if axis == len(shape) - 2 else 0))
        self.used += 0x100000
        tensor = {"address": self.used, "shape": shape, "strides": strides, "dtype": dtype, "device": self.device}
        self.made.append(tensor)
        return tensor


class Machine:
    """A process that has the library open. Use it as a context manager.

    Attributes:
        driver: the mock, which this opens too; None: whatever the library finds, first of all in `folder`.
        kernels: that code objects hold, by source and name.
    """

    def __init__(
        self,
        build: Build,
        driver: Path | None,
        kernels: Kernels | None = None,
        folder: Path | None = None,
    ) -> None:
        env = os.environ | {"LD_LIBRARY_PATH": str(folder or (driver.parent if driver else ""))}
        command = [sys.executable, str(HERE / "worker.py"), str(build.library), *([str(driver)] if driver else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.target = build.target
        if driver:
            for stem, path in build.images.items():
                self.mock("image", stem, str(path))
                for name, kernel in (kernels or {})[stem].items():
                    self.mock("kernel", name, kernel.threads, kernel.args)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def tensors(self, device_id: int = 0) -> Tensors:
        return Tensors((DEVICE_TYPES[self.target], device_id))

    def request(self, method: str, *args: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        print(json.dumps([method, *args]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process died with exit code {self._process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            raise DriverError(f"{answer['error']}: {answer['text']}")
        return answer["result"]

    def call(self, name: str, *args: Any) -> Any:
        """A function of the library. Raises DriverError."""
        return self.request("call", name, args)

    def mock(self, name: str, *args: Any) -> Any:
        """A function of the mock driver."""
        return self.request("mock", name, args)

    def log(self) -> list[dict[str, Any]]:
        """Calls of the driver since the last time."""
        lines = self.mock("log").splitlines()
        self.mock("clear")
        return [json.loads(line) for line in lines]

    def launches(self) -> list[dict[str, Any]]:
        """Those calls that launch."""
        return [entry for entry in self.log() if entry["call"] == "launch"]

    def launch(self, name: str, *args: Any) -> dict[str, Any]:
        """The one launch of a call."""
        self.log()
        self.call(name, *args)
        (only,) = self.launches()
        return only


@lru_cache
def mock_library(target: str, include: str = "", without: Sequence[str] = (), name: str = "") -> Path:
    """The mock driver of a target, in a folder of its own; functions may be missing, and its file name be another."""
    source, usual = DRIVERS[target]
    folder = Path(tempfile.mkdtemp(prefix="sgl-kernel-mock-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / (name or usual)
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
    renamed = [f"-D{function}=missing_{function}" for function in without]
    headers = ["-isystem", include] if include else []
    subprocess.run(["gcc", *flags, *headers, *renamed, str(HERE / source), "-o", str(path)], check=True)
    return path
