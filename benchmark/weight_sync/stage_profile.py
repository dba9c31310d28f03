"""Where the time of a publish goes on the host: every phase on the front and in the back, without HTTP and a GPU.

    python benchmark/weight_sync/stage_profile.py --model qwen3-1.7b --rank 16 [--dtype float32] [--cprofile]

Makes an adapter of a model's exact shape and publishes it `--rounds` times by each route: `path` reads a directory,
`bytes` takes a safetensors image as `/stage_lora_adapter` does, `slab` (of the slabs' dtype alone) the image of a slab.
What the trainer does, to tensors in memory, is a phase of its own. Prints a JSON line a phase: milliseconds of wall
time (median, least, and of the first round, which plans and takes fresh memory) and of processor time of all threads
(median), which other load on the machine changes less. Indented names are parts of all routes.

Slabs are reused from round to round, as torch reuses page-locked memory on a machine with a GPU. The last two lines say
how long a thread that does small pieces of Python, as the scheduler does, was kept from it: with nothing beside it, and
with an adapter being copied beside it all the time.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import gpu_model
import machine

from sglang.rl.publisher_package import Package
from sglang.srt.config.model_config import load_model_config
from sglang.srt.config.sections import LoRASection
from sglang.srt.lora.adapter import Adapter
from sglang.srt.lora.adapter_copier import AdapterCopier, AdapterFile
from sglang.srt.lora.adapter_image import AdapterImage
from sglang.srt.lora.adapter_reader import AdapterReader, ReadAdapter
from sglang.srt.lora.device_slots import DeviceSlots
from sglang.srt.lora.weights import AdapterWeights, Place
from sglang.srt.managers.io_struct import wire
from sglang.srt.ops.slabs import ModelSlabs

STALL_SECONDS = 3.0


class Stopwatch:
    """Milliseconds of (wall time, processor time) by phase, in the order in which they began first."""

    def __init__(self) -> None:
        self.phases: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens inside."""
        times = self.phases.setdefault(phase, [])
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            times.append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))

    def watch(self, owner: type, method: str, phase: str) -> None:
        """Time every call of a method."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any) -> Any:
            with self(phase):
                return inner(*args)

        setattr(owner, method, timed)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One a phase."""
        for phase, times in self.phases.items():
            wall, cpu = np.array(times).T
            yield {
                "phase": phase,
                "wall_ms": {"median": _round(np.median(wall)), "min": _round(wall.min()), "first": _round(wall[0])},
                "cpu_ms": _round(np.median(cpu)),
            }


class ReusingCopier(AdapterCopier):
    """Gives out the same memory again and again."""

    _memory = torch.empty(0, dtype=torch.uint8)

    def _empty(self, nbytes: int) -> torch.Tensor:
        if len(self._memory) != nbytes:
            self._memory = torch.zeros(nbytes, dtype=torch.uint8)
        return self._memory


class Publisher:
    """The host side of a publish.

    Args:
        config: shape of the model; path: of a directory with its config.json.
    """

    def __init__(self, config: dict[str, Any], path: Path, rank: int) -> None:
        shapes = adapters.shapes(config)
        slabs = ModelSlabs(shapes, rank, "bfloat16")
        places = {name: Place(name, 0, slabs.places[name]) for name in shapes}
        lora = LoRASection(enabled=True, max_lora_rank=rank)
        self.reader = AdapterReader(load_model_config(str(path)), lora, str(path))
        self.reader.slab_layout = slabs.layout.describe()
        self.copier = ReusingCopier(places, slabs, tight=False, pin=False)
        self.slots = DeviceSlots(slabs.layout, 2, torch.device("cpu"))

    def publish(self, read: Callable[[], ReadAdapter], number: int, watch: Stopwatch, route: str) -> None:
        """By one route."""
        with watch(f"{route}: all"):
            with watch(f"{route}: front reads"):
                adapter = read()
            with watch(f"{route}: message"):
                call = wire.to_back_decoder.decode(
                    wire.encoder.encode(wire.StageAdapterCall(number, number, adapter.adapter))
                )
                assert isinstance(call, wire.StageAdapterCall)
            with watch(f"{route}: back copies"):
                weights = self.copy(call.adapter)
            with watch(f"{route}: front closes"):
                adapter.close()
        with watch(f"{route}: upload (a copy on this host)"):
            self.slots.prefetch(number, weights)

    def copy(self, adapter: Adapter) -> AdapterWeights:
        """What the back's worker thread does."""
        with AdapterFile(adapter) as file:
            return self.copier.copy(adapter, file)


