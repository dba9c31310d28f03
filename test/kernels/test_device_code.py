"""Device code: every kernel compiles for every GPU without spills, and is what the host code takes it for."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from kernels.mock_driver.build import PROJECT, build, compiler, compilers
from kernels.mock_driver.code_objects import (
    by_function,
    cubins,
    cuda_kernels,
    disassemble_cuda,
    disassemble_rocm,
    rocm_kernels,
    rocm_objects,
    tool,
    unbundle,
)
from kernels.mock_driver.geometry import Geometry, struct_of

import device_code  # of build_support, which kernels.mock_driver.build puts on the path

SOURCES = sorted(path.stem for path in (PROJECT / "csrc/kernels").glob("*.cu"))
CUDA, ROCM = ["sm_100a", "sm_80", "sm_89", "sm_90a"], ["gfx90a", "gfx942", "gfx950"]
MATRIX = {
    "sm_": r"\bHMMA\.16816\.F32\.BF16\b",
    "gfx90a": r"\bv_mfma_f32_16x16x16bf16_1k\b",
    "gfx942": r"\bv_mfma_f32_16x16x16_bf16\b",
    "gfx950": r"\bv_mfma_f32_16x16x(16|32)_bf16\b",
}
"""A product of matrices of bf16."""
WARPGROUP = {r"\bHGMMA\.64x{rows}x16\.F32\.BF16\b": 4, r"\bUTMALDG\.2D\b": 2}
"""What a kernel of warpgroups has on Hopper, at least so often: products out of shared memory, copies of tiles."""

_TERMS = ("16x16", "16x64", "64x16", "64x64")
"""Kernels that add a low-rank term: token rows of a tile, and ranks in registers."""
PLAIN = {"fused_add_rmsnorm", "silu_and_mul", *(f"qk_norm_rope_{dim}" for dim in (64, 128, 256))}
"""Kernels that have no product: their instructions are read by everyone, so what adds a term is code of its own."""
KERNELS = {
    "activation": {"silu_and_mul", *(f"silu_and_mul_{term}" for term in _TERMS)},
    "expand": {"lora_expand_add_16", "lora_expand_add_64"},
    "gemm": {
        *(f"skinny_gemm_{shape}" for shape in ("8", "16", "32x64", "64x64")),
        *(f"lora_shrink_{shape}" for shape in ("16", "64x64")),
    },
    "norm": {"fused_add_rmsnorm", *(f"fused_add_rmsnorm_{term}" for term in _TERMS)},
    "rope": {f"qk_norm_rope_{dim}{term}" for dim in (64, 128, 256) for term in ("", *(f"x{term}" for term in _TERMS))},
}

GROUPS = {f"skinny_gemm_group_{rows}" for rows in (64, 96, 128)}
"""Kernels of Hopper's. Other GPUs of its vendor have them in name, and stop if one is called."""

# ---- the code objects of the build -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cuda", "rocm"])
def built(request: pytest.FixtureRequest):
    return build(request.param)


@pytest.mark.slow
def test_every_source_is_built_for_every_gpu(built) -> None:
    assert sorted(built.images) == SOURCES
    for path in built.images.values():
        report = json.loads(Path(f"{path}.json").read_text())
        assert sorted({usage["arch"] for usage in report}) == (CUDA if built.target == "cuda" else ROCM)
        assert all(usage["spilled"] == 0 and 0 < usage["registers"] <= 255 for usage in report)


@pytest.mark.slow
def test_the_library_embeds_them(built) -> None:
    library = built.library.read_bytes()
    for path in built.images.values():
        assert library.count(path.read_bytes()) == 1, path.name


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_rocm_code(source: str) -> None:
    objects = rocm_objects(build("rocm").images[source])
    assert sorted(objects) == ROCM
    _check_kernels(source, {arch: rocm_kernels(code) for arch, code in objects.items()}, warp=64)
    for arch, code in objects.items():
        _check_products(arch, by_function(disassemble_rocm(code)))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_code(source: str) -> None:
    image = build("cuda").images[source]
    objects = cubins(image)
    assert sorted(objects) == CUDA
    _check_kernels(source, {arch: cuda_kernels(cubin) for arch, cubin in objects.items()}, warp=32)
    for arch, cubin in objects.items():
        _check_products(arch, by_function(disassemble_cuda(cubin)))


