"""Adapters that come as slabs are the adapters that come as tensors, or are refused as strictly."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from unit.lora.adapter_files import Q0, by_module, every, reader
from unit.lora.slab_images import (
    GROUPS,
    RANK,
    image_of,
    packed,
    servers_layout,
    slab_config,
    slab_image,
    slab_tensors,
    that_takes,
    wire_layout,
)

from sgl_kernel.lora import LoraLayout
from sglang.rl.publisher_package import Package
from sglang.srt.errors import AdapterError
from sglang.srt.lora import adapter_image
from sglang.srt.lora.adapter_reader import AdapterReader, ReadAdapter

OWN = servers_layout()
WIRE = wire_layout(OWN)
IMAGE = slab_image()
Q_A = f"base_model.model.{Q0}.lora_A.weight"


def slab_reader(own: LoraLayout | None = OWN, max_bytes: int | None = None, **lora: object) -> AdapterReader:
    return that_takes(reader(max_bytes, **lora), own)


def read(image: bytes, config: dict | None = None, own: LoraLayout | None = OWN, **lora: object) -> ReadAdapter:
    return slab_reader(own, **lora).read_tensors(config or slab_config(), image, "safetensors")


def refusal(image: bytes, config: dict | None = None, own: LoraLayout | None = OWN, **lora: object) -> str:
    """Message of invalid_adapter."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterError) as caught:
        read(image, config, own, **lora)
    assert caught.value.code == "invalid_adapter" and caught.value.status == 400
    assert len(os.listdir("/proc/self/fd")) <= before, "a refused adapter keeps its buffer"
    return str(caught.value)


