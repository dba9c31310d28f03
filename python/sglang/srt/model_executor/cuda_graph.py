"""Decode steps as CUDA graphs: one for every number of rows in `buckets`, with adapters and without.

Owned by ModelRunner, which asks `takes` and then `launch`; captured once, at start-up. A step with fewer rows than its
graph is padded with rows of a sequence that does not exist, which has a slot and a page of its own. A graph reads and
writes fixed addresses only: `_inputs` (one copy a step), the page table, the KV pool, the slabs of adapters,
`last_tokens`, and `logits`, which stay until the next step for rows that want more than a graph can give.

Invariant: what is launched between two replays may change what these addresses hold, never where they are. A step in
which no row has an adapter runs the graph that has never heard of any, so base traffic costs and gets what it would on
a server without adapters.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.mem_cache.req_table import ReqTable
from sglang.srt.model_executor.forward_context import (
    CapturableAttention,
    CausalLM,
    ForwardContext,
    KVPoolView,
    LoRABatch,
)
from sglang.srt.model_executor.input_buffers import Fields, PackedColumns, PendingColumns
from sglang.srt.ops.launch import programmatic_launch
from sglang.srt.ops.linear import SKINNY_ROWS
from sglang.srt.ops.slabs import LoraBatch
from sglang.srt.sampling.plan import SamplingPlan
from sglang.srt.sampling.sampler import HostSample, Sampler

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0
"""Time between two lines of progress."""


@dataclass(frozen=True, slots=True)
class StepColumns:
    """What a replay needs to know of its rows: see StepInput, and RowSampler for `temperature` and `uniforms`."""

    positions: np.ndarray
    out_locs: np.ndarray
    slots: np.ndarray
    kv_lens: np.ndarray
    versions: np.ndarray
    temperature: np.ndarray
    uniforms: np.ndarray


FEW_TAILS = 4
"""Slots whose A most steps multiply: a policy and the versions before it. Each more is rows more in every product."""


class Kind(enum.Enum):
    """What a graph does for adapters: nothing, what any need, what those with tails need, or the first FEW_TAILS."""

    BASE = enum.auto()
    ANY_SLOTS = enum.auto()
    ALL_TAILS = enum.auto()
    FEW_TAILS = enum.auto()


_NOTHING = np.empty(0, np.int64)
_PADDING = StepColumns(*[_NOTHING] * 7)
"""A step that is all padding."""


@dataclass(frozen=True, slots=True)
class GraphSample:
    """Results of a replay on their way; as sampling.SampleOutput."""

    columns: PendingColumns
    plan: SamplingPlan
    rows: int

    def start_copy(self) -> None:
        """Done by the replay."""

    def to_host(self) -> HostSample:
        """The results as arrays; blocks until the device has them."""
        found = {name: column[: self.rows] for name, column in self.columns.wait().items()}
        logprobs = found["logprobs"] if len(self.plan.logprob) else None
        return HostSample(found["tokens"], logprobs, found["bad"], {}, {})


def capture_graph(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The graph of what `run` enqueues, in the memory of `pool` (None: in memory of its own)."""
    run()  # compiles and allocates whatever is left to
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Collect garbage now and not inside: a graph that is freed while another is captured ends the capture."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class DecodeGraphs:
    """Captured decode steps.

    Args:
        table: its last row belongs to the padding.
        last_tokens: int64, one more than there are slots.
        buckets: numbers of rows, ascending.

    Attributes:
        logits: [largest bucket, V] of the latest replay.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: CapturableAttention,
        kv_pool: KVPoolView,
        table: ReqTable,
        sampler: Sampler,
        last_tokens: Tensor,
        lora: LoRAManager | None,
        buckets: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._model, self._attention, self._kv_pool, self._table = model, attention, kv_pool, table
        assert sampler.draw_rows is not None, "graphs need the sampler's kernels"
        self._draw, self._last_tokens, self._lora = sampler.draw_rows, last_tokens, lora
        from sglang.srt.ops.triton.decode_step import begin_decode  # Triton need not be there without a GPU

        self._begin = begin_decode
        self._buckets = list(buckets)
        rows, device = self._buckets[-1], last_tokens.device
        self._shape = None if lora is None else lora.words_shape(rows)
        fields: Fields = dict.fromkeys(("positions", "locs", "slots", "kv_lens"), (np.int64, rows))
        fields |= {"uniforms": (np.float64, rows), "temperature": (np.float32, rows)}
        if self._shape is not None:
            fields["words"] = (np.int32, self._shape.words)
        self._inputs = PackedColumns(fields, device)
        outputs: Fields = {"tokens": (np.int64, rows), "logprobs": (np.float32, rows), "bad": (np.bool_, rows)}
        self._outputs = PackedColumns(outputs, device)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, sampler.vocab_size, dtype=dtype, device=device)
        self._adapters: dict[Kind, LoRABatch] = {}
        if self._shape is not None and lora is not None:
            words = LoraBatch(self._inputs.device["words"], self._shape)
            self._adapters[Kind.ANY_SLOTS] = lora.slab_batch(words)
            self._adapters[Kind.ALL_TAILS] = lora.slab_batch(words, lora.num_tails)
            self._adapters[Kind.FEW_TAILS] = lora.slab_batch(words, min(FEW_TAILS, lora.num_tails))
        self._graphs: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}

    @property
    def max_rows(self) -> int:
        """Rows of the largest step."""
        return self._buckets[-1]

    def takes(self, rows: int, versions: np.ndarray) -> bool:
        """Whether there is a graph for so many rows on these versions (int64 [rows], all loaded)."""
        if rows > self.max_rows:
            return False
        if not versions.any():
            return True
        return self._lora is not None and self._lora.captures(versions)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every graph, the largest first: the others then find their memory in its pool."""
        pool, started = None, time.perf_counter()
        reported = started
        wanted = [(bucket, kind) for bucket in reversed(self._buckets) for kind in self._kinds(bucket)]
        total = len(wanted)
        with _without_collections():
            for bucket, kind in wanted:
                self._fill(_PADDING, bucket, kind)
                graph = capture_graph(partial(self._run, bucket, kind), pool)
                self._graphs[bucket, kind] = graph
                pool = pool or graph.pool()
                if time.perf_counter() - reported > PROGRESS_SECONDS:
                    reported = time.perf_counter()
                    logger.info("capturing decode graphs: %d of %d", len(self._graphs), total)
        logger.info("captured %d decode graphs in %.1f s", total, time.perf_counter() - started)

    def launch(self, columns: StepColumns) -> PendingColumns:
        """Queue a step that `takes` accepted; what its rows drew, on the way to the host."""
        bucket = self._buckets[bisect.bisect_left(self._buckets, len(columns.slots))]
        kind = self._kind(columns.versions, bucket)
        self._fill(columns, bucket, kind)
        self._graphs[bucket, kind].replay()
        return self._outputs.download()

    def _kinds(self, bucket: int) -> list[Kind]:
        """The graphs that steps of so many rows may need."""
        if self._lora is None or not self._adapters:
            return [Kind.BASE]
        if bucket <= SKINNY_ROWS or not self._lora.num_tails:
            return [Kind.BASE, Kind.ANY_SLOTS]
        kinds = [Kind.BASE, Kind.FEW_TAILS]
        if self._lora.num_tails > FEW_TAILS:
            kinds.append(Kind.ALL_TAILS)
        return kinds if self._lora.all_have_tails else [*kinds, Kind.ANY_SLOTS]

    def _kind(self, versions: np.ndarray, bucket: int) -> Kind:
        if self._lora is None or not versions.any():
            return Kind.BASE
        # Few rows go through a product that reads A where it is.
        tails = bucket > SKINNY_ROWS and self._lora.tail_slots(versions)
        if not tails:
            return Kind.ANY_SLOTS
        return Kind.FEW_TAILS if tails <= FEW_TAILS else Kind.ALL_TAILS

    def _fill(self, columns: StepColumns, bucket: int, kind: Kind) -> None:
        """Send the columns of a step, and of the rows that pad it, to the device."""
        rows, host, table = len(columns.slots), self._inputs.next(), self._table
        for name, values, padding in (
            ("positions", columns.positions, 0),
            ("locs", columns.out_locs, table.spare_page * table.page_size),
            ("slots", columns.slots, table.max_slots),
            ("kv_lens", columns.kv_lens, 1),
            ("temperature", columns.temperature, 0.0),
            ("uniforms", columns.uniforms, 0.0),
        ):
            host[name][:rows] = values
            host[name][rows:bucket] = padding
        if kind is not Kind.BASE:
            assert self._lora is not None and self._shape is not None
            self._lora.write_words(columns.versions, self._shape, host["words"])
        self._inputs.upload()

    def _run(self, bucket: int, kind: Kind) -> None:
        """Enqueue a step of `bucket` rows."""
        columns = {name: column[:bucket] for name, column in self._inputs.device.items() if name != "words"}
        positions, locs, slots, ids = columns["positions"], columns["locs"], columns["slots"], self._ids[:bucket]
        self._begin(slots, positions, locs, self._last_tokens, self._table.pages, self._table.page_size, ids)
        self._attention.plan_decode(slots, columns["kv_lens"])
        lora = self._adapters.get(kind)
        logits = self.logits[:bucket]
        # What kernels read ahead of time (positions, locations, words) comes by copy, before the graph starts.
        with programmatic_launch():
            ctx = ForwardContext(ids, positions, locs, self._kv_pool, self._attention, lora)
            self._model.compute_logits(self._model.forward(ctx), out=logits)
        drawn = {name: column[:bucket] for name, column in self._outputs.device.items()}
        self._draw(logits, columns["temperature"], columns["uniforms"], **drawn)
        self._last_tokens.scatter_(0, slots, drawn["tokens"])