@pytest.mark.slow
def test_cuda_code_for_later_gpus() -> None:
    for image in build("cuda").images.values():
        listing = subprocess.run(
            [tool("cuobjdump"), "--list-ptx", str(image)], capture_output=True, text=True, check=True
        )
        assert re.findall(r"sm_(\w+)\.ptx", listing.stdout) == ["90"]


def _check_kernels(source: str, found: dict[str, dict], warp: int) -> None:
    """Names, the size of the argument struct as g++ sees it, no memory of a thread's own."""
    geometry = Geometry(warp)
    for kernels in found.values():
        assert set(kernels) == KERNELS[source] | (GROUPS if (source, warp) == ("gemm", 32) else set())
        for name, kernel in kernels.items():
            assert kernel.args == geometry.size(struct_of(name)), name
            assert kernel.scratch == 0 and kernel.threads <= 1024 and kernel.threads % warp == 0, name


def _check_products(arch: str, functions: dict[str, str]) -> None:
    pattern = next(pattern for prefix, pattern in MATRIX.items() if arch.startswith(prefix))
    for name, text in functions.items():
        assert bool(re.search(pattern, text)) == (name not in PLAIN | GROUPS), f"{name} on {arch}"
        if name in GROUPS and arch == "sm_90a":
            rows = name.rsplit("_", 1)[1]
            for instruction, least in WARPGROUP.items():
                assert len(re.findall(instruction.replace("{rows}", rows), text)) >= least, name
        elif name in GROUPS:
            assert "BPT.TRAP" in text and len(text.split(";")) < 50, f"{name} on {arch}"


@pytest.mark.slow
def test_llvm_reads_the_bundle(tmp_path: Path) -> None:
    bundler = next(filter(None, map(shutil.which, ("clang-offload-bundler", "clang-offload-bundler-22"))), None)
    if bundler is None:
        pytest.skip("clang-offload-bundler is not installed; it comes with clang-tools")
    image, out = build("rocm").images["expand"], tmp_path / "gfx942"
    common = [bundler, "--type=o", f"--input={image}"]
    listing = subprocess.run([*common, "--list"], check=True, capture_output=True, text=True).stdout.split()
    assert sorted(listing) == sorted(unbundle(image.read_bytes()))
    command = [*common, "--unbundle", "--targets=hipv4-amdgcn-amd-amdhsa--gfx942", f"--output={out}"]
    subprocess.run(command, check=True)
    assert out.read_bytes() == rocm_objects(image)["gfx942"]


# ---- device_code.py --------------------------------------------------------------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 568 bytes cmem[0]
ptxas info    : Compile time = 50.200 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
CLANG = """\
a.cu:7:1: remark: Function Name: first [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     TotalSGPRs: 12 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     VGPRs: 5 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     AGPRs: 0 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     ScratchSize [bytes/lane]: 0 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     Dynamic Stack: False [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     Occupancy [waves/SIMD]: 8 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     SGPRs Spill: 0 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     VGPRs Spill: 0 [-Rpass-analysis=kernel-resource-usage]
a.cu:7:1: remark:     LDS Size [bytes/block]: 0 [-Rpass-analysis=kernel-resource-usage]
a.cu:9:1: remark: Function Name: second [-Rpass-analysis=kernel-resource-usage]
a.cu:9:1: remark:     VGPRs: 64 [-Rpass-analysis=kernel-resource-usage]
a.cu:9:1: remark:     ScratchSize [bytes/lane]: 16 [-Rpass-analysis=kernel-resource-usage]
a.cu:9:1: remark:     VGPRs Spill: 3 [-Rpass-analysis=kernel-resource-usage]
"""


