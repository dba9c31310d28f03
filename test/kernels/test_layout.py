"""Offsets are those that README.md describes, and a description is a layout."""

from __future__ import annotations

import json

import pytest

from sgl_kernel.lora.layout import LoraGroup, LoraLayout, LoraSite, decoder_groups

GROUPS = decoder_groups(hidden=64, intermediate=96, num_heads=4, num_kv_heads=2, head_dim=24)


def test_decoder_groups():
    assert [(g.name, g.in_features, g.out_features) for g in GROUPS] == [
        ("qkv", 64, (96, 48, 48)),
        ("o", 96, (64,)),
        ("gate_up", 64, (96, 96)),
        ("down", 96, (64,)),
    ]


@pytest.mark.parametrize(("dtype", "item"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
@pytest.mark.parametrize("max_rank", [1, 5, 8, 17, 64, 256])
def test_parts_are_aligned_and_lie_one_behind_the_other(max_rank, dtype, item):
    layout = LoraLayout(GROUPS, 3, max_rank, dtype)
    cap = -(-max_rank // 8) * 8
    assert (layout.rank_cap, layout.dtype, layout.item_bytes) == (cap, dtype, item)
    table, end = 16, 16 + layout.table_bytes
    for layer in range(3):
        for group in GROUPS:
            site = layout.site(layer, group.name)
            assert (site.table_offset, site.item_bytes) == (table, item)
            table += 8 * len(group.out_features)
            for index in range(len(group.out_features)):
                assert site.a_start(index) == site.a_offset + index * cap * group.in_features * item == end
                assert end % 16 == 0
                end += cap * group.in_features * item
            for offset, rows in zip(site.b_offsets, group.out_features, strict=True):
                assert offset == end and end % 16 == 0
                end += rows * cap * item
            assert site.end == end
    table -= 16
    assert table <= layout.table_bytes < table + 16 and layout.table_bytes % 16 == 0
    assert end <= layout.slab_bytes and layout.slab_bytes % 256 == 0


@pytest.mark.parametrize(("dtype", "item", "word"), [("bfloat16", 2, 2), ("float16", 2, 18), ("float32", 4, 4)])
def test_words(dtype, item, word):
    layout = LoraLayout(GROUPS, 2, 5, dtype)
    site = layout.site(1, "gate_up")
    assert site.words == (64, 8, 2, 96, 96, 0, site.table_offset, site.a_offset, *site.b_offsets, 0, word)
    assert (site.num_slices, site.u_width, site.total_out) == (2, 16, 192)
    for name in ("qkv", "o", "gate_up", "down"):
        site = layout.site(1, name)
        again = LoraSite.from_words(site.words)
        assert again.words == site.words and again.end == site.end
        assert (again.dtype, again.item_bytes) == (dtype, item)


def test_sites_are_hashed_by_identity():
    layout, twin = LoraLayout(GROUPS, 2, 5), LoraLayout(GROUPS, 2, 5)
    assert layout.site(0, "o") is layout.site(0, "o")
    assert layout.site(0, "o") != twin.site(0, "o")
    assert layout == twin and hash(layout) == hash(twin)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_description_travels_as_json(dtype):
    layout = LoraLayout(GROUPS, 2, 5, dtype)
    again = LoraLayout.from_description(json.loads(json.dumps(layout.describe())))
    assert again == layout and again.digest == layout.digest and again.slab_bytes == layout.slab_bytes
    assert again.dtype == dtype and dtype in repr(again)


def test_another_layout_has_another_digest():
    layouts = [
        LoraLayout(GROUPS, 2, 5),
        LoraLayout(GROUPS, 3, 5),
        LoraLayout(GROUPS, 2, 6),
        LoraLayout(GROUPS[::-1], 2, 5),
        LoraLayout(GROUPS, 2, 5, "float16"),
        LoraLayout(GROUPS, 2, 5, "float32"),
    ]
    assert len({layout.digest for layout in layouts}) == len(set(layouts)) == 6


def _without_dtype():
    description = LoraLayout(GROUPS, 2, 5).describe()
    del description["dtype"]
    return description


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LoraGroup("g", 12, (8,)), "in_features is 12; it must be a multiple of 8"),
        (lambda: LoraGroup("g", 0, (8,)), "in_features is 0"),
        (lambda: LoraGroup("g", 8, ()), "0 slices"),
        (lambda: LoraGroup("g", 8, (1, 2, 3, 4)), "4 slices"),
        (lambda: LoraGroup("g", 8, (8, 0)), "must be positive"),
        (lambda: LoraLayout(GROUPS, 2, 0), "max_rank is 0; it must be 1 to 256"),
        (lambda: LoraLayout(GROUPS, 2, 257), "max_rank is 257"),
        (lambda: LoraLayout(GROUPS, 0, 8), "num_layers is 0"),
        (lambda: LoraLayout([], 2, 8), "at least one"),
        (lambda: LoraLayout(GROUPS, 2, 8, "int8"), "dtype is 'int8'; it must be one of bfloat16, float16, float32"),
        (lambda: LoraLayout([GROUPS[0], GROUPS[0]], 2, 8), "every name once"),
        (lambda: LoraLayout(GROUPS, 2, 8).site(2, "qkv"), "layers are 0 to 1, groups are qkv, o, gate_up, down"),
        (lambda: LoraLayout(GROUPS, 2, 8).site(0, "lm_head"), "no site 'lm_head'"),
        (lambda: LoraLayout.from_description({"format": 99}), "format 99"),
        (lambda: LoraLayout.from_description({"format": 1}), "format 1, this version reads 2"),
        (lambda: LoraLayout.from_description({"format": 2, "groups": []}), "not a description"),
        (lambda: LoraLayout.from_description(_without_dtype()), "not a description"),
        (lambda: LoraSite.from_words((1, 2, 3)), "12 ints"),
        (lambda: LoraSite.from_words((8, 8, 4) + (0,) * 8 + (2,)), "1 to 3 slices"),
        (lambda: LoraSite.from_words((8, 8, 1) + (0,) * 9), "a dtype of 2, 4 or 18"),
    ],
)
def test_errors_say_the_value(make, text):
    with pytest.raises(ValueError, match=text):
        make()
