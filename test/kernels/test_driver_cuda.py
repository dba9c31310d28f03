"""The launch path of the CUDA library, on a driver that only records."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels.mock_driver import DriverError, Machine, mock_library
from kernels.mock_driver.build import Build, build
from kernels.mock_driver.calls import (
    CASES,
    check_launch,
    decode,
    fused_add_rmsnorm,
    qk_norm_rope,
    rmsnorm,
    silu_and_mul,
    skinny_gemm,
)
from kernels.mock_driver.code_objects import Kernels, cubins, cuda_kernels
from kernels.mock_driver.geometry import Geometry

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cuda() -> Build:
    return build("cuda")


@pytest.fixture(scope="module")
def kernels(cuda: Build) -> Kernels:
    """What the embedded code objects hold, by source and name; the same for every architecture."""
    found = {}
    for stem, path in cuda.images.items():
        first, *rest = (cuda_kernels(cubin) for cubin in cubins(path).values())
        assert all(other == first for other in rest)
        found[stem] = first
    return found


@pytest.fixture(scope="module")
def driver(cuda: Build) -> Path:
    return mock_library("cuda", cuda.cached("SGL_KERNEL_CUDA_INCLUDE"))


@pytest.fixture
def machine(cuda: Build, driver: Path, kernels: Kernels) -> Iterator[Machine]:
    """Two GPUs of capability 9; the first is the thread's current one."""
    with Machine(cuda, driver, kernels) as machine:
        machine.mock("make_current", 0)
        yield machine


@pytest.fixture(scope="module")
def shared_machine(cuda: Build, driver: Path, kernels: Kernels) -> Iterator[Machine]:
    with Machine(cuda, driver, kernels) as machine:
        machine.mock("make_current", 0)
        yield machine


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return Geometry(32)


def names_of(kernels: Kernels) -> Counter[str]:
    return Counter(name for image in kernels.values() for name in image)


@pytest.mark.parametrize("name", CASES)
def test_launch(shared_machine: Machine, geometry: Geometry, name: str) -> None:
    call = CASES[name](shared_machine.tensors(), geometry)
    check_launch(shared_machine, call, shared_machine.launch(call.function, *call.args))


def test_every_kernel_is_launched_by_some_call(geometry: Geometry, kernels: Kernels) -> None:
    from kernels.mock_driver import Tensors

    assert {case(Tensors((2, 0)), geometry).kernel for case in CASES.values()} == set(names_of(kernels))


def test_arguments_have_the_size_that_kernels_take(geometry: Geometry, kernels: Kernels) -> None:
    from kernels.mock_driver.geometry import struct_of

    for image in kernels.values():
        for name, kernel in image.items():
            assert kernel.args == geometry.size(struct_of(name)), name


@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_how_a_sum_is_split_depends_on_no_row(shared_machine: Machine, geometry: Geometry, tokens: int) -> None:
    few, some = (skinny_gemm(shared_machine.tensors(), geometry, rows, 48) for rows in (1, tokens))
    clusters = [shared_machine.launch(call.function, *call.args)["cluster"] for call in (few, some)]
    assert clusters[0] == clusters[1] > 1


def test_splits_can_be_given(shared_machine: Machine, geometry: Geometry) -> None:
    call = skinny_gemm(shared_machine.tensors(), geometry, 4, 4096)
    call.args[-2] = call.cluster = 4
    check_launch(shared_machine, call, shared_machine.launch(call.function, *call.args))


@pytest.mark.parametrize(("outputs", "inputs", "splits"), [(1536, 4096, 3), (2048, 6144, 4), (12288, 2048, 1)])
def test_parts_of_a_sum_by_warpgroups(
    shared_machine: Machine, geometry: Geometry, outputs: int, inputs: int, splits: int
) -> None:
    """The same for every number of rows, and with a few rows behind the weight."""
    for tokens, behind in ((17, 0), (32, 0), (33, 16), (64, 192)):
        call = skinny_gemm(shared_machine.tensors(), geometry, tokens, outputs + behind, inputs=inputs)
        launch = shared_machine.launch(call.function, *call.args)
        check_launch(shared_machine, call, launch)
        assert launch["cluster"] == splits