def good_slab() -> np.ndarray:
    return packed(WIRE, slab_tensors(), slab_config())


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_rank", [8, 16, 256])
def test_a_slab_is_its_tensors(dtype, max_rank):
    own, tensors, config = servers_layout(max_rank, dtype), slab_tensors(), slab_config(use_rslora=True)
    layout = wire_layout(own)
    came = read(image_of(packed(layout, tensors, config), layout.describe()), config, own)
    same = reader().read_tensors(config, b"".join(Package(tensors, config, dtype).image()), "safetensors")
    assert came.num_tensors == len(tensors) == same.num_tensors and came.max_rank == RANK
    assert came.digest != same.digest, "how it came is part of the digest"
    found, expected = by_module(came), by_module(same)
    assert list(found) == list(expected)
    for name, (scale, a, b) in expected.items():
        assert found[name][0] == scale
        assert np.array_equal(found[name][1], a) and np.array_equal(found[name][2], b)


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        (("q_proj", "k_proj", "v_proj"), ("qkv",)),
        (("q_proj", "k_proj", "v_proj", "down_proj"), ("qkv", "down")),
        (("o_proj",), ("o",)),
    ],
)
def test_groups_that_an_adapter_lacks_are_left_out(kinds, groups):
    layout, tensors, config = wire_layout(OWN, groups=groups), slab_tensors(*kinds), slab_config(*kinds)
    found = by_module(read(image_of(packed(layout, tensors, config), layout.describe()), config))
    assert sorted(found) == sorted(every(*kinds))
    for name, (_, a, b) in found.items():
        assert np.array_equal(a, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert np.array_equal(b, tensors[f"base_model.model.{name}.lora_B.weight"])


def test_every_route_gives_the_same_digest_and_the_content_another(tmp_path):
    image = slab_image()
    (tmp_path / "adapter_config.json").write_text(json.dumps(slab_config()))
    (tmp_path / "adapter_model.safetensors").write_bytes(image)
    spaced = image_of(good_slab(), json.dumps(WIRE.describe(), indent=2), metadata={
        "lora_layout": json.dumps(WIRE.describe(), indent=2), "format": "pt",
    })  # fmt: skip
    same = {slab_reader().read_directory(str(tmp_path)).digest, read(image).digest, read(spaced).digest}
    changed = good_slab()
    changed[WIRE.slab_bytes // 2] ^= 1
    other_scale = slab_config(lora_alpha=4)
    others = {
        read(image_of(changed, WIRE.describe())).digest,
        read(slab_image(lora_alpha=4), other_scale).digest,
        read(slab_image(servers_layout(dtype="float16")), own=servers_layout(dtype="float16")).digest,
    }
    assert len(same) == 1 and len(others | same) == 4


def test_one_reader_takes_slabs_and_tensors_in_turn_and_at_once():
    one, tensors = slab_reader(), save(slab_tensors())
    images = {"slab": slab_image(), "tensors": tensors}
    expected = {form: one.read_tensors(slab_config(), image).digest for form, image in images.items()}
    found: list[tuple[str, str]] = []

    def reads(form: str) -> None:
        for _ in range(20):
            adapter = one.read_tensors(slab_config(), images[form])
            found.append((form, adapter.digest))
            adapter.close()

    threads = [threading.Thread(target=reads, args=(form,)) for form in images for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(found)) == sorted(expected.items()) and len(found) == 80


@pytest.mark.parametrize("leaf", [16, 64, 4096])
def test_the_size_of_leaves_changes_nothing_but_the_digest(leaf, monkeypatch):
    monkeypatch.setattr(adapter_image, "LEAF_BYTES", leaf)
    assert by_module(read(slab_image()))
    bad = good_slab()
    bad[WIRE.site(1, "down").end - 4 :][:4].view(np.float32)[0] = np.nan
    assert "layers.1.mlp.down_proj.lora_B.weight has NaN" in refusal(image_of(bad, WIRE.describe()))


def test_checksums_of_every_factor():
    sums = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in slab_tensors().items()}
    one = slab_reader()
    one.read_tensors(slab_config(), slab_image(), "safetensors", sums).close()
    for wrong, match in (
        (sums | {Q_A: "0" * 64}, f"{Q_A} is not what expected_checksums says"),
        (sums | {"lora_slab": "0" * 64}, "lora_slab is in expected_checksums but was not sent"),
    ):
        with pytest.raises(AdapterError, match=match):
            one.read_tensors(slab_config(), slab_image(), "safetensors", wrong)


# ---- layouts that are refused --------------------------------------------------------------------------------------


def with_layout(**changes: object) -> bytes:
    return image_of(good_slab(), {**WIRE.describe(), **changes})


DESCRIBED = WIRE.describe()["groups"]
OTHER_WIDTH = [{**DESCRIBED[0], "in_features": 32}, *DESCRIBED[1:]]


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (with_layout(format=3), "format is 3, this server's is 2"),
        (with_layout(num_layers=3), "num_layers is 3, this server's is 2"),
        (with_layout(num_layers=10**12), "num_layers is 1000000000000"),
        (with_layout(dtype="bfloat16"), "dtype is 'bfloat16', this server's is 'float32'; pack for the slab_layout"),
        (with_layout(groups=OTHER_WIDTH), "they must be of this server's"),
        (with_layout(groups=DESCRIBED[::-1]), "in their order"),
        (with_layout(groups=DESCRIBED * 2), "groups are"),
        (with_layout(groups=[]), r"groups are \[\]"),
        (with_layout(groups="qkv"), "groups are 'qkv'"),
        (with_layout(groups=[*DESCRIBED, "x" * 500]), r"\.\.\.; they must be"),
        (with_layout(max_rank="8"), "max_rank is '8'; it must be the adapter's rank"),
        (with_layout(max_rank=8.0), "max_rank is 8.0"),
        (with_layout(max_rank=True), "max_rank is True"),
        (with_layout(max_rank=12), "max_rank is 12; .* a multiple of 8"),
        (with_layout(max_rank=0), "max_rank is 0; it must be 1 to 256"),
        (with_layout(max_rank=-8), "max_rank is -8"),
        (with_layout(max_rank=264), "max_rank is 264"),
        (with_layout(max_rank=16), "the slab has .* bytes, its layout"),
        (with_layout(more=1), "it must have exactly format, groups"),
        (image_of(good_slab(), {}), "it is {}; it must have exactly"),
        (image_of(good_slab(), "[1]"), r"it is \[1\]"),
        (image_of(good_slab(), "{"), "it is no JSON"),
        (image_of(good_slab(), "[" * 100_000), "recursion"),
        (image_of(good_slab()[:-256], WIRE.describe()), "bytes, its layout"),
        (image_of(np.zeros(1, np.uint8), WIRE.describe()), "the slab has 1 bytes"),
    ],
)
def test_layouts_of_others_are_refused(image, match):
    message = refusal(image)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(message)
    assert len(message) < 2000


