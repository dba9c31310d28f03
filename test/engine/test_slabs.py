"""ops.slabs and lora.device_slots: layouts are those of trainers, rows have their bytes, and logits do not change."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine.family_models import FAMILIES, load_ours, save_family
from engine.model_harness import Harness
from engine.tiny_lora import CPU, write_adapter
from torch import Tensor

from sgl_kernel.lora import LoraLayout, decoder_groups, pack_slab, peft_modules, unpack_slab
from sglang.rl.publisher_package import Package
from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.resolve import resolve
from sglang.srt.config.sections import MAX_LORA_RANK, Config, LoRASection
from sglang.srt.errors import ConfigError
from sglang.srt.lora import adapter_copier
from sglang.srt.lora.adapter_copier import AdapterCopier, AdapterFile
from sglang.srt.lora.adapter_reader import AdapterReader
from sglang.srt.lora.batch_info import group_rows
from sglang.srt.lora.device_slots import DeviceSlots
from sglang.srt.lora.lora_manager import BaseTensor, LoRAManager, matrices
from sglang.srt.lora.weights import AdapterWeights, Factors, Place
from sglang.srt.model_executor.forward_context import ForwardContext, LoRABatch
from sglang.srt.model_executor.setup import _create_lora, _slabs, lora_tensors
from sglang.srt.models.decoder import DecoderForCausalLM
from sglang.srt.ops.slabs import LoraSlabs, ModelSlabs, SlabPlace
from sglang.srt.server_args import ServerArgs

Modules = dict[str, tuple[Tensor, Tensor, float]]
LAYER = {"self_attn.o_proj": (8, 16), "mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8)}
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
O0, UP0, UP1 = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_modules(ranks: dict[str, int], seed: int, shapes: dict[str, tuple[int, int]] | None = None) -> Modules:
    generator = torch.Generator().manual_seed(seed)

    def module(name: str, rank: int) -> tuple[Tensor, Tensor, float]:
        outputs, inputs = (shapes or SHAPES).get(name, (24, 8))
        a = torch.randn(rank, inputs, generator=generator) * 0.3
        return a, torch.randn(outputs, rank, generator=generator) * 0.3, 0.5 + seed

    return {name: module(name, rank) for name, rank in ranks.items()}


# ---- layouts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderForCausalLM]:
    path = tmp_path_factory.mktemp(request.param)
    reference = save_family(request.param, path)
    model = load_ours(path).model
    assert isinstance(model, DecoderForCausalLM)
    return reference, model


def slabs_of_model(model: DecoderForCausalLM, max_rank: int = 16) -> ModelSlabs:
    shapes = {name: tensor.shape for name, tensor in matrices(lora_tensors(model.weights)).items()}
    return ModelSlabs(shapes, max_rank, "float32")


def trainers_layout(config: ModelConfig, max_rank: int = 16) -> LoraLayout:
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    groups = decoder_groups(config.hidden_size, config.intermediate_size, *heads)
    return LoraLayout(groups, config.num_hidden_layers, max_rank, "float32")


def test_the_layout_of_every_family_is_the_trainers(family: tuple[Any, DecoderForCausalLM]) -> None:
    _, model = family
    assert slabs_of_model(model).layout.digest == trainers_layout(model.config).digest


def test_slices_of_a_site_are_the_rows_of_one_parameter(family: tuple[Any, DecoderForCausalLM]) -> None:
    _, model = family
    slabs, tensors = slabs_of_model(model), matrices(lora_tensors(model.weights))
    rows: dict[tuple[int, str], list[tuple[str, int]]] = {}
    for name, place in sorted(slabs.places.items(), key=lambda item: item[1]):
        site = rows.setdefault((place.layer, place.group), [])
        assert len(site) == place.slice_index
        site.append((tensors[name].parameter, tensors[name].start))
    for (layer, group), parts in rows.items():
        outputs = slabs.layout.site(layer, group).out_features
        starts = [sum(outputs[:i]) for i in range(len(outputs))]
        assert parts == [(parts[0][0], start) for start in starts]
        assert model.parameters[parts[0][0]].shape[0] == sum(outputs)
    assert len(rows) == 4 * model.config.num_hidden_layers
    assert set(tensors) - set(slabs.places) <= {"model.embed_tokens", "lm_head"}


def test_a_staged_adapter_has_the_bytes_that_its_trainer_packs(
    family: tuple[Any, DecoderForCausalLM], tmp_path: Path
) -> None:
    """PEFT's state dict through peft_modules and pack_slab, and the same adapter through the server."""
    _, model = family
    slabs, tensors = slabs_of_model(model), lora_tensors(model.weights)
    shapes = {name: tensor.shape for name, tensor in matrices(tensors).items() if name in slabs.places}
    ranks = {name: 6 for i, name in enumerate(shapes) if i % 3}
    modules = {name: (a, b, 4 / 6) for name, (a, b, _) in random_modules(ranks, 1, shapes).items()}  # type: ignore[arg-type]
    state = {f"base_model.model.{n}.lora_{f}.weight": pair["AB".index(f)] for n, pair in modules.items() for f in "AB"}
    layout = trainers_layout(model.config)
    packed = np.full(layout.slab_bytes, 0xAB, np.uint8)
    pack_slab(layout, peft_modules(layout, state, {"r": 6, "lora_alpha": 4}), packed)
    manager = LoRAManager(tensors, model.parameters, slabs, 3, torch.device("meta"))
    staged = manager.stage(write_adapter(tmp_path / "a", modules)).slab
    assert staged.rank == 6 and np.array_equal(staged.data.numpy(), packed)


