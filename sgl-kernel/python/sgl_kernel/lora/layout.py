"""Where every number of an adapter lies in its slab: the contract between who packs adapters and who runs them.

Used by `slab` and `types`, and by every kernel through `LoraSite.words`. Imports nothing but the standard library, so a
trainer and a server on different machines can both build a layout and compare its `digest`.
Invariants: two layouts made from equal arguments are equal in every offset; every part starts at a multiple of 16
bytes; parts do not overlap. Matrices outside the decoder layers (`lm_head`, `embed_tokens`) are not described here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 2
"""Goes up whenever equal arguments would give other offsets, or equal bytes would mean something else."""
MAX_RANK = 256
MAX_SLICES = 3
RANK_STEP = 8
"""Rows of B are padded to a multiple of this many ranks: 16 bytes of bf16."""
HEADER_BYTES = 16
"""Of a slab: int32, the adapter's rank, and zeros."""
TABLE_ENTRY = 8
"""Bytes of int32 rank, float32 scale."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number of A and B, by the dtype of a layout."""
DTYPE_WORDS = {"bfloat16": 2, "float32": 4, "float16": 18}
"""How a site's words name its dtype: the bytes of a number, and 16 more for the second dtype of as many bytes. Compiled
kernels take 2 alone."""
_DTYPES = {word: dtype for dtype, word in DTYPE_WORDS.items()}
_SITE_WORDS = 6 + 2 * MAX_SLICES
_SLAB_STEP = 256
"""Bytes; slab s of an allocation is then aligned as the allocation is."""


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """One matrix of every layer that adapters add to: slices that share their input.

    Attributes:
        name: how sites are asked for, e.g. ``qkv``.
        in_features: K, a multiple of 8.
        out_features: rows of every slice, one to three of them, in the order of the matrix.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.in_features <= 0 or self.in_features % 8:
            raise ValueError(f"group {self.name}: in_features is {self.in_features}; it must be a multiple of 8")
        if not 1 <= len(self.out_features) <= MAX_SLICES:
            raise ValueError(
                f"group {self.name} has {len(self.out_features)} slices; 1 to {MAX_SLICES} are possible, so split it"
            )
        if min(self.out_features) < 1:
            raise ValueError(f"group {self.name}: out_features are {self.out_features}; each must be positive")


@dataclass(frozen=True, eq=False, slots=True)
class LoraSite:
    """A group in one layer. Hashed by identity: a layout makes each of its sites once.

    Attributes:
        in_features: K of the matrix.
        out_features: rows of every slice.
        rank_cap: ranks that have room, a multiple of 8.
        table_offset: of the first slice's table entry; those of the other slices follow. Like all offsets in bytes from
            the start of a slab.
        a_offset: of the first slice's A; A of slice i starts i * rank_cap * in_features * item_bytes later.
        b_offsets: of every slice's B, whose rows are as far apart as the adapter's rank, rounded up to 8, says.
        dtype: of A and B, as the layout's.
        item_bytes: of a number of A and B.
        words: the site as 12 numbers, which is what kernels take: in_features, rank_cap, number of slices, three
            out_features, table_offset, a_offset, three b_offsets, the dtype (`DTYPE_WORDS`); 0 for a slice that is not
            there.
        num_slices: n.
        u_width: columns of u, n * rank_cap.
        total_out: N, rows of all slices.
        end: the first byte behind the site.
    """

    in_features: int
    out_features: tuple[int, ...]
    rank_cap: int
    table_offset: int
    a_offset: int
    b_offsets: tuple[int, ...]
    dtype: str = "bfloat16"
    item_bytes: int = field(init=False, repr=False)
    words: tuple[int, ...] = field(init=False, repr=False)
    num_slices: int = field(init=False, repr=False)
    u_width: int = field(init=False, repr=False)
    total_out: int = field(init=False, repr=False)
    end: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Kept rather than computed when asked for: a decode step reads them hundreds of times.
        slices = len(self.out_features)
        absent = (0,) * (MAX_SLICES - slices)
        shape = (self.in_features, self.rank_cap, slices, *self.out_features, *absent)
        words = (*shape, self.table_offset, self.a_offset, *self.b_offsets, *absent, DTYPE_WORDS[self.dtype])
        item_bytes = ITEM_BYTES[self.dtype]
        for name, value in (
            ("item_bytes", item_bytes),
            ("words", words),
            ("num_slices", slices),
            ("u_width", slices * self.rank_cap),
            ("total_out", sum(self.out_features)),
            ("end", self.b_offsets[-1] + self.out_features[-1] * self.rank_cap * item_bytes),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_words(cls, words: Iterable[int]) -> LoraSite:
        """The site that has these `words`.

        Raises:
            ValueError: there are not 12 of them, or the number of slices is not 1 to 3, or there is no such dtype.
        """
        values = tuple(words)
        if len(values) != _SITE_WORDS or not 1 <= values[2] <= MAX_SLICES or values[-1] not in _DTYPES:
            raise ValueError(
                f"a site is {_SITE_WORDS} ints with 1 to {MAX_SLICES} slices and a dtype of 2, 4 or 18, got {values}; "
                "pass LoraSite.words"
            )
        slices = values[2]
        b_offsets = values[8 : 8 + slices]
        return cls(values[0], values[3 : 3 + slices], values[1], values[6], values[7], b_offsets, _DTYPES[values[-1]])

    def a_start(self, index: int) -> int:
        """Where A of a slice starts, bytes from the start of the slab."""
        return self.a_offset + index * self.rank_cap * self.in_features * self.item_bytes


class LoraLayout:
    """The layout of one adapter of a model.

    Args:
        groups: of every layer, in the order in which they lie in the slab.
        num_layers: how often they repeat.
        max_rank: the largest rank that an adapter may have, 1 to 256.
        dtype: of A and B: ``bfloat16``, which all kernels take, or ``float16`` or ``float32``, for servers that compute
            in these by other means.

    Attributes:
        rank_cap: max_rank rounded up to 8.
        item_bytes: of a number of A and B.
        table_bytes: size of the table, which starts behind the header, at byte 16.
        slab_bytes: size of a slab.

    Raises:
        ValueError: a number is out of range, two groups share a name, or there is no such dtype.
    """

    def __init__(self, groups: Iterable[LoraGroup], num_layers: int, max_rank: int, dtype: str = "bfloat16") -> None:
        self.groups = tuple(groups)
        self.num_layers = num_layers
        self.max_rank = max_rank
        self.dtype = dtype
        self._check()
        self.item_bytes = ITEM_BYTES[dtype]
        self.rank_cap = round_up(max_rank, RANK_STEP)
        slices = sum(len(group.out_features) for group in self.groups)
        self.table_bytes = round_up(num_layers * slices * TABLE_ENTRY, 16)
        self._sites: dict[tuple[int, str], LoraSite] = {}
        table, end = HEADER_BYTES, HEADER_BYTES + self.table_bytes
        for layer in range(num_layers):
            for group in self.groups:
                site = _place(group, self.rank_cap, dtype, table, end)
                self._sites[layer, group.name] = site
                table, end = table + site.num_slices * TABLE_ENTRY, site.end
        self.slab_bytes = round_up(end, _SLAB_STEP)

    def _check(self) -> None:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"groups are named {names}; give at least one, and every name once")
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}; it must be at least 1")
        if not 1 <= self.max_rank <= MAX_RANK:
            raise ValueError(f"max_rank is {self.max_rank}; it must be 1 to {MAX_RANK}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(ITEM_BYTES)}")

    def site(self, layer: int, group_name: str) -> LoraSite:
        """The site of a group in a layer: always the same object.

        Raises:
            ValueError: there is no such layer or group.
        """
        try:
            return self._sites[layer, group_name]
        except KeyError:
            names = ", ".join(group.name for group in self.groups)
            raise ValueError(
                f"no site {group_name!r} in layer {layer}: layers are 0 to {self.num_layers - 1}, groups are {names}"
            ) from None

    def describe(self) -> dict[str, Any]:
        """The layout as JSON-able data, for `from_description` in another process."""
        return {
            "format": FORMAT,
            "groups": [
                {"name": group.name, "in_features": group.in_features, "out_features": list(group.out_features)}
                for group in self.groups
            ],
            "num_layers": self.num_layers,
            "max_rank": self.max_rank,
            "dtype": self.dtype,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> LoraLayout:
        """The layout that `describe` described.

        Raises:
            ValueError: it is of another format, or something is missing or out of range.
        """
        if description.get("format") != FORMAT:
            raise ValueError(
                f"the layout has format {description.get('format')!r}, this version reads {FORMAT}; "
                "install the same sgl_kernel on both sides"
            )
        try:
            groups = [
                LoraGroup(str(g["name"]), int(g["in_features"]), tuple(int(n) for n in g["out_features"]))
                for g in description["groups"]
            ]
            numbers = int(description["num_layers"]), int(description["max_rank"])
            return cls(groups, *numbers, str(description["dtype"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a description of a layout: {error!r}; use what `describe` returned") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the description, hexadecimal: equal exactly when two layouts are."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoraLayout) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        numbers = f"num_layers={self.num_layers}, max_rank={self.max_rank}, dtype={self.dtype!r}"
        return f"LoraLayout({list(self.groups)}, {numbers})"


def _place(group: LoraGroup, rank_cap: int, dtype: str, table: int, start: int) -> LoraSite:
    """The site whose table entries are at `table` and whose factors begin at `start`."""
    item_bytes = ITEM_BYTES[dtype]
    end = start + len(group.out_features) * rank_cap * group.in_features * item_bytes
    b_offsets = []
    for rows in group.out_features:
        b_offsets.append(end)
        end += rows * rank_cap * item_bytes
    return LoraSite(group.in_features, group.out_features, rank_cap, table, start, tuple(b_offsets), dtype)


def decoder_groups(
    hidden: int, intermediate: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[LoraGroup, LoraGroup, LoraGroup, LoraGroup]:
    """qkv, o, gate_up and down of a decoder with a gated MLP. For a tensor-parallel rank, give its own share.

    Args:
        hidden, intermediate: widths of the residual stream and of the MLP.
        num_heads, num_kv_heads: query heads, and heads of keys and of values.
        head_dim: width of a head; num_heads * head_dim need not be `hidden`.
    """
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    return (
        LoraGroup("qkv", hidden, (q, kv, kv)),
        LoraGroup("o", q, (hidden,)),
        LoraGroup("gate_up", hidden, (intermediate, intermediate)),
        LoraGroup("down", intermediate, (hidden,)),
    )
