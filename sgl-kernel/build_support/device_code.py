"""Compiles one kernel source to one embeddable code object for all GPUs of a vendor, and refuses code that spills.

Run by CMake for every source; run by hand to look at registers:

    python device_code.py cuda gemm.cu -o gemm.fatbin --compiler nvcc --arch 80 90a --ptx 90 --include ../include
    python device_code.py rocm gemm.cu -o gemm.hipfb --compiler clang++-22 --arch gfx942 --include ../include

Needs nothing but the standard library and the compiler. For ROCm any clang that compilers.py accepts will do, that of
the package ziglang too (``--compiler 'python -m ziglang clang'``): sources are freestanding, so neither ROCm nor its
headers are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

BUNDLE_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"
"""Start of the container that hipModuleLoadData picks the GPU's own code object from."""
_HOST_ENTRY = "host-x86_64-unknown-linux-gnu-"
_ALIGNMENT = 4096


@dataclass(frozen=True)
class Usage:
    """What a kernel costs on one architecture: registers a thread, bytes of spills or scratch a thread."""

    arch: str
    kernel: str
    registers: int
    spilled: int


class BuildError(Exception):
    """There is no code object, or none that may be shipped."""


@dataclass(frozen=True)
class Job:
    """What to compile with what, and where to: the code object, and the list of files that went in, if wanted."""

    compiler: str
    source: Path
    out: Path
    archs: list[str]
    includes: list[str]
    depfile: Path | None = None

    @property
    def include_flags(self) -> list[str]:
        """As both compilers take them."""
        return [f"-I{folder}" for folder in self.includes]


def compile_cuda(job: Job, ptx: str) -> list[Usage]:
    """A fat binary of machine code for `archs` and PTX of `ptx` for what comes after them.

    Raises:
        BuildError: the compiler is missing or failed; its output has been printed.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in job.archs]
    targets.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    command = [*shlex.split(job.compiler), "-O3", "-std=c++17", "--fatbin", "-Xptxas=-v", "--compress-mode=size"]
    command += [f"--threads={_jobs(len(targets))}", *targets, *job.include_flags]
    if job.depfile:
        command += ["-MD", "-MF", str(job.depfile), "-MT", str(job.out)]
    return parse_ptxas(_run([*command, str(job.source), "-o", str(job.out)]))


def parse_ptxas(output: str) -> list[Usage]:
    """The entry functions in the output of `ptxas -v`."""
    usages = []
    kernel = arch = ""
    spilled = 0
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            kernel, arch = found.groups()
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += sum(map(int, found.groups()))
        elif found := re.search(r"Used (\d+) registers", line):
            usages.append(Usage(arch, kernel, int(found[1]), spilled))
            spilled = 0
    return usages


def compile_rocm(job: Job) -> list[Usage]:
    """A bundle of code objects, one for each of `archs`.

    Raises:
        BuildError: the compiler is missing or failed; its output has been printed.
    """
    words = shlex.split(job.compiler)
    command = [*words, "-x", "hip", "-O3", "-std=c++17", "--cuda-device-only", "-nogpulib", "-nogpuinc"]
    command += ["--no-gpu-bundle-output", "-mcode-object-version=5", "-Rpass-analysis=kernel-resource-usage"]
    command += [*job.include_flags, str(job.source)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = _with_linker(words, folder)

        def compile_one(arch: str) -> list[Usage]:
            # What is included depends on no architecture: the first one writes the list of it.
            listed = _depfile_of_clang(job) if arch == job.archs[0] else []
            return parse_remarks(
                _run([*command, f"--offload-arch={arch}", *listed, "-o", str(folder / arch)], env), arch
            )

        with ThreadPoolExecutor(_jobs(len(job.archs))) as pool:
            usages = [usage for found in pool.map(compile_one, job.archs) for usage in found]
        job.out.write_bytes(bundle({arch: (folder / arch).read_bytes() for arch in job.archs}))
    return usages


def _depfile_of_clang(job: Job) -> list[str]:
    """Options that write it: -MD belongs to the host's part of a HIP source, and writes nothing without one."""
    if not job.depfile:
        return []
    options = ["-dependency-file", str(job.depfile), "-MT", str(job.out)]
    return [word for option in options for word in ("-Xclang", option)]