def test_what_ptxas_says() -> None:
    first, second = device_code.parse_ptxas(PTXAS)
    assert first == device_code.Usage("sm_80", "first", 128, 0)
    assert second == device_code.Usage("sm_90a", "second", 255, 120)


def test_spills_are_counted_when_two_compilers_talk_at_once() -> None:
    lines = PTXAS.splitlines()
    mixed = lines[1:3] + lines[6:9] + [lines[3]] + [lines[4]] + lines[9:]
    assert sum(usage.spilled for usage in device_code.parse_ptxas("\n".join(mixed))) == 120


def test_what_clang_says() -> None:
    first, second = device_code.parse_remarks(CLANG, "gfx942")
    assert first == device_code.Usage("gfx942", "first", 5, 0)
    assert second == device_code.Usage("gfx942", "second", 64, 28)


@pytest.mark.parametrize(
    ("usages", "text"),
    [
        (
            [("sm_80", "a", 9, 0), ("sm_90a", "a", 9, 8)],
            "spill registers to memory: a on sm_90a: 8 bytes",
        ),
        ([("sm_80", "a", 9, 0)], r"did not report the same kernels for every GPU \(1 for sm_80, 0 for sm_90a\)"),
        ([("sm_80", "a", 9, 0), ("sm_90a", "b", 9, 0)], "did not report the same kernels"),
        ([], "did not report the same kernels"),
    ],
)
def test_what_is_refused(usages: list[tuple[str, str, int, int]], text: str) -> None:
    with pytest.raises(device_code.BuildError, match=text):
        device_code.check([device_code.Usage(*usage) for usage in usages], ["sm_80", "sm_90a"])


def test_bundle() -> None:
    objects = {"gfx90a": b"a" * 5000, "gfx942": b"b", "gfx950": b"c" * 4096}
    data = device_code.bundle(objects)
    assert unbundle(data) == {
        "host-x86_64-unknown-linux-gnu-": b"",
        **{f"hipv4-amdgcn-amd-amdhsa--{arch}": content for arch, content in objects.items()},
    }
    (count,), at = struct.unpack_from("<Q", data, 24), 32
    for _ in range(count):
        offset, _, length = struct.unpack_from("<QQQ", data, at)
        assert offset % 4096 == 0  # a runtime maps entries where they lie
        at += 24 + length


SPILLING = """\
#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void __launch_bounds__(1024)
#else
#define KERNEL extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, 1024), amdgpu_num_vgpr(16))) void
#endif
KERNEL spilling(float* x) {
  float v[LIVE];
  for (int i = 0; i < LIVE; ++i) v[i] = x[i * 64];
  for (int n = 0; n < 100; ++n)
    for (int i = 0; i < LIVE; ++i) v[i] = v[i] * v[(i + 1) % LIVE] + x[n];
  for (int i = 0; i < LIVE; ++i) x[i] = v[i];
}
"""
TARGETS = {"cuda": ["80", "90a"], "rocm": ["gfx90a", "gfx942"]}


def _compile(vendor: str, command: str, folder: Path, live: int) -> tuple[int, Path, str]:
    """(exit code, output file, what is printed) of device_code.py for a kernel with so many live values a thread."""
    source, out = folder / "a.cu", folder / "a.out"
    source.write_text(f'#include "live.h"\n{SPILLING}')
    (folder / "live.h").write_text(f"#define LIVE {live}\n")
    script = str(PROJECT / "build_support/device_code.py")
    args = [
        vendor,
        str(source),
        "-o",
        str(out),
        "--compiler",
        command,
        "--depfile",
        f"{out}.d",
        "--include",
        str(folder),
    ]
    done = subprocess.run([sys.executable, script, *args, "--arch", *TARGETS[vendor]], capture_output=True, text=True)
    return done.returncode, out, done.stdout + done.stderr


