"""The launch path of the ROCm library, on a runtime that only records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels.mock_driver import DriverError, Machine, mock_library
from kernels.mock_driver.build import Build, build
from kernels.mock_driver.calls import CASES, check_launch, rmsnorm, skinny_gemm
from kernels.mock_driver.code_objects import Kernels, rocm_kernels, rocm_objects
from kernels.mock_driver.geometry import Geometry

pytestmark = pytest.mark.slow
RUNTIMES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")


@pytest.fixture(scope="module")
def rocm() -> Build:
    return build("rocm")


@pytest.fixture(scope="module")
def kernels(rocm: Build) -> Kernels:
    """What the embedded code objects hold, by source and name, for the GPU with the least."""
    return {stem: rocm_kernels(rocm_objects(path)["gfx90a"]) for stem, path in rocm.images.items()}


@pytest.fixture(scope="module")
def driver() -> Path:
    return mock_library("rocm")


@pytest.fixture
def machine(rocm: Build, driver: Path, kernels: Kernels) -> Iterator[Machine]:
    """Two GPUs; the first is the thread's current one."""
    with Machine(rocm, driver, kernels) as machine:
        yield machine


@pytest.fixture(scope="module")
def shared_machine(rocm: Build, driver: Path, kernels: Kernels) -> Iterator[Machine]:
    with Machine(rocm, driver, kernels) as machine:
        yield machine


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return Geometry(64)


@pytest.mark.parametrize("name", CASES)
def test_launch(shared_machine: Machine, geometry: Geometry, name: str) -> None:
    call = CASES[name](shared_machine.tensors(), geometry)
    launch = shared_machine.launch(call.function, *call.args)
    assert launch["cluster"] == 1
    check_launch(shared_machine, call, launch)


@pytest.mark.parametrize("units", [1, 104, 304])
def test_as_many_blocks_as_run_at_once(machine: Machine, geometry: Geometry, units: int) -> None:
    machine.mock("machine", 1, units, 9)
    assert machine.call("preload", 0) == [units, 1]
    call = skinny_gemm(machine.tensors(), geometry, 1, 100_000)
    assert machine.launch(call.function, *call.args)["grid"] == [2 * units, 1, 1]


def test_preload_loads_everything_once_for_a_gpu(machine: Machine, geometry: Geometry, kernels: Kernels) -> None:
    for device in (0, 1):
        assert machine.call("preload", device) == [100, 1]
        log = machine.log()
        assert sorted(entry["image"] for entry in log if entry["call"] == "load") == sorted(kernels)
        assert {entry["device"] for entry in log if entry["call"] == "load"} == {device}
        assert machine.mock("current") == 0
    machine.call("preload", 0)
    for case in CASES.values():
        call = case(machine.tensors(1), geometry)
        machine.call(call.function, *call.args)
    assert not [entry for entry in machine.log() if entry["call"] == "load"]


@pytest.mark.parametrize(("current", "changes"), [(0, []), (1, [0, 1])])
def test_a_launch_goes_to_its_tensors_gpu(
    machine: Machine, geometry: Geometry, current: int, changes: list[int]
) -> None:
    call = rmsnorm(machine.tensors(0), geometry, 2, 256)
    machine.call(call.function, *call.args)
    machine.mock("make_current", current)
    machine.log()
    machine.call(call.function, *call.args)
    log = machine.log()
    assert [entry["device"] for entry in log if entry["call"] == "set"] == changes
    assert [entry["device"] for entry in log if entry["call"] == "launch"] == [0]


def test_stream(machine: Machine, geometry: Geometry) -> None:
    call = rmsnorm(machine.tensors(1), geometry, 2, 256)
    machine.request("on_stream", [10, 1], 0x1234, call.function, call.args)
    assert [(launch["device"], launch["stream"]) for launch in machine.launches()] == [(1, 0x1234)]