def parse_remarks(output: str, arch: str) -> list[Usage]:
    """The kernels in clang's remarks on resource usage."""
    usages = []
    kernel = ""
    registers = scratch = 0
    for line in output.splitlines():
        if found := re.search(r"remark:.*Function Name: (\w+)", line):
            kernel = found[1]
        elif found := re.search(r"remark:.*\sVGPRs: (\d+)", line):
            registers = int(found[1])
        elif found := re.search(r"remark:.*\sScratchSize \[bytes/lane\]: (\d+)", line):
            scratch = int(found[1])
        elif found := re.search(r"remark:.*\sVGPRs Spill: (\d+)", line):
            usages.append(Usage(arch, kernel, registers, scratch + 4 * int(found[1])))
    return usages


def bundle(objects: dict[str, bytes]) -> bytes:
    """Clang's offload bundle: magic, count, then (offset, size, length of id, id) of every entry, then the entries."""
    entries = [(_HOST_ENTRY, b""), *((f"hipv4-amdgcn-amd-amdhsa--{arch}", data) for arch, data in objects.items())]
    head = len(BUNDLE_MAGIC) + 8 + sum(24 + len(name) for name, _ in entries)
    offset = -(-head // _ALIGNMENT) * _ALIGNMENT
    table = BUNDLE_MAGIC + struct.pack("<Q", len(entries))
    body = b""
    for name, data in entries:
        table += struct.pack("<QQQ", offset + len(body), len(data), len(name)) + name.encode()
        body += data + bytes(-len(data) % _ALIGNMENT)
    return table.ljust(offset, b"\0") + body


def check(usages: list[Usage], archs: list[str]) -> None:
    """Refuse spills, and output that this parser no longer understands.

    Raises:
        BuildError: names the kernels.
    """
    kernels = {arch: {usage.kernel for usage in usages if usage.arch == arch} for arch in archs}
    if not all(kernels.values()) or len({frozenset(names) for names in kernels.values()}) != 1:
        counts = ", ".join(f"{len(names)} for {arch}" for arch, names in kernels.items())
        raise BuildError(
            f"the compiler did not report the same kernels for every GPU ({counts}): its output has changed"
        )
    spilling = [usage for usage in usages if usage.spilled]
    if spilling:
        lines = (f"{u.kernel} on {u.arch}: {u.spilled} bytes a thread" for u in spilling)
        raise BuildError("kernels spill registers to memory: " + "; ".join(lines))


def _jobs(most: int) -> int:
    """Architectures to compile at once: the build has some five sources to compile at once already."""
    return max(1, min(most, len(os.sched_getaffinity(0)) // 4))


def _with_linker(compiler: list[str], folder: Path) -> dict[str, str] | None:
    """The environment in which `ziglang clang` finds a linker: clang runs `lld`, for which ziglang has only a word."""
    if len(compiler) < 2 or compiler[-1] != "clang":
        return None
    shim = folder / "lld"
    linker = shlex.join([*compiler[:-1], "ld.lld"])
    shim.write_text(f'#!/bin/sh\n[ "$1" = -flavor ] && shift 2\nexec {linker} "$@"\n')
    shim.chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    """What a compiler printed on both streams."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    except OSError as error:
        raise BuildError(f"cannot run the compiler {command[0]!r}: {error.strerror}") from None
    if done.returncode:
        sys.stderr.write(f"{shlex.join(command)}\n{done.stdout}")
        raise BuildError(f"{command[0]} failed with exit code {done.returncode}")
    return done.stdout


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vendor", choices=["cuda", "rocm"])
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--arch", nargs="+", required=True)
    parser.add_argument("--ptx", default="90", help="CUDA: the virtual architecture to add")
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--depfile", type=Path)
    parser.add_argument("--report", type=Path, help="where to write the kernels and their registers, as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Compile as the command line says; 1 when the result may not be shipped."""
    args = _arguments(argv)
    job = Job(args.compiler, args.source, args.out, args.arch, args.include, args.depfile)
    try:
        usages = compile_cuda(job, args.ptx) if args.vendor == "cuda" else compile_rocm(job)
        check(usages, [f"sm_{arch}" if args.vendor == "cuda" else arch for arch in args.arch])
    except BuildError as error:
        args.out.unlink(missing_ok=True)
        print(f"{args.source.name}: {error}", file=sys.stderr)
        return 1
    if args.report:
        args.report.write_text(json.dumps([asdict(usage) for usage in usages]))
    worst = max(usages, key=lambda usage: usage.registers)
    print(
        f"{args.source.name}: {len(usages)} kernels, at most {worst.registers} registers ({worst.kernel}, {worst.arch})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