@pytest.mark.parametrize(("given", "used"), [(1, 1), (3, 3), (4, 4), (8, 4)])
def test_splits_of_warpgroups_can_be_given(shared_machine: Machine, geometry: Geometry, given: int, used: int) -> None:
    call = skinny_gemm(shared_machine.tensors(), geometry, 40, 2048, inputs=6144)
    call.args[-2], call.cluster = given, used
    call.fields |= {"part_columns": 64 * -(-96 // used), "share_tokens": -(-40 // used)}
    check_launch(shared_machine, call, shared_machine.launch(call.function, *call.args))


@pytest.mark.parametrize("matrix", [0, 1])
def test_rows_that_overlap_are_no_work_for_warpgroups(shared_machine: Machine, geometry: Geometry, matrix: int) -> None:
    """Those of an expanded tensor: no copy engine is said to take them."""
    call = skinny_gemm(shared_machine.tensors(), geometry, 40, 64, warpgroups=False)
    call.args[matrix]["strides"] = [0, 1]
    call.fields[("x_stride", "weight_stride")[matrix]] = 0
    check_launch(shared_machine, call, shared_machine.launch(call.function, *call.args))


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
@pytest.mark.parametrize("tokens", [16, 17, 32, 33, 64])
def test_warpgroups_are_hoppers(machine: Machine, geometry: Geometry, capability: int, tokens: int) -> None:
    machine.mock("machine", 2, 100, capability)
    for adapters in (False, True):
        call = skinny_gemm(
            machine.tensors(), geometry, tokens, 512, adapters=adapters, warpgroups=capability == 9, overlap=True
        )
        launch = machine.launch(call.function, *call.args)
        assert ("group" in launch["kernel"]) == (capability == 9 and tokens > 16 and not adapters)
        check_launch(machine, call, launch, most_cluster=1 if capability == 8 else 8)


def test_maps_are_made_in_their_tensors_context(machine: Machine, geometry: Geometry) -> None:
    for current in (0, -1):
        machine.mock("make_current", current)
        call = skinny_gemm(machine.tensors(1), geometry, 40, 512)
        machine.log()
        machine.call(call.function, *call.args)
        made = [entry for entry in machine.log() if entry["call"] == "map"]
        assert [(entry["address"], entry["device"]) for entry in made] == [(t["address"], 1) for t in call.args[:2]]
        assert (machine.mock("current"), machine.mock("depth")) == (current, 0 if current < 0 else 1)


def test_no_more_blocks_than_run_at_once(shared_machine: Machine, geometry: Geometry) -> None:
    call = skinny_gemm(shared_machine.tensors(), geometry, 1, 100_000)
    assert shared_machine.launch(call.function, *call.args)["grid"] == [200, 1, 1]


def test_rows_too_far_apart_are_refused(shared_machine: Machine, geometry: Geometry) -> None:
    """Kernels find a row by a multiplication of 32 bits."""
    call = rmsnorm(shared_machine.tensors(), geometry, 2, 256)
    for stride, refused in ((2**31 - 1, False), (2**31, True)):
        call.args[0]["strides"] = [stride, 1]
        expected = pytest.raises(DriverError, match=f"ValueError: rows of x are {stride} numbers apart")
        with expected if refused else contextlib.nullcontext():
            shared_machine.call(call.function, *call.args)


def test_no_rows_no_launch(shared_machine: Machine, geometry: Geometry) -> None:
    call = rmsnorm(shared_machine.tensors(), geometry, 0, 256)
    shared_machine.log()
    shared_machine.call(call.function, *call.args)
    assert shared_machine.log() == []


def test_preload_leaves_nothing_to_load(machine: Machine, geometry: Geometry, kernels: Kernels) -> None:
    assert machine.call("preload", 0) == [100, 8]
    log = machine.log()
    assert sorted(entry["image"] for entry in log if entry["call"] == "load") == sorted(kernels)
    assert Counter(entry["kernel"] for entry in log if entry["call"] == "function") == names_of(kernels)
    assert machine.call("preload", 0) == [100, 8]
    assert machine.log() == []
    for case in CASES.values():
        call = case(machine.tensors(), geometry)
        machine.call(call.function, *call.args)
    log = machine.log()
    assert {entry["call"] for entry in log} == {"kernel", "shared", "map", "launch"}
    assert all(entry["loaded"] for entry in log if entry["call"] == "launch")


def test_a_second_gpu_gets_its_own_functions(machine: Machine, kernels: Kernels) -> None:
    machine.call("preload", 0)
    machine.log()
    machine.call("preload", 1)
    log = machine.log()
    assert not [entry for entry in log if entry["call"] == "load"]  # a library belongs to no GPU
    functions = [entry for entry in log if entry["call"] == "function"]
    assert {entry["device"] for entry in functions} == {1} and len(functions) == names_of(kernels).total()
    assert machine.mock("current") == 0 and machine.mock("depth") == 1


@pytest.mark.parametrize(("current", "changes"), [(0, []), (1, ["push", "pop"]), (-1, ["push", "pop"])])
def test_a_launch_goes_to_its_tensors_gpu(
    machine: Machine, geometry: Geometry, current: int, changes: list[str]
) -> None:
    call = rmsnorm(machine.tensors(0), geometry, 2, 256)
    machine.call(call.function, *call.args)
    machine.mock("make_current", current)
    machine.log()
    machine.call(call.function, *call.args)
    log = machine.log()
    assert [entry["call"] for entry in log if entry["call"] in ("push", "pop")] == changes
    assert [entry["device"] for entry in log if entry["call"] == "launch"] == [0]
    assert (machine.mock("current"), machine.mock("depth")) == (current, 0 if current < 0 else 1)


def test_shared_memory_is_allowed_on_every_gpu(machine: Machine, geometry: Geometry) -> None:
    for device in (0, 1):
        call = skinny_gemm(machine.tensors(device), geometry, 64, 2048)
        launch = machine.launch(call.function, *call.args)
        assert (launch["device"], launch["shared"] > 48 << 10) == (device, True)


def test_a_kernel_may_need_more_shared_memory_later(machine: Machine, geometry: Geometry) -> None:
    """Rows of a norm lie in it; those of the second launch are longer, and too long for what every launch may have."""
    calls = [fused_add_rmsnorm(machine.tensors(), geometry, 5, hidden, 16) for hidden in (1024, 16384, 1024)]
    launches = [machine.launch(call.function, *call.args) for call in calls]
    for call, launch in zip(calls, launches, strict=True):
        check_launch(machine, call, launch)
    assert launches[1]["shared"] > 48 << 10 > launches[0]["shared"] == launches[2]["shared"]


def test_stream(machine: Machine, geometry: Geometry) -> None:
    call = rmsnorm(machine.tensors(1), geometry, 2, 256)
    machine.request("on_stream", [2, 1], 0x1234, call.function, call.args)
    assert [(launch["device"], launch["stream"]) for launch in machine.launches()] == [(1, 0x1234)]


@pytest.mark.parametrize("overlap", [False, True])
def test_programmatic_launch(shared_machine: Machine, geometry: Geometry, overlap: bool) -> None:
    """Kernels run side by side only where all want the same part of a multiprocessor's memory as shared memory."""
    call = skinny_gemm(shared_machine.tensors(), geometry, 1, 64, overlap=overlap)
    shared_machine.call("preload", 0)
    shared_machine.log()
    shared_machine.call(call.function, *call.args)
    log = shared_machine.log()
    assert [entry["overlap"] for entry in log if entry["call"] == "launch"] == [overlap]
    assert [entry["percent"] for entry in log if entry["call"] == "carveout"] == [100] * overlap


@pytest.mark.parametrize(("tokens", "overlap", "capability", "expected"), [
    (1, True, 9, 1), (64, True, 9, 1), (65, True, 9, 0), (64, False, 9, 0),
    (16, True, 8, 0), (16, True, 10, 1), (17, True, 10, 0),
])  # fmt: skip
def test_a_rehearsal_is_for_kernels_that_start_early(
    machine: Machine, geometry: Geometry, tokens: int, overlap: bool, capability: int, expected: int
) -> None:
    """Which they do behind products of ours: those of up to 64 rows on Hopper, of up to 16 after it."""
    machine.mock("machine", 1, 100, capability)
    calls = [
        fused_add_rmsnorm(machine.tensors(), geometry, tokens, 512, 16),
        silu_and_mul(machine.tensors(), geometry, tokens, 1544, 16, adapters=False),
        qk_norm_rope(machine.tensors(), geometry, tokens, 128, 16, adapters=False),
    ]
    for call in calls:
        assert call.args[-1] is False
        launch = machine.launch(call.function, *call.args[:-1], overlap)
        assert decode(launch).rehearse == expected


def test_before_hopper_there_are_neither_clusters_nor_programmatic_launches(
    machine: Machine, geometry: Geometry
) -> None:
    machine.mock("machine", 1, 100, 8)
    assert machine.call("preload", 0) == [100, 1]
    norm = fused_add_rmsnorm(machine.tensors(), geometry, 5, 4096, 16)
    for call in (skinny_gemm(machine.tensors(), geometry, 1, 64, overlap=True), norm):
        launch = machine.launch(call.function, *call.args)
        assert (launch["cluster"], launch["overlap"]) == (1, 0)
        check_launch(machine, call, launch, most_cluster=1)


def test_an_old_gpu_is_refused(machine: Machine) -> None:
    machine.mock("machine", 1, 100, 7)
    with pytest.raises(
        DriverError, match=r"RuntimeError: sgl-kernel has no code for compute capability 7\.x: 8\.0 or newer is needed"
    ):
        machine.call("preload", 0)
    machine.mock("machine", 1, 100, 8)
    assert machine.call("preload", 0) == [100, 1]


FAILURES = [
    ("cuInit", 100, 0, r"cuInit: unknown error \(CUDA error 100\)"),
    ("cuDeviceGetAttribute", 101, 0, r"cuDeviceGetAttribute: unknown error \(CUDA error 101\)"),
    ("cuDevicePrimaryCtxRetain", 2, 0, r"cuDevicePrimaryCtxRetain: out of memory \(CUDA error 2\)"),
    ("cuCtxPushCurrent", 201, 0, r"cuCtxPushCurrent: unknown error \(CUDA error 201\)"),
    ("cuLibraryLoadData", 209, 1, r"cuLibraryLoadData: unknown error \(CUDA error 209\)"),
    ("cuKernelGetFunction", 2, 3, r"cuKernelGetFunction: out of memory \(CUDA error 2\)"),
    (
        "cuLibraryGetKernel",
        500,
        0,
        r"cuLibraryGetKernel of skinny_gemm_group_\d+: named symbol not found \(.* 500\)",
    ),
    ("cuKernelSetAttribute", 1, 0, r"cuKernelSetAttribute of skinny_gemm_group_\d+: unknown error \(CUDA error 1\)"),
    ("cuLaunchKernelEx", 2, 0, r"launch of skinny_gemm_group_\d+: out of memory \(CUDA error 2\)"),
    ("cuTensorMapEncodeTiled", 1, 1, r"cuTensorMapEncodeTiled: unknown error \(CUDA error 1\)"),
]


@pytest.mark.parametrize(("function", "code", "skip", "text"), FAILURES)
def test_errors_are_told_and_leave_no_trace(
    machine: Machine, geometry: Geometry, function: str, code: int, skip: int, text: str
) -> None:
    call = skinny_gemm(machine.tensors(1), geometry, 64, 2048)
    machine.mock("fail", function, code, skip, 99)
    with pytest.raises(DriverError, match=f"RuntimeError: {text}"):
        machine.call(call.function, *call.args)
    assert (machine.mock("current"), machine.mock("depth")) == (0, 1)
    assert machine.launches() == []
    machine.mock("fail", "", 0, 0, 0)
    check_launch(machine, call, machine.launch(call.function, *call.args))


def test_no_such_gpu(machine: Machine, geometry: Geometry) -> None:
    call = rmsnorm(machine.tensors(3), geometry, 2, 256)
    with pytest.raises(DriverError, match=r"RuntimeError: cuDeviceGetAttribute: unknown error \(CUDA error 101\)"):
        machine.call(call.function, *call.args)


@pytest.mark.parametrize("missing", ["cuLibraryEnumerateKernels", "cuTensorMapEncodeTiled"])
def test_an_old_driver(cuda: Build, missing: str) -> None:
    old = mock_library("cuda", cuda.cached("SGL_KERNEL_CUDA_INCLUDE"), without=(missing,))
    with Machine(cuda, None, folder=old.parent) as machine:
        text = rf"libcuda\.so\.1 lacks {missing}: sgl-kernel needs a driver of CUDA 12\.4 or newer"
        for _ in range(2):
            with pytest.raises(DriverError, match=f"RuntimeError: {text}"):
                machine.call("preload", 0)


def test_no_driver(cuda: Build, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    with Machine(cuda, None, folder=tmp_path) as machine:
        assert machine.call("target") == "cuda"
        with pytest.raises(DriverError, match=r"RuntimeError: no NVIDIA driver: libcuda.so.1 could not be loaded \("):
            machine.call("preload", 0)


def test_threads_launch_at_once(machine: Machine, geometry: Geometry, kernels: Kernels) -> None:
    calls = [case(machine.tensors(device), geometry) for case in CASES.values() for device in (0, 1)]
    requests = [(call.function, call.args) for call in calls]
    assert machine.request("threads", 8, [0, 1, -1], requests) == []
    log = machine.log()
    assert sorted(entry["image"] for entry in log if entry["call"] == "load") == sorted(kernels)
    launched = Counter((entry["kernel"], entry["device"]) for entry in log if entry["call"] == "launch")
    expected = Counter((call.kernel, call.args[0]["device"][1]) for call in calls)
    assert launched == Counter({key: 8 * count for key, count in expected.items()})