@pytest.fixture(params=["nvcc", "clang", "ziglang"])
def any_compiler(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(vendor, command line)."""
    if request.param == "nvcc":
        return "cuda", compiler("cuda")
    if request.param == "clang":
        if found := compilers.system_clang():
            return "rocm", found
        pytest.skip("no clang with an AMD GPU back end is installed")
    if not find_spec("ziglang"):
        pytest.skip("ziglang is not installed; `make venv` installs it")
    return "rocm", f"{sys.executable} -m ziglang clang"


def test_a_kernel_that_spills_is_refused(any_compiler: tuple[str, str], tmp_path: Path) -> None:
    code, out, text = _compile(*any_compiler, tmp_path, live=200)
    assert code == 1 and not out.exists()
    assert "a.cu: kernels spill registers to memory: spilling on " in text


def test_a_kernel_that_does_not(any_compiler: tuple[str, str], tmp_path: Path) -> None:
    vendor, _ = any_compiler
    code, out, text = _compile(*any_compiler, tmp_path, live=4)
    assert code == 0, text
    assert re.match(r"a\.cu: 2 kernels, at most \d+ registers \(spilling, ", text)
    target, _, files = Path(f"{out}.d").read_text().partition(":")
    assert target.strip() == str(out)
    assert {str(tmp_path / "a.cu"), str(tmp_path / "live.h")} <= set(files.replace("\\\n", " ").split())
    if vendor == "rocm":
        assert sorted(rocm_objects(out)) == TARGETS["rocm"]
        assert all(list(rocm_kernels(code)) == ["spilling"] for code in rocm_objects(out).values())


def test_a_mistake_in_a_kernel_is_shown(any_compiler: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.out").write_text("of an earlier build")
    code, out, text = _compile(*any_compiler, tmp_path, live=-1)
    assert code == 1 and not out.exists()
    assert re.search(r"a\.cu.*error.*(negative|greater than zero)", text) and "failed with exit code" in text


@pytest.mark.parametrize("vendor", ["cuda", "rocm"])
def test_a_missing_compiler(vendor: str, tmp_path: Path) -> None:
    code, out, text = _compile(vendor, "/nowhere/clang++ --driver-mode=g++", tmp_path, live=4)
    assert code == 1 and not out.exists()
    assert text == "a.cu: cannot run the compiler '/nowhere/clang++': No such file or directory\n"


# ---- compilers.py ----------------------------------------------------------------------------------------------------


def _fake(folder: Path, name: str, version: str, targets: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncase $1 in --version) echo '{version}';; *) echo '{targets}';; esac\n")
    path.chmod(0o755)


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is the whole search path; nothing of ROCm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    if Path("/opt/rocm").exists():
        pytest.skip("this machine has ROCm")
    return tmp_path


def test_which_clang(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compilers.system_clang() is None
    _fake(empty_path, "clang++", "Debian clang version 14.0.6", "amdgcn")
    _fake(empty_path, "clang++-22", "clang version 22.1.8", "x86-64")
    assert compilers.system_clang() is None  # too old; without the back end
    _fake(empty_path, "clang++-23", "clang version 23.0.0", "  amdgcn  - AMD GCN GPUs")
    assert compilers.find_clang() == str(empty_path / "clang++-23")
    (empty_path / "rocm/llvm").mkdir(parents=True)
    _fake(empty_path / "rocm/llvm/bin", "amdclang++", "AMD clang version 20.0.0git", "amdgcn")
    assert compilers.find_clang() == str(empty_path / "rocm/llvm/bin/amdclang++")


def test_clang_of_a_python_package(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: name == "ziglang")
    assert compilers.find_clang() == f"{sys.executable} -m ziglang clang"
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        compilers.MissingCompiler, match=r"no clang 20 or newer .*: install clang-22, ROCm or `pip install ziglang=="
    ):
        compilers.find_clang()


def test_which_nvcc(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = empty_path / "cuda"
    home.mkdir()
    _fake(home / "bin", "nvcc", "Cuda compilation tools, release 12.9, V12.9.86", "")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert compilers.find_nvcc() == str(home / "bin/nvcc")
    assert compilers.nvcc_version(compilers.find_nvcc()) == (12, 9)