@pytest.mark.parametrize("max_rank", [8, 16])
def test_a_slab_that_was_sent_is_what_the_server_keeps(
    family: tuple[Any, DecoderForCausalLM], max_rank: int, tmp_path: Path
) -> None:
    """As its tensors are; and in one piece, where both sides have room for as many ranks."""
    _, model = family
    slabs, tensors = slabs_of_model(model, max_rank), lora_tensors(model.weights)
    shapes = {name: tensor.shape for name, tensor in matrices(tensors).items() if name in slabs.places}
    modules = random_modules(dict.fromkeys(shapes, 8), 1, shapes)  # type: ignore[arg-type]
    state = {f"base_model.model.{n}.lora_{f}.weight": pair["AB".index(f)] for n, pair in modules.items() for f in "AB"}
    config = {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"}
    reader = AdapterReader(model.config, LoRASection(enabled=True), "/models/tiny")
    manager = LoRAManager(tensors, model.parameters, slabs, 3, torch.device("meta"))
    reader.slab_layout = manager.layout.describe()
    staged = []
    for layout in (manager.layout.describe(), None):
        package = Package(state, config, "float32", layout)
        assert package.form == ("tensors" if layout is None else "slab")
        read = reader.read_tensors(config, b"".join(package.image()), "safetensors")
        staged.append(manager.stage(read.adapter).slab)
        plan = manager._copier._last
        assert plan is not None
        if layout is not None and max_rank == 8:
            assert [len(read.parts) for read in plan.reads] == [1] and not plan.casts
        read.close()
    packed = np.full(manager.layout.slab_bytes, 0xAB, np.uint8)
    pack_slab(manager.layout, peft_modules(manager.layout, state, config), packed)
    for slab in staged:
        assert slab.rank == 8 and np.array_equal(slab.data.numpy(), packed)


def test_what_is_no_whole_group_is_in_no_slab() -> None:
    others = {"model.embed_tokens": (24, 8), "lm_head": (24, 8), "model.layers.0.self_attn.q_proj": (16, 8)}
    slabs = ModelSlabs({**SHAPES, **others}, 4, "bfloat16")
    assert [(g.name, g.in_features, g.out_features) for g in slabs.layout.groups] == [
        ("o", 16, (8,)),
        ("gate_up", 8, (16, 16)),
    ]
    assert slabs.places[UP1] == SlabPlace(1, "gate_up", 1) and set(slabs.places) == set(SHAPES)
    with pytest.raises(ValueError, match="give at least one"):
        ModelSlabs(others, 4, "bfloat16")


def test_ranks_end_where_the_front_says() -> None:
    assert ModelSlabs(SHAPES, MAX_LORA_RANK, "float32").layout.rank_cap == MAX_LORA_RANK
    with pytest.raises(ValueError, match="max_rank is 257"):
        ModelSlabs(SHAPES, MAX_LORA_RANK + 1, "float32")
    with pytest.raises(ValueError, match="in_features is 12"):
        ModelSlabs({O0: (16, 12)}, 8, "float32")


# ---- rows ----------------------------------------------------------------------------------------------------------


class Rows:
    """Device slots on the CPU, where their bytes can be seen, and adapters of the toy model above."""

    def __init__(self, path: Path, num_slots: int = 2, dtype: str = "float32") -> None:
        tensors = {f"{name}.weight": base for name, base in _toy_tensors().items()}
        self.model = ModelSlabs(SHAPES, 12, dtype)
        self.manager = LoRAManager(tensors, {}, self.model, num_slots, torch.device("meta"))
        self.slots = DeviceSlots(self.model.layout, num_slots, CPU)
        self.host: dict[int, AdapterWeights] = {}
        self.modules: dict[int, Modules] = {}
        self.path = path

    def stage(self, version: int, ranks: dict[str, int], seed: int | None = None) -> None:
        self.modules[version] = random_modules(ranks, version if seed is None else seed)
        adapter = write_adapter(self.path / "adapter", self.modules[version])
        self.host[version] = self.manager.stage(adapter)

    def packed(self, version: int) -> np.ndarray:
        """The slab that a trainer would have packed."""
        layout, slab = self.model.layout, np.full(self.model.layout.slab_bytes, 0xCD, np.uint8)
        state, config = {}, {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}}
        for name, (a, b, scale) in self.modules[version].items():
            if name in SHAPES:
                state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                config["rank_pattern"][name] = len(a)  # type: ignore[index]
                config["alpha_pattern"][name] = scale * len(a)  # type: ignore[index]
        pack_slab(layout, peft_modules(layout, state, config), slab)
        return slab

    def assert_row(self, version: int) -> None:
        """One row has the version's bytes, and the version's factors are views of it."""
        assert self.slots.versions.count(version) == 1
        row = self.slots.versions.index(version)
        data = self.slots.slabs.data[row]
        assert np.array_equal(data.numpy(), self.packed(version))
        assert self.slots.slabs.ranks[row] == self.host[version].slab.rank
        weights = self.slots.weights[version]
        assert weights.slab.data.data_ptr() == data.data_ptr()
        for parameter, parts in weights.factors.items():
            for mine, host in zip(parts, self.host[version].factors[parameter], strict=True):
                assert (mine.start, mine.scale) == (host.start, host.scale)
                assert torch.equal(mine.a, host.a) and torch.equal(mine.b, host.b)
                inside = data.data_ptr() <= mine.a.data_ptr() < data.data_ptr() + data.nbytes
                assert inside == (parameter != "lm_head")