@pytest.mark.parametrize("depth", [100, 900, 950, 1000, 5000, 9000, 9500, 9900, 50_000, 1_000_000])
@pytest.mark.parametrize("key", [None, "format", "groups", "max_rank"])
def test_nesting_of_any_depth_is_refused(depth, key):
    nested = "[" * depth + "]" * depth
    text = nested if key is None else json.dumps({**WIRE.describe(), key: 0.5}).replace("0.5", nested)
    assert "the slab's layout does not fit" in refusal(image_of(good_slab(), text))


def test_a_server_that_takes_no_slabs_says_so():
    assert "takes no slabs; send the tensors" in refusal(slab_image(), own=None)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "other"}, "there must be 'lora_slab' alone"),
        ({"more": {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}, "alone, not 2 tensors"),
        ({"dtype": "F32"}, "it must be U8"),
        ({"shape": [1, 2]}, "it must be U8"),
        ({"data_offsets": [8, 16]}, "it must be U8"),
        ({"metadata": {"format": "pt"}}, "is U8; adapters are"),
        ({"metadata": {"lora_layout": 1}}, "is not as the format says"),
    ],
)
def test_images_that_are_none_of_a_slab(changes, match):
    assert match in refusal(image_of(good_slab(), WIRE.describe(), **changes))


def test_an_image_without_a_slab():
    assert "not 0 tensors" in refusal(
        (lambda text: len(text).to_bytes(8, "little") + text)(b'{"__metadata__":{"lora_layout":"{}"}}')
    )
    empty = image_of(np.zeros(0, np.uint8), WIRE.describe())
    assert "it must be U8" in refusal(empty)


# ---- adapters that are refused -------------------------------------------------------------------------------------


def test_ranks_beyond_the_servers():
    layout = wire_layout(OWN, 16)
    image = image_of(packed(layout, slab_tensors(rank=16), slab_config(r=16)), layout.describe())
    read(image, slab_config(r=16)).close()
    message = refusal(image, slab_config(r=16), max_lora_rank=8)
    assert "rank 16 is incompatible with --max-lora-rank 8" in message


def test_configs_of_other_adapters():
    image = slab_image()
    assert f"{Q_A} is [8, 16]; r=16 and this model make it [16, 16]" in refusal(image, slab_config(r=16))
    assert "scale 1; by its layout and adapter_config.json it has rank 8 and scale 2" in refusal(
        image, slab_config(lora_alpha=16)
    )
    assert f"gives {Q0} rank 8 and scale 1" in refusal(image, slab_config(alpha_pattern={"q_proj": 4}))
    assert "that the adapter's config leaves out" in refusal(image, slab_config("q_proj"))
    assert "embed_tokens, of which no layer has tensors" in refusal(
        image, slab_config("all", target_modules=[*slab_config()["target_modules"], "embed_tokens"])
    )
    assert "use_dora" in refusal(image, slab_config(use_dora=True))
    assert "runs '/models/tiny'" in refusal(image, slab_config(base_model_name_or_path="/other"), strict=True)


