"""That the emulator computes what the vendors' manuals say, and objects to everything that a GPU would not forgive."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from kernels.emulator import VENDORS, Gpu, KernelError, build
from kernels.emulator.build import Sources
from kernels.emulator.numbers import NAN, Bits, random_bf16, to_float
from numpy.typing import NDArray

PROBES = "csrc/kernels/probes.cu"
SHARED = 4096


def probe(
    vendor: str, kernel: str, u: NDArray[np.generic] | None = None, blocks: int = 1, cluster: int = 1, seed: int = 0
) -> NDArray[np.uint32]:
    """Run a kernel of probes.cu; u is 0, 1, ... if not given. Returns y, at first -1."""
    gpu = Gpu(vendor, Sources().add(PROBES, (build.HERE / "probes.cu").read_text()))
    u = np.arange(64, dtype=np.uint32) if u is None else u
    y = gpu.array("y", np.full(max(64, u.size), 0xFFFFFFFF, np.uint32), "output")
    args = gpu.args("ExpandArgs", y=y)
    args.delta.u = gpu.array("u", u, "input").ctypes.data
    args.delta.site.slabs = gpu.array("slabs", np.arange(64, dtype=np.uint32)).ctypes.data
    gpu.launch(kernel, args, (blocks, 1), 256, SHARED, cluster, seed, file="probes.cu")
    return y


MISTAKES = {
    "does_not_wait_for_copy": "on its way",
    "no_barrier_after_copy": "race|nobody has written|on its way",
    "copy_is_misaligned": r"reads byte 4 of 256 of u, which is not a multiple of 16",
    "copy_before_wait": "reads byte 0 of 256 of u before wait_for_previous_kernel",
    "reads_behind_the_end": r"block \(0, 0\), thread 3: reads 4 bytes at byte 256 of 256 of slabs",
    "reads_before_the_start": r"thread 3: reads 4 bytes at byte -4 of 256 of slabs",
    "reads_null": "reads 4 bytes at address .*, which is nowhere near an array",
    "reads_behind_the_end_unseen": "(touches byte 256|reads 260 bytes at byte 0) of 256 of slabs",
    "writes_what_is_static": "slabs, which is not to be written",
    "reads_before_wait": "u before wait_for_previous_kernel",
    "writes_before_wait": "y before wait_for_previous_kernel",
    "reads_unwritten": "reads byte 20 of 4096 of shared memory, which nobody has written",
    "shared_out_of_bounds": r"writes 4 bytes at byte \d+ of 4096 of shared memory",
    "misaligned": "misaligned: reads byte 8 of 256 of u, which is not a multiple of 16",
    "local_out_of_bounds": "index 3 of a local array",
    "race_read_after_write": "race|nobody has written",
    "race_within_a_warp": "race|nobody has written",
    "race_write_after_read": "race: ",
    "race_across_warps": "race|nobody has written",
    "race_write_after_read_across_warps": "race: ",
    "race_with_one_reader_of_many": "race: ",
    "no_warp_barrier_after_write": "race|nobody has written",
    "no_warp_barrier_after_read": "race: ",
    "no_warp_barrier_after_copy": "race|nobody has written|on its way",
    "no_warp_barrier_before_copy": "race: |on its way",
    "one_warp_waits_for_another": "reads byte 0 of 256 of u before wait_for_previous_kernel",
    "warp_barrier_of_some": r"deadlock: \d+ threads wait at warp_barrier \(.*probes.cu:\d+\); ",
    "barrier_of_some": r"deadlock: 192 threads wait at barrier \(.*probes.cu:\d+\); 64 have left",
    "barriers_apart": "divergence at barrier",
    "product_by_some": r"deadlock: \d+ threads wait at mma",
    "warp_apart": "divergence: lane",
}
CUDA_ALONE = ("does_not_wait_for_copy",)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistakes_of_a_block(vendor: str, kernel: str, seed: int) -> None:
    if kernel in CUDA_ALONE and vendor == "hip":
        probe(vendor, kernel, seed=seed)
        return
    with pytest.raises(KernelError, match=f"^{kernel}, .*({MISTAKES[kernel]})|^{kernel}: ({MISTAKES[kernel]})"):
        probe(vendor, kernel, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", ["race_of_blocks", "race_of_blocks_that_read"])
def test_races_of_blocks(kernel: str, seed: int) -> None:
    with pytest.raises(KernelError, match="race: "):
        probe("cuda", kernel, blocks=4, seed=seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("reads_its_neighbour_too_early", "race|which nobody has written"),
        ("leaves_too_early", "leaves while another block|which has left"),
        ("writes_before_its_neighbour_starts", "which may not have started"),
        ("writes_its_neighbour_with_a_block_barrier", "race: |which nobody has written|leaves while another block"),
        ("writes_what_its_neighbour_writes", "race: "),
    ],
)
def test_mistakes_of_a_cluster(kernel: str, error: str, seed: int) -> None:
    with pytest.raises(KernelError, match=error):
        probe("cuda", kernel, blocks=4, cluster=4, seed=seed)


@pytest.mark.parametrize("kernel", ["reads_its_neighbour", "writes_its_neighbour"])
def test_a_cluster_uses_its_neighbours_memory(kernel: str) -> None:
    y = probe("cuda", kernel, blocks=4, cluster=2)
    expected = [[rank * 1000 + i for i in range(16)] for rank in (1, 0, 1, 0)]
    assert y.reshape(4, 16).tolist() == expected


@pytest.mark.parametrize("vendor", VENDORS)
def test_copies(vendor: str) -> None:
    words = np.arange(1, 65, dtype=np.uint32) * 0x10001
    assert probe(vendor, "copies", words).tolist() == words.tolist()
    some = words.reshape(16, 4).copy()
    some[:, 1] &= 0xFFFF
    some[:, 2:] = 0
    assert probe(vendor, "copies_some_bytes", words).tolist() == some.reshape(-1).tolist()
    assert not probe(vendor, "copies_nothing", words).any()


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("seed", range(3))
def test_lanes_read_what_others_of_their_warp_wrote(vendor: str, seed: int) -> None:
    assert probe(vendor, "passes_within_a_warp", seed=seed).tolist() == [200 + (i ^ 1) for i in range(64)]
    assert probe(vendor, "copies_within_a_warp", seed=seed).tolist() == [4 * (i % 16 ^ 1) for i in range(64)]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", ["one_thread_waits_for_all", "one_lane_waits_for_its_warp"])
def test_one_thread_may_wait_for_others(vendor: str, kernel: str) -> None:
    assert probe(vendor, kernel).tolist() == list(range(64))


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_block_waits(vendor: str) -> None:
    probe(vendor, "some_blocks_do_not_wait", blocks=2)
    with pytest.raises(KernelError, match=r"block \(2, 0\), .*leaves without wait_for_previous_kernel"):
        probe(vendor, "some_blocks_do_not_wait", blocks=4)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_failed_launch_leaves_nothing_behind(vendor: str) -> None:
    for kernel in ("barrier_of_some", "reads_behind_the_end_unseen", "copies"):
        if kernel == "copies":
            assert probe(vendor, kernel).tolist() == list(range(64))
        else:
            with pytest.raises(KernelError):
                probe(vendor, kernel)


@pytest.mark.parametrize("vendor", VENDORS)
def test_shuffle(vendor: str) -> None:
    lanes = 32 if vendor == "cuda" else 64
    assert probe(vendor, "shuffles")[:lanes].tolist() == [lane ^ 5 for lane in range(lanes)]


@pytest.mark.parametrize("vendor", VENDORS)
def test_product_of_tiles(vendor: str) -> None:
    tiles = random_bf16(np.random.default_rng(0), 32, 16)
    y = probe(vendor, "multiplies", tiles)
    a, b = to_float(tiles[:16]), to_float(tiles[16:])
    expected = np.arange(256).reshape(16, 16) + a @ b.T
    np.testing.assert_allclose(y[:256].view(np.float32).reshape(16, 16), expected, rtol=1e-6, atol=1e-6)


def cuda_layouts() -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, column) of every bf16 of A and B and of every float of D, lane by lane, as the PTX ISA has them.

    For m16n8k16, with groupID = lane >> 2 and threadID_in_group = lane % 4. A: a0 a1 a4 a5 in row groupID, the others
    8 below; a4 and up 8 columns on. B (k x n): b0 b1 at k = threadID_in_group * 2 + (i & 1), b2 b3 8 further, all at
    n = groupID. C: c0 c1 in row groupID, the others 8 below. Two of them make 16 columns: registers 0 and 1 of a
    fragment are b0 b1 of the one and of the other, 2 and 3 their b2 b3.
    """
    a, b, d = [], [], []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            a.append((row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)))
        for register in range(4):
            for low in range(2):
                b.append((group + 8 * (register % 2), thread * 2 + low + 8 * (register // 2)))
        for half in range(2):
            for i in range(4):
                d.append((group + (8 if i >= 2 else 0), 8 * half + thread * 2 + (i & 1)))
    return a, b, d


def hip_layouts() -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """The same for V_MFMA_F32_16X16X16_BF16: A[i][k] and B[k][j] in lane 16 * (k / 4) + i (or j), at k % 4; D[i][j] in
    lane 16 * (i / 4) + j, at i % 4.
    """
    a = [(lane % 16, lane // 16 * 4 + i) for lane in range(64) for i in range(4)]
    d = [(lane // 16 * 4 + i, lane % 16) for lane in range(64) for i in range(4)]
    return a, a, d


@pytest.mark.parametrize("vendor", VENDORS)
def test_registers_of_the_product(vendor: str) -> None:
    layout_a, layout_b, layout_d = cuda_layouts() if vendor == "cuda" else hip_layouts()
    a, b = random_bf16(np.random.default_rng(1), 2, 16, 16)
    registers = np.concatenate([[a[place] for place in layout_a], [b[place] for place in layout_b]]).astype(np.uint16)
    y = probe(vendor, "multiplies_registers", registers.view(np.uint32))
    exact = to_float(a) @ to_float(b).T
    expected = [exact[place] for place in layout_d]
    np.testing.assert_allclose(y[: len(expected)].view(np.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_product_of_eight_columns_depends_on_no_other(vendor: str) -> None:
    layout_a, layout_b, layout_d = cuda_layouts() if vendor == "cuda" else hip_layouts()
    a, b = random_bf16(np.random.default_rng(1), 2, 16, 16)
    b[8:] = NAN
    registers = np.concatenate([[a[place] for place in layout_a], [b[place] for place in layout_b]]).astype(np.uint16)
    y = probe(vendor, "multiplies_registers_of_eight", registers.view(np.uint32))
    exact = to_float(a) @ to_float(b).T
    expected = [exact[place] for place in layout_d]
    assert np.isnan(expected).any() and np.isfinite(expected).any()
    np.testing.assert_allclose(y[: len(expected)].view(np.float32), expected, rtol=1e-5, atol=1e-5)


# ---- warpgroups -----------------------------------------------------------------------------------------------------


def probe_group(
    kernel: str, rows: int = 64, seed: int = 0, place: tuple[int, int] = (0, 0)
) -> tuple[Bits, Bits, NDArray[np.uint16]]:
    """Run a kernel of 160 threads on x [70, 104] and a weight of so many rows; it sees 80 columns of both.

    Returns:
        x, weight and y, at first NaN; y's type is the kernel's business.
    """
    gpu, rng = Gpu("cuda", Sources().add(PROBES, (build.HERE / "probes.cu").read_text())), np.random.default_rng(seed)
    x = gpu.array("x", random_bf16(rng, 70, 104), "input")
    weight = gpu.array("weight", random_bf16(rng, rows, 104))
    y = gpu.array("y", np.full(64 * rows * 2, NAN, np.uint16), "output")
    maps = {"x": gpu.tensor_map(x, 80, 64), "weight": gpu.tensor_map(weight, 80, rows)}
    args = gpu.args("GroupGemmArgs", **maps, y=y, in_features=place[0], out_features=place[1])
    gpu.launch(kernel, args, (1, 1), 160, 1024 + 8192 + rows * 128 + 8, seed=seed, file="probes.cu")
    return x, weight, y


GROUP_MISTAKES = {
    "not_ready": "before arrivals_ready",
    "no_barrier": "race: uses arrivals|no arrivals are at",
    "arrivals_twice": "which counts arrivals",
    "stores_arrivals": "which counts arrivals",
    "misaligned": "misaligned: a tile at byte .* of shared memory, which is not a multiple of 1024",
    "outside": "a tile of 64 rows at",
    "too_early": "of x before wait_for_previous_kernel",
    "few_bytes": "16384 bytes are brought to arrivals at .*, which expect 16368",
    "many_bytes": r"deadlock: 128 threads wait at wait_for_arrivals \(.*probes.cu:\d+\); 32 have left",
    "arrives_twice": "arrives at .*, where a phase that nothing but copies is missing from",
    "never_arrives": r"deadlock: 128 threads wait at wait_for_arrivals",
    "tile_on_its_way": "leaves while a tile is on its way",
    "no_wait": "while a copy|which no copy has brought|has not waited for",
    "one_waits": "race: multiplies .*, whose copy thread 1 has not waited for|while a copy|which no copy has brought",
    "wrong_parity": "while a copy|which no copy has brought",
    "stores_tile": "race: writes|multiplies .*, which no copy has brought",
    "copies_over_tile": "race: writes .*, which a product that this thread has not waited for reads|while a copy",
    "no_begin": "multiply_tiles with no group_begin before it",
    "other_tiles": "warps of a warpgroup multiply different tiles",
    "three_warps": "deadlock: 96 threads wait at group_wait",
    "uses_sums": "race: writes sums while a product",
    "no_group_wait": "leaves while a product of its warpgroup is on its way",
    "multiplies_stores": "multiplies .*, which no copy has brought",
    "map_of_its_own": "the map of a copy must be an argument",
    "waits_once_more": "deadlock: 2 threads wait at wait_for_arrivals",
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", GROUP_MISTAKES)
def test_mistakes_of_a_warpgroup(name: str, seed: int) -> None:
    with pytest.raises(KernelError, match=f"^group_{name}[,:].*({GROUP_MISTAKES[name]})"):
        probe_group(f"group_{name}", seed=seed)


@pytest.mark.parametrize("rows", [64, 96, 128])
@pytest.mark.parametrize("seed", range(3))
def test_product_of_a_warpgroup(rows: int, seed: int) -> None:
    x, weight, y = probe_group("group_multiplies" + f"_{rows}" * (rows > 64), rows, seed)
    exact = to_float(x[:64, :64]) @ to_float(weight[:, :64]).T
    np.testing.assert_allclose(y.view(np.float32).reshape(64, rows), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [(0, 0), (6, 16), (7, 0), (64, 8), (0, 72), (200, 0), (0, 80), (3, 24)])
def test_tiles_lie_as_kernels_read_them(place: tuple[int, int]) -> None:
    """In the order of swizzle.h; zeros behind the last row and column."""
    x, _, y = probe_group("group_copies", seed=sum(place), place=place)
    whole = np.zeros((300, 200), np.uint16)
    whole[:70, :80] = x[:, :80]
    assert (y[:4096].reshape(64, 64) == whole[place[0] :, place[1] :][:64, :64]).all()


def test_threads_that_wait_for_each_other() -> None:
    assert probe_group("group_arrives")[2][0] == 3


# ---- the emulator and vendor.h say the same -------------------------------------------------------------------------


def texts() -> tuple[str, str]:
    vendor = Path(build.KERNEL_ROOT, "include/sgl_kernel/vendor.h").read_text()
    return vendor, Path(build.HERE, "emulator.h").read_text()


VECTORS = ((16, "Vec8"), (16, "Float4"), (8, "Float2"), (8, "Vec4"))


def functions(text: str) -> set[str]:
    return set(re.findall(r"SGL_DEVICE [\w*& ]*?\b(\w+)\(", text)) - {
        "shared_address",
        "read_cluster",
    }


def test_every_function_of_the_vendors_is_emulated() -> None:
    vendor, emulator = texts()
    assert functions(vendor) == functions(emulator)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (f"struct {name} {{", "\n};")
        for name in ("Fragment", "Accumulator", "Strip", *(f"alignas({size}) {name}" for size, name in VECTORS))
    ]
    + [("struct alignas(8) Arrivals {", "\n};"), ("struct GroupSums {", "\n};"), ("enum class Reuse", ";")],
)
def test_layouts_of_lanes_are_the_vendors(start: str, end: str) -> None:
    def passage(text: str) -> str:
        return text[text.index(start) : text.index(end, text.index(start))]

    vendor, emulator = texts()
    assert passage(vendor) == passage(emulator)


@pytest.mark.parametrize(
    "line",
    [
        "const void* p = chunk(lane % 16, lane / 16);",
        "const uint32_t* p = reinterpret_cast<const uint32_t*>(chunk(lane % 16, lane / 32)) + lane / 16 % 2 * 2;",
        "for (int half = 0; half < kColumns / 8; ++half) {",
        "b.r[half]",
        "b.r[half + 2]",
        "d.v + 4 * half",
    ],
)
def test_operands_of_instructions_are_the_vendors(line: str) -> None:
    assert all(line in text for text in texts())


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "grid", "threads", "shared", "cluster", "error"),
    [
        ("cuda", (1, 1), 48, 0, 1, "48 threads"),
        ("hip", (1, 1), 96, 0, 1, "96 threads"),
        ("cuda", (1, 1), 2048, 0, 1, "2048 threads"),
        ("cuda", (1, 1), 256, 240000, 1, "240000 bytes of shared memory of 232448"),
        ("hip", (1, 1), 256, 70000, 1, "70000 bytes of shared memory of 65536"),
        ("cuda", (3, 1), 256, 0, 2, "clusters of 2"),
        ("hip", (2, 1), 256, 0, 2, "clusters of 2"),
        ("cuda", (0, 1), 256, 0, 1, "grid of 0 x 1"),
    ],
)
def test_launches_that_no_device_takes(
    vendor: str, grid: tuple[int, int], threads: int, shared: int, cluster: int, error: str
) -> None:
    gpu = Gpu(vendor, Sources().add(PROBES, (build.HERE / "probes.cu").read_text()))
    with pytest.raises(KernelError, match=error):
        gpu.launch("copies", gpu.args("ExpandArgs"), grid, threads, shared, cluster, file="probes.cu")


@pytest.mark.parametrize("vendor", VENDORS)
def test_sizes_of_arguments_are_compared(vendor: str) -> None:
    wrong = Sources().replace(
        "include/sgl_kernel/args.h", "struct ExpandArgs {\n", "struct ExpandArgs {\n  int32_t more;\n"
    )
    args = Gpu(vendor, wrong).args("ExpandArgs")
    with pytest.raises(AssertionError, match="ExpandArgs"):
        Gpu(vendor).launch("lora_expand_add_16x128", args, (1, 1), 256, 0)


def test_a_kernel_that_does_not_compile_says_why() -> None:
    broken = Sources().add(PROBES, "int broken( {")
    with pytest.raises(RuntimeError, match="probes.cu:1"):
        build.build_library(broken, "probes.cu", "cuda")