def _toy_tensors() -> dict[str, BaseTensor]:
    tensors = {name: BaseTensor(name, 0, shape) for name, shape in SHAPES.items()}
    return tensors | {name: BaseTensor(name, 0, (24, 8)) for name in ("model.embed_tokens", "lm_head")}


@pytest.fixture(params=DTYPES)
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Rows:
    return Rows(tmp_path, dtype=request.param)


def test_a_row_has_the_bytes_of_pack_slab(rows: Rows) -> None:
    rows.stage(7, {O0: 3, UP0: 9, UP1: 9, "lm_head": 2})
    rows.stage(8, {UP1: 12})
    rows.slots.slabs.data.fill_(0xEE)
    rows.slots.load((8, 7), rows.host)
    rows.assert_row(8)
    rows.assert_row(7)
    assert sorted(rows.slots.slabs.ranks.tolist()) == [0, 9, 12] and sorted(rows.slots.versions) == [0, 7, 8]


@pytest.mark.parametrize("sent", DTYPES)
@pytest.mark.parametrize("ranks", [{O0: 8, UP0: 8, UP1: 8, "lm_head": 8}, {O0: 8, UP1: 2}, {UP0: 5, "lm_head": 8}])
def test_every_byte_of_a_slab_is_written(
    rows: Rows, ranks: dict[str, int], sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as they are or cast, dense or not, whatever the memory held before, and whichever adapter came before."""
    monkeypatch.setattr(AdapterCopier, "_empty", lambda _, nbytes: torch.full((nbytes,), 0xCD, dtype=torch.uint8))
    monkeypatch.setattr(adapter_copier, "MAX_PARTS", 3)
    for version, chosen in enumerate((ranks, ranks, {O0: 3}, ranks), start=1):
        modules = random_modules(chosen, version)
        rows.modules[version] = {
            name: (a.to(DTYPES[sent]), b.to(DTYPES[sent]), scale) for name, (a, b, scale) in modules.items()
        }
        rows.host[version] = rows.manager.stage(write_adapter(rows.path / "adapter", rows.modules[version]))
        assert np.array_equal(rows.host[version].slab.data.numpy(), rows.packed(version))
        if "lm_head" in chosen:
            (head,) = rows.host[version].factors["lm_head"]
            a, b, _ = rows.modules[version]["lm_head"]
            assert torch.equal(head.a, a.to(rows.model.dtype)) and torch.equal(head.b, b.to(rows.model.dtype))


@pytest.mark.parametrize("most", [64, 4096])
def test_reads_are_many_where_bytes_are(most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies side by side in the file and in the slab is one part, of a read that is large enough for a thread."""
    slabs = ModelSlabs({O0: LAYER["self_attn.o_proj"]}, 8, "float32")
    copier = AdapterCopier(
        {name: Place(name, 0, place) for name, place in slabs.places.items()}, slabs, tight=False, pin=False
    )
    monkeypatch.setattr(adapter_copier, "READ_BYTES", most)
    ((_, (a, b, _)),) = modules = list(random_modules({O0: 8}, 1).items())
    adapter = write_adapter(tmp_path / "a", dict(modules))
    with AdapterFile(adapter) as file:
        slab = copier.copy(adapter, file).slab
    assert copier._last is not None
    start = slab.layout.site(0, "o").a_offset
    middle, end = start + a.nbytes, start + a.nbytes + b.nbytes
    one, two = [[(True, start, end)]], [[(True, start, middle)], [(True, middle, end)]]
    assert [read.parts for read in copier._last.reads] == (two if most == 64 else one)
    numbers = slab.data[start:end].view(torch.float32)
    assert torch.equal(numbers, torch.cat([a.flatten(), b.flatten()]))


@pytest.mark.parametrize(("blocks", "count"), [(1, 2), (3, 3), (9, 5)])
def test_memory_is_locked_before_it_is_needed(blocks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as many adapters as may come, as long as they stay small together; for two in any case."""
    slabs = ModelSlabs({O0: LAYER["self_attn.o_proj"]}, 8, "float32")
    nbytes, locked = slabs.layout.slab_bytes, list[int]()
    monkeypatch.setattr(AdapterCopier, "_empty", lambda _, nbytes: locked.append(nbytes))
    monkeypatch.setattr(adapter_copier, "WARM_BYTES", blocks << (nbytes - 1).bit_length())
    AdapterCopier({}, slabs, tight=False, pin=False, warm=5)
    assert locked == []
    AdapterCopier({}, slabs, tight=False, pin=True, warm=5)
    assert locked == [nbytes] * count


def test_locked_memory_is_kept_until_the_first_adapter_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given back before that, it would be gone with torch's cache of it, which capturing a graph empties."""
    given: list[weakref.ref[torch.Tensor]] = []
    alive = list[int]()

    def empty(_: AdapterCopier, nbytes: int) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in given))
        memory = torch.empty(nbytes, dtype=torch.uint8)
        given.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(AdapterCopier, "_empty", empty)
    slabs = ModelSlabs({O0: LAYER["self_attn.o_proj"]}, 8, "float32")
    copier = AdapterCopier({O0: Place(O0, 0, slabs.places[O0])}, slabs, tight=False, pin=True, warm=3)
    assert alive == [0, 1, 2]
    monkeypatch.setattr(copier, "_pin", False)  # there may be no device
    adapter = write_adapter(tmp_path / "a", random_modules({O0: 8}, 1))
    with AdapterFile(adapter) as file:
        copier.copy(adapter, file)
    assert alive == [0, 1, 2, 0]


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.modules[1] = random_modules(dict.fromkeys(SHAPES, 8), 1)
    adapter = write_adapter(tmp_path / "a", rows.modules[1])
    with AdapterFile(adapter) as file:
        os.truncate(tmp_path / "a", adapter.nbytes // 2)
        with pytest.raises(ValueError, match="ends at byte"):
            rows.manager._copier.copy(adapter, file)


def test_modules_that_an_adapter_lacks_have_rank_zero(rows: Rows) -> None:
    """Also where the row's last adapter had them."""
    for version in (1, 3, 4):
        rows.stage(version, dict.fromkeys(SHAPES, 12))
    rows.stage(2, {UP1: 2})
    rows.slots.load((1, 3), rows.host)
    rows.slots.load((4, 3), rows.host)
    rows.slots.load((2, 3), rows.host)
    rows.assert_row(2)
    data = rows.slots.slabs.data[rows.slots.versions.index(2)]
    (module,) = unpack_slab(rows.model.layout, data.numpy())
    assert (module.layer, module.group, module.slice_index, len(module.a)) == (1, "gate_up", 1, 2)
    assert list(rows.slots.weights[2].factors) == [UP1]


def test_an_adapter_of_the_head_alone_empties_its_row(rows: Rows) -> None:
    for version in (1, 3, 4):
        rows.stage(version, {O0: 4})
    rows.stage(2, {"lm_head": 4})
    rows.slots.load((1, 3), rows.host)
    rows.slots.load((4, 3), rows.host)
    rows.slots.load((2, 3), rows.host)
    row = rows.slots.versions.index(2)
    assert not rows.slots.slabs.data[row].any() and rows.slots.slabs.ranks[row] == 0
    assert rows.host[2].slab.data.nbytes == 0 and rows.host[2].nbytes == rows.host[2].rest.nbytes > 0
    rows.assert_row(2)


def written_versions(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the version of every row that is written."""
    written: list[int] = []
    fill = DeviceSlots._fill
    monkeypatch.setattr(DeviceSlots, "_fill", lambda self, i, v, w: (written.append(v), fill(self, i, v, w))[1])
    return written


def test_a_row_is_written_only_for_a_version_that_none_holds(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    written = written_versions(rows, monkeypatch)
    for version in (1, 2, 3, 4):
        rows.stage(version, {O0: version, UP1: 4})

    def load(*slots: int) -> list[int]:
        written.clear()
        rows.slots.load(slots, rows.host)
        for version in slots:
            if version in rows.host:
                rows.assert_row(version)
        return written

    assert load(1, 2) == [1, 2]
    assert load(1, 2) == []
    assert load(3, 2) == [3]
    assert load(0, 2) == [] and set(rows.slots.weights) == {2}, "a row keeps what it holds"
    assert load(3, 2) == []
    assert load(2, 3) == [], "a version stays in its row when its slot is another"
    assert load(1, 3) == [], "the spare row, too, keeps what it holds"
    assert load(4, 1) == [4]
    assert load(2, 9) == [2], "nobody knows version 9"
    with pytest.raises(AssertionError, match="3 slots, 3 rows"):
        load(1, 2, 3)


def test_a_version_is_brought_before_it_has_a_slot(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    written = written_versions(rows, monkeypatch)
    for version in range(1, 6):
        rows.stage(version, {O0: version, UP1: 4})
    rows.slots.load((1, 2), rows.host)
    before = {version: rows.slots.versions.index(version) for version in (1, 2)}
    for newest in (3, 4):
        rows.slots.prefetch(newest, rows.host[newest])
        assert {version: rows.slots.versions.index(version) for version in (1, 2)} == before, "slots keep their rows"
        assert set(rows.slots.weights) == {1, 2}
    written.clear()
    rows.slots.load((1, 4), rows.host)
    assert not written
    rows.assert_row(1)
    rows.assert_row(4)
    rows.slots.load((1, 3), rows.host)
    assert written == [3], "version 4 had taken its row"
    rows.assert_row(3)


def test_a_freed_version_may_come_back_with_other_bytes(rows: Rows) -> None:
    rows.stage(1, {O0: 4})
    rows.stage(2, {O0: 5})
    rows.slots.load((1, 2), rows.host)
    row, before = rows.slots.versions.index(1), rows.slots.slabs.data.clone()
    rows.slots.forget(1)
    assert torch.equal(rows.slots.slabs.data, before) and sorted(rows.slots.versions) == [0, 0, 2]
    assert set(rows.slots.weights) == {2}
    rows.stage(1, {O0: 4}, seed=99)
    rows.slots.load((1, 2), rows.host)
    rows.assert_row(1)
    rows.assert_row(2)
    assert not torch.equal(rows.slots.slabs.data[rows.slots.versions.index(1)], before[row])


def test_more_versions_than_slots_take_turns(rows: Rows) -> None:
    rng = np.random.default_rng(0)
    for version in range(1, 8):
        rows.stage(version, {name: int(rng.integers(1, 13)) for name in rng.choice([O0, UP0, UP1, "lm_head"], 2)})
    for _ in range(40):
        slots = tuple(rng.permutation(8)[:2].tolist())
        if rng.random() < 0.3:
            newest = int(rng.integers(1, 8))
            if newest not in rows.slots.versions:
                rows.slots.prefetch(newest, rows.host[newest])
        rows.slots.load(slots, rows.host)
        for version in slots:
            if version:
                rows.assert_row(version)
        assert set(rows.slots.weights) == set(slots) - {0}


class FakeDevice:
    """An UploadStream: two queues whose work is done late, in any order that the marks between them allow.

    `steps` is the current queue, `uploads` the other one; an entry is (marks it waits for, work), and a mark is
    (queue, number of entries in front of it).
    """

    def __init__(self, seed: int) -> None:
        self.queues: dict[str, list[tuple[list[tuple[str, int]], Callable[[], None]]]] = {"steps": [], "uploads": []}
        self.done = {"steps": 0, "uploads": 0}
        self.copies: list[Callable[[], None]] = []
        self._pending: list[tuple[str, int]] = []
        self._random = random.Random(seed)

    def queue(self, work: Callable[[], None]) -> object:
        """See UploadStream."""
        work()
        copies, self.copies = self.copies, []
        self.queues["uploads"].append(([("steps", len(self.queues["steps"]))], lambda: [copy() for copy in copies]))
        return "uploads", len(self.queues["uploads"])

    def wait(self, mark: Any) -> None:
        """See UploadStream."""
        self._pending.append(mark)

    def step(self, work: Callable[[], None]) -> None:
        """Queue a step."""
        self.queues["steps"].append((self._pending, work))
        self._pending = []

    def run(self, most: int) -> None:
        """Do up to so many pieces."""
        for _ in range(most):
            ready = [name for name, queue in self.queues.items() if self._is_ready(name, queue)]
            if not ready:
                return
            name = self._random.choice(ready)
            self.queues[name][self.done[name]][1]()
            self.done[name] += 1

    def _is_ready(self, name: str, queue: list[Any]) -> bool:
        return self.done[name] < len(queue) and all(self.done[q] >= n for q, n in queue[self.done[name]][0])


class LateSlabs(LoraSlabs):
    """Slabs that are written when the device comes to it."""

    __slots__ = ("device",)

    def commit(self, slot: int, slab: Tensor, rank: int | None = None) -> None:
        """See LoraSlabs."""
        assert rank is not None
        self.ranks[slot] = rank
        self.device.copies.append(lambda: self.data[slot].copy_(slab))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(30))
def test_no_step_reads_a_row_while_it_is_written(seed: int, tmp_path: Path) -> None:
    """Versions come, take slots and are freed while steps and uploads lag behind in every order that is allowed.

    Words of a step name rows when it is queued; its adapters must be in these rows when it runs, however late.
    """
    rng, device, rows = random.Random(seed), FakeDevice(seed), Rows(tmp_path)
    rows.slots = DeviceSlots(rows.model.layout, 2, CPU, stream=device)
    rows.slots.slabs = LateSlabs(rows.slots.slabs.data, rows.model.layout)
    object.__setattr__(rows.slots.slabs, "device", device)
    slots, versions, read = [0, 0], 0, 0

    def step() -> None:
        rows.slots.load(slots, rows.host)
        places = {version: rows.slots.versions.index(version) for version in slots if version}
        expected = {row: rows.packed(version) for version, row in places.items()}

        def check() -> None:
            nonlocal read
            for row, slab in expected.items():
                assert np.array_equal(rows.slots.slabs.data[row].numpy(), slab)
                read += 1

        device.step(check)

    for _ in range(60):
        event = rng.random()
        if event < 0.3 and len(rows.host) < 5:
            versions += 1
            rows.stage(versions, {O0: rng.randint(1, 12), UP1: rng.randint(1, 12)})
            rows.slots.prefetch(versions, rows.host[versions])
        elif event < 0.4 and (idle := [v for v in rows.host if v not in slots]):
            freed = rng.choice(idle)
            rows.slots.forget(freed)
            del rows.host[freed]
        elif event < 0.6 and (others := [v for v in rows.host if v not in slots]):
            slots[rng.randrange(2)] = rng.choice(others)
        else:
            step()
        device.run(rng.choice([0, 0, 1, 3]))
    step()
    device.run(1000)
    assert device.done == {name: len(queue) for name, queue in device.queues.items()} and read


# ---- logits --------------------------------------------------------------------------------------------------------


class Plain:
    """Weights with dense factors of their own, in no slab."""

    def __init__(self, modules: Modules, tensors: dict[str, BaseTensor]) -> None:
        self.factors: dict[str, list[Factors]] = {}
        for name, (a, b, scale) in modules.items():
            base = tensors[name]
            self.factors.setdefault(base.parameter, []).append(Factors(base.start, scale, a.clone(), b.clone()))


class Adapted:
    """A model whose rows have adapters: a CausalLM."""

    def __init__(self, model: DecoderForCausalLM, weights: dict[int, Any]) -> None:
        self.model, self.weights = model, weights
        self.versions = np.zeros(0, np.int64)

    def forward(self, ctx: ForwardContext) -> Tensor:
        ctx.lora = group_rows(self.versions, self.weights, CPU)
        return self.model.forward(ctx)

    def compute_logits(self, hidden: Tensor, lora: LoRABatch | None = None) -> Tensor:
        return self.model.compute_logits(hidden, group_rows(self.versions, self.weights, CPU))

    def logits(self) -> list[Tensor]:
        """Of prompts of several versions in one step, of one decode step, and of a step of one version."""
        harness = Harness(self, self.model.config)
        versions, lengths = [1, 0, 2, 3, 1], [9, 4, 17, 1, 3]
        sequences = [harness.open() for _ in versions]
        self.versions = np.repeat(versions, lengths)
        found = harness.step(*((s, range(2, 2 + n)) for s, n in zip(sequences, lengths, strict=True)))
        self.versions = np.array(versions)
        found += harness.step(*((sequence, [5 + i]) for i, sequence in enumerate(sequences)))
        self.versions = np.full(16, 2)
        return found + harness.step((harness.open(), range(16)))


def test_logits_with_slabs_are_those_with_plain_factors(family: tuple[Any, DecoderForCausalLM], tmp_path: Path) -> None:
    """Bit for bit: from the host's slabs, of each adapter's rank, and from the rows of a device."""
    _, model = family
    tensors, slabs = lora_tensors(model.weights), slabs_of_model(model)
    bases = matrices(tensors)
    shapes: dict[str, Any] = {name: base.shape for name, base in bases.items() if name != "model.embed_tokens"}
    host, device = (LoRAManager(tensors, model.parameters, slabs, 3, torch.device(d)) for d in ("cpu", "meta"))
    slots = DeviceSlots(slabs.layout, 3, CPU)
    plain, tight, packed = {}, {}, {}
    for version, rank in enumerate((16, 5, 8), start=1):
        ranks = {name: max(1, rank - i % 3) for i, name in enumerate(shapes) if i % version == 0}
        modules = random_modules(ranks, version, shapes)
        adapter = write_adapter(tmp_path / "a", modules)
        plain[version] = Plain(modules, bases)
        tight[version], packed[version] = host.stage(adapter), device.stage(adapter)
    slots.load((3, 1, 2), packed)
    want = Adapted(model, plain).logits()
    assert not torch.equal(want[0][:3], want[1][:3])
    for weights in (tight, slots.weights):
        assert all(torch.equal(got, w) for got, w in zip(Adapted(model, weights).logits(), want, strict=True))


# ---- at start ------------------------------------------------------------------------------------------------------


def engine_config(path: Path, **flags: Any) -> Config:
    return resolve(ServerArgs(model_path=str(path), device="cpu", skip_tokenizer_init=True, enable_lora=True, **flags))


def test_slots_must_fit_the_device(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    model = load_ours(tmp_path).model
    config = engine_config(tmp_path, max_lora_rank=16, max_loras_per_batch=3)
    platform: Any = SimpleNamespace(device=torch.device("meta"), available_memory=lambda: 1 << 20)
    manager = _create_lora(config, model, _slabs(config), platform)
    assert manager._slots is not None and manager._slots.slabs.num_slots == 4
    assert manager._slots.slabs.layout == slabs_of_model(model).layout
    platform.available_memory = lambda: 4 * slabs_of_model(model).layout.slab_bytes - 1
    with pytest.raises(ConfigError, match=r"3 adapter slots of rank 16 and a spare .* lower --max-lora-rank"):
        _create_lora(config, model, _slabs(config), platform)


def test_a_model_that_no_slab_is_made_for_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "odd", ("Llama", {"intermediate_size": 100}))
    save_family("odd", tmp_path)
    with pytest.raises(ConfigError, match="in_features is 100; .* leave out --enable-lora"):
        _slabs(engine_config(tmp_path))
