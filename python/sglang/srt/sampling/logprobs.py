"""Log-probability results on their way to the wire: scores of prompt tokens, and packing for `wire.RowLogprobs`.

`ScoreOutput` comes from `Sampler.score`; the scheduler collects the `HostScore`s of a prompt's chunks and packs them
with `concat_scores` when the prompt is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling.transfer import HostCopy

Alternatives = tuple[NDArray[Any], NDArray[Any]]
"""(ids [n], log-probabilities [n]) at one position."""


@dataclass(slots=True)
class HostScore:
    """Log-probabilities of P consecutive prompt tokens, as arrays.

    Fields:
        logprobs: float32 [P].
        top_ids int32, top_logprobs float32: [P, n], the likeliest tokens, best first; None unless asked for.
        token_ids int32 [m], ids_logprobs float32 [P, m]: the tokens asked for; None unless asked for.
    """

    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    token_ids: NDArray[np.int32] | None = None
    ids_logprobs: NDArray[np.float32] | None = None


HostScores = list[HostScore]
"""Scores of one chunk of a prompt, slice by slice."""


class ScoreOutput:
    """Log-probabilities of prompt tokens on the device, nothing synchronised.

    Args:
        logprobs: float32 [P].
        top: (ids int64 [P, n], log-probabilities float32 [P, n]) or None.
        token_ids: the ids asked for, with their log-probabilities `ids_logprobs` float32 [P, m], or () and None.
    """

    def __init__(
        self,
        logprobs: Tensor,
        top: tuple[Tensor, Tensor] | None,
        token_ids: tuple[int, ...],
        ids_logprobs: Tensor | None,
    ) -> None:
        self.logprobs = logprobs
        self.top_ids = None if top is None else top[0].to(torch.int32)
        self.top_logprobs = None if top is None else top[1]
        self.token_ids = token_ids
        self.ids_logprobs = ids_logprobs
        self._copy: HostCopy | None = None

    def start_copy(self) -> None:
        """Queue the copies to the host now, so that `to_host` does not wait for work queued later."""
        if self._copy is None:
            self._copy = HostCopy(
                {
                    "logprobs": self.logprobs,
                    "top_ids": self.top_ids,
                    "top_logprobs": self.top_logprobs,
                    "ids_logprobs": self.ids_logprobs,
                }
            )

    def to_host(self) -> HostScore:
        """The results as arrays; blocks until the device has them."""
        self.start_copy()
        assert self._copy is not None
        token_ids = np.asarray(self.token_ids, np.int32) if self.token_ids else None
        return HostScore(token_ids=token_ids, **self._copy.wait())


def pack_positions(entries: Sequence[Alternatives | None]) -> wire.Positions:
    """Columns of the alternatives at successive positions; None where there are none to report."""
    present = [entry for entry in entries if entry is not None]
    return wire.Positions(
        counts=wire.pack([0 if entry is None else len(entry[0]) for entry in entries], "<i4"),
        ids=b"".join(wire.pack(ids, "<i4") for ids, _ in present),
        logprobs=b"".join(wire.pack(logprobs, "<f4") for _, logprobs in present),
    )


class PackedScores(NamedTuple):
    """Prompt log-probabilities as `wire.RowLogprobs` wants them; top and ids are None when not asked for."""

    logprobs: bytes
    top: wire.Positions | None
    ids: wire.Positions | None


def concat_scores(
    parts: Sequence[HostScores], missing_first: bool, wants_top: bool = False, wants_ids: bool = False
) -> PackedScores:
    """Pack the scores of one prompt.

    Args:
        parts: its chunks in order, which must agree on what they hold.
        missing_first: the first position wanted is the prompt's first, which has no log-probability: it is reported as
            NaN with no alternatives, before the scores.
        wants_top, wants_ids: alternatives were asked for; matters only when there is no score to tell (a prompt of one
            token).
    """
    scores = [score for part in parts for score in part]
    logprobs = [np.full(int(missing_first), np.nan, np.float32), *(score.logprobs for score in scores)]
    return PackedScores(
        logprobs=wire.pack(np.concatenate(logprobs), "<f4"),
        top=_pack_table([(s.top_ids, s.top_logprobs) for s in scores], missing_first, wants_top),
        ids=_pack_table([(_repeated_ids(s), s.ids_logprobs) for s in scores], missing_first, wants_ids),
    )


def _repeated_ids(score: HostScore) -> NDArray[np.int32] | None:
    if score.token_ids is None:
        return None
    return np.broadcast_to(score.token_ids, (len(score.logprobs), len(score.token_ids)))


def _pack_table(
    tables: Sequence[tuple[NDArray[np.int32] | None, NDArray[np.float32] | None]], missing_first: bool, wanted: bool
) -> wire.Positions | None:
    """Columns of [P, n] tables, one after the other; None when there are no tables and none are wanted."""
    present = [(ids, logprobs) for ids, logprobs in tables if ids is not None and logprobs is not None]
    if not present and not wanted:
        return None
    counts = [np.zeros(int(missing_first), np.int32), *(np.full(len(ids), ids.shape[1]) for ids, _ in present)]
    return wire.Positions(
        counts=wire.pack(np.concatenate(counts), "<i4"),
        ids=b"".join(wire.pack(ids, "<i4") for ids, _ in present),
        logprobs=b"".join(wire.pack(logprobs, "<f4") for _, logprobs in present),
    )