def test_torch_for_rocm_calls_its_gpus_cuda(machine: Machine, geometry: Geometry) -> None:
    tensors = machine.tensors(1)
    tensors.device = (2, 1)
    call = rmsnorm(tensors, geometry, 2, 256)
    machine.request("on_stream", [2, 1], 0x1234, call.function, call.args)
    assert [(launch["device"], launch["stream"]) for launch in machine.launches()] == [(1, 0x1234)]


FAILURES = [
    ("hipGetDevice", 100, 0, r"hipGetDevice: an error \(HIP error 100\)"),
    ("hipSetDevice", 101, 0, r"hipSetDevice: an error \(HIP error 101\)"),
    ("hipDeviceGetAttribute", 1, 0, r"hipDeviceGetAttribute: an error \(HIP error 1\)"),
    (
        "hipModuleLoadData",
        209,
        1,
        r"hipModuleLoadData \(is this GPU a gfx90a, gfx942 or gfx950\?\): no kernel image is available for "
        r"execution on the device \(HIP error 209\)",
    ),
    ("hipModuleGetFunction", 500, 0, r"hipModuleGetFunction of skinny_gemm_64x\d+: an error \(HIP error 500\)"),
    ("hipModuleLaunchKernel", 2, 0, r"launch of skinny_gemm_64x\d+: out of memory \(HIP error 2\)"),
]


@pytest.mark.parametrize(("function", "code", "skip", "text"), FAILURES)
def test_errors_are_told_and_leave_no_trace(
    machine: Machine, geometry: Geometry, function: str, code: int, skip: int, text: str
) -> None:
    call = skinny_gemm(machine.tensors(1), geometry, 64, 2048)
    machine.mock("fail", function, code, skip, 99)
    with pytest.raises(DriverError, match=f"RuntimeError: {text}"):
        machine.call(call.function, *call.args)
    assert machine.mock("current") == 0
    assert machine.launches() == []
    machine.mock("fail", "", 0, 0, 0)
    check_launch(machine, call, machine.launch(call.function, *call.args))


def test_the_runtime_that_is_loaded_already(rocm: Build, geometry: Geometry, kernels: Kernels) -> None:
    """Torch brings its own, which no search path finds."""
    with Machine(rocm, mock_library("rocm", name="libamdhip64-4a2c.so.7.1"), kernels) as machine:
        call = rmsnorm(machine.tensors(), geometry, 2, 256)
        check_launch(machine, call, machine.launch(call.function, *call.args))


def test_an_incomplete_runtime(rocm: Build) -> None:
    with Machine(
        rocm, mock_library("rocm", without=("hipModuleGetFunction",)), {stem: {} for stem in rocm.images}
    ) as machine:
        for _ in range(2):
            with pytest.raises(DriverError, match=r"RuntimeError: libamdhip64\.so lacks hipModuleGetFunction"):
                machine.call("preload", 0)


def test_no_runtime(rocm: Build, tmp_path: Path) -> None:
    for name in RUNTIMES:
        (tmp_path / name).write_text("no library")
    with Machine(rocm, None, folder=tmp_path) as machine:
        assert machine.call("target") == "rocm"
        text = (
            r"RuntimeError: no ROCm runtime: libamdhip64\.so could not be loaded; install ROCm or a ROCm build of torch"
        )
        with pytest.raises(DriverError, match=text):
            machine.call("preload", 0)


def test_threads_launch_at_once(machine: Machine, geometry: Geometry, kernels: Kernels) -> None:
    calls = [case(machine.tensors(device), geometry) for case in CASES.values() for device in (0, 1)]
    requests = [(call.function, call.args) for call in calls]
    assert machine.request("threads", 8, [0, 1], requests) == []
    log = machine.log()
    assert Counter(entry["image"] for entry in log if entry["call"] == "load") == dict.fromkeys(kernels, 2)
    launched = Counter((entry["kernel"], entry["device"]) for entry in log if entry["call"] == "launch")
    expected = Counter((call.kernel, call.args[0]["device"][1]) for call in calls)
    assert launched == Counter({key: 8 * count for key, count in expected.items()})