def make_adapter(path: Path, config: dict[str, Any], rank: int, dtype: torch.dtype) -> Path:
    """As PEFT writes it."""
    tensors = adapters.random_adapter(config, rank, seed=0, scale=0.01)
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(adapters.adapter_config(tensors)))
    save_file({name: torch.from_numpy(t).to(dtype) for name, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


def longest_stalls(beside: Callable[[], object] | None) -> dict[str, float]:
    """Gaps, in ms, in a thread of small pieces of Python, while another thread does `beside` again and again."""
    stopping = threading.Event()

    def repeat() -> None:
        while beside is not None and not stopping.is_set():
            beside()

    thread = threading.Thread(target=repeat)
    thread.start()
    gaps, last = [], time.perf_counter()
    end = last + STALL_SECONDS
    while last < end:
        sum(range(100))
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    stopping.set()
    thread.join()
    p999, p9999, most = (_round(ms) for ms in np.percentile(np.array(gaps) * 1e3, [99.9, 99.99, 100]))
    return {"p99.9": p999, "p99.99": p9999, "max": most}


def _round(value: Any) -> float:
    return round(float(value), 3)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-1.7b", choices=gpu_model.SHAPES, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter and of the slabs (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--cprofile", action="store_true", help="print the calls of another round to stderr")
    options = parser.parse_args()
    config, watch = gpu_model.SHAPES[options.model], Stopwatch()
    watch.watch(AdapterReader, "_image", "  where tensors go")
    watch.watch(AdapterImage, "fill", "  copy")
    watch.watch(AdapterImage, "examine", "  check and hash")
    with tempfile.TemporaryDirectory(prefix="stage-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        path = make_adapter(Path(directory) / "adapter", config, options.rank, getattr(torch, options.dtype))
        publisher = Publisher(config, Path(directory), options.rank)
        image = (path / "adapter_model.safetensors").read_bytes()
        raw = json.loads((path / "adapter_config.json").read_text())
        routes: dict[str, Callable[[], ReadAdapter]] = {
            "path": lambda: publisher.reader.read_directory(str(path)),
            "bytes": lambda: publisher.reader.read_tensors(raw, image, "safetensors"),
        }
        tensors, layout = load_file(path / "adapter_model.safetensors"), publisher.reader.slab_layout
        slab = Package(tensors, raw, options.dtype, layout)
        if slab.form == "slab":
            slab_image = b"".join(slab.image())
            routes["slab"] = lambda: publisher.reader.read_tensors(raw, slab_image, "safetensors")
        for form, wanted in (("tensors", None), (slab.form, layout)):
            for _ in range(options.rounds):
                with watch(f"trainer packs {form}"):
                    package = Package(tensors, raw, options.dtype, wanted)
                assert package.digest, "its thread has ended"
        versions = itertools.count(1)
        for route, read in routes.items():
            for _ in range(options.rounds):
                publisher.publish(read, next(versions), watch, route)
        head = {"benchmark": "stage_profile", "commit": machine.commit(), "model": options.model, "rank": options.rank,
                "dtype": options.dtype, "bytes": len(image), "load_average": machine.load_average()}  # fmt: skip
        for line in (head, *watch.lines()):
            print(json.dumps(line))
        copied = publisher.reader.read_directory(str(path)).adapter
        for name, beside in (("alone", None), ("beside copies", lambda: publisher.copy(copied))):
            print(json.dumps({"phase": f"stall of small Python work, {name}", "ms": longest_stalls(beside)}))
        if options.cprofile:
            profile = cProfile.Profile()
            profile.runcall(publisher.publish, routes["path"], 1, Stopwatch(), "path")
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