def test_modules_outside_the_launch_flag():
    message = refusal(slab_image(), target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert "adapters of down_proj, gate_proj, up_proj are incompatible with --lora-target-modules" in message


def test_the_budget_of_bytes():
    with pytest.raises(AdapterError, match="exceed this server's limit of 1000"):
        slab_reader(max_bytes=1000).read_tensors(slab_config(), slab_image(), "safetensors")


# ---- bytes that are refused ----------------------------------------------------------------------------------------


def table(slab: np.ndarray) -> np.ndarray:
    return slab[16 : 16 + WIRE.table_bytes].view(np.dtype([("rank", "<i4"), ("scale", "<f4")]))


def number(slab: np.ndarray, value: float) -> None:
    slab[WIRE.site(0, "qkv").a_offset :][:4].view(np.float32)[0] = value


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda slab: slab[:4].view("<i4").fill(4),
            "it begins with [4, 0, 0, 0]; a slab of this layout begins with [8",
        ),
        (lambda slab: slab[:4].view("<i4").fill(-1), "it begins with [-1,"),
        (lambda slab: slab[8:9].fill(1), "it begins with [8, 0, 1, 0]"),
        (lambda slab: table(slab)["rank"].put(3, 0), "gives model.layers.0.self_attn.o_proj rank 0"),
        (lambda slab: table(slab)["rank"].put(0, 2**31 - 1), f"gives {Q0} rank 2147483647"),
        (lambda slab: table(slab)["scale"].put(1, 1.5), "self_attn.k_proj rank 8 and scale 1.5"),
        (lambda slab: table(slab)["scale"].put(13, np.nan), "layers.1.mlp.down_proj rank 8 and scale nan"),
        (lambda slab: table(slab)["scale"].put(2, np.inf), "scale inf"),
        (lambda slab: number(slab, np.nan), f"{Q_A} has NaN or infinite values"),
        (lambda slab: number(slab, -np.inf), f"{Q_A} has NaN or infinite values"),
        (lambda slab: slab[-1:].fill(1), "other bytes than zeros behind its factors"),
    ],
)
def test_slabs_that_are_none_of_their_adapter(spoil, match):
    slab = good_slab()
    spoil(slab)
    assert match in refusal(image_of(slab, WIRE.describe()))


def test_the_table_is_padded_with_zeros():
    own = LoraLayout(GROUPS[:1], 1, 16, "float32")
    layout = wire_layout(own)
    assert layout.table_bytes == 32, "three entries and eight bytes"
    tensors = {name: value for name, value in slab_tensors("q_proj", "k_proj", "v_proj").items() if ".0." in name}
    config = slab_config("q_proj", "k_proj", "v_proj")
    slab = packed(layout, tensors, config)
    read(image_of(slab, layout.describe()), config, own).close()
    slab[16 + 24] = 1
    assert "other bytes than zeros behind its table" in refusal(image_of(slab, layout.describe()), config, own)


def test_all_problems_of_the_bytes_are_in_one_message():
    slab = good_slab()
    number(slab, np.nan)
    table(slab)["scale"].put(0, 3)
    slab[-1] = 1
    message = refusal(image_of(slab, WIRE.describe()))
    assert all(part in message for part in ("scale 3", "behind its factors", "has NaN"))


@settings(deadline=None)
@given(cut=st.integers(0, len(IMAGE) - 1))
def test_truncated_slabs_are_refused(cut):
    with pytest.raises(AdapterError):
        read(IMAGE[:cut])


@settings(deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(IMAGE) - 1), st.binary(min_size=1, max_size=8)), max_size=4))
def test_corrupted_slabs_are_refused_or_have_the_numbers_that_came(changes):
    """Whatever the bytes, nothing but AdapterError; and never a number, a rank or a scale that did not come."""
    image = bytearray(IMAGE)
    for offset, data in changes:
        image[offset : offset + len(data)] = data[: len(image) - offset]
    try:
        came = by_module(read(bytes(image)))
    except AdapterError:
        return
    slab, site = np.frombuffer(bytes(image[-WIRE.slab_bytes :]), np.uint8), WIRE.site(0, "qkv")
    for module, (scale, a, b) in came.items():
        assert (scale, a.shape[0], b.shape[1]) == (1.0, RANK, RANK), module
        assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.array_equal(came[Q0][1].view(np.uint8).ravel(), slab[site.a_offset :][: came[Q0][1].nbytes])


@settings(deadline=None)
@given(noise=st.binary(max_size=300))
def test_noise_in_the_place_of_a_slab_is_refused(noise):
    with pytest.raises(AdapterError):
        read(image_of(np.frombuffer(noise, np.uint8), WIRE.describe()))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(deadline=None)
@given(key=st.sampled_from([*WIRE.describe(), "other"]), value=json_values)
def test_any_description_is_refused_or_the_servers(key, value):
    description = {**WIRE.describe(), key: value}
    try:
        read(image_of(good_slab(), description)).close()
    except AdapterError:
        return
    assert description == WIRE.describe()
