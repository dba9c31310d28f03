"""The sampler on a GPU: the same rules as on the CPU, and no wait for the device in the hot path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.sampling.sampler import HostSample, PenaltyState, Sampler, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

VOCAB = 151936
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 3.0, "top_p": 0.9},
    {"min_p": 0.02},
    {"top_k": 50, "repetition_penalty": 1.1},
    {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.25},
    {"logit_bias": {"5": 12.0}, "min_new_tokens": 3},
]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_rows(kinds: list[int], device: torch.device) -> list[SamplingRow]:
    rows = []
    for kind in kinds:
        params = SamplingParams.from_dict(KINDS[kind])
        spec = params.resolve(vocab_size=VOCAB, eos_ids=(2,), max_new_tokens=64, seed=kind)
        penalties = PenaltyState.create(spec, [9, 9, 4], VOCAB, device)
        rows.append(SamplingRow(spec, 3, penalties, True, top_logprobs_num=kind, token_ids_logprob=(kind, 7)))
    return rows


def make_logits(kinds: list[int]) -> torch.Tensor:
    """A language model's distribution, rounded to bfloat16 as a model's logits are, so with many ties."""
    rows = []
    for kind in kinds:
        rng = np.random.default_rng(kind)
        rows.append(rng.permutation(15 - 1.5 * np.log(np.arange(1, VOCAB + 1))))
    return torch.from_numpy(np.stack(rows)).to(torch.bfloat16).float()


def sample(kinds: list[int], device: str) -> HostSample:
    where = torch.device(device)
    return Sampler(VOCAB, where).sample(make_logits(kinds).to(where), make_rows(kinds, where)).to_host()


def row_of(result: HostSample, i: int) -> tuple[Any, ...]:
    assert result.logprobs is not None
    return int(result.tokens[i]), result.logprobs[i].tobytes(), result.top.get(i), result.ids.get(i)


def test_rows_are_the_same_alone_and_in_batches() -> None:
    everything = list(range(len(KINDS)))
    together, backwards = sample(everything * 8, "cuda"), sample(everything[::-1], "cuda")
    for kind in everything:
        alone = row_of(sample([kind], "cuda"), 0)
        assert row_of(together, kind) == alone
        assert row_of(together, kind + 5 * len(KINDS)) == alone
        assert row_of(backwards, len(KINDS) - 1 - kind) == alone


def test_tokens_and_logprobs_are_the_cpus() -> None:
    everything = list(range(len(KINDS)))
    on_gpu, on_cpu = sample(everything, "cuda"), sample(everything, "cpu")
    assert on_gpu.tokens.tolist() == on_cpu.tokens.tolist()
    assert on_gpu.logprobs is not None
    assert on_cpu.logprobs is not None
    np.testing.assert_allclose(on_gpu.logprobs, on_cpu.logprobs, atol=2e-5)
    for i in on_cpu.top:
        assert on_gpu.top[i].ids == on_cpu.top[i].ids


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.usefixtures("no_synchronisation")
def test_sampling_and_scoring_never_wait_for_the_device() -> None:
    device = torch.device("cuda")
    everything = list(range(len(KINDS)))
    logits = make_logits(everything).pin_memory().to(device, non_blocking=True)
    sampler, rows = Sampler(VOCAB, device), make_rows(everything, device)
    for position in range(70):  # penalties' buffers grow meanwhile
        for row in rows:
            row.position = position
        sampler.sample(logits, rows).start_copy()
    targets = torch.zeros(len(KINDS), dtype=torch.int64, device=device)
    sampler.score(logits, targets, rows[2].spec, 3, (1, 2)).start_copy()


def test_bad_rows_do_not_crash_the_batch() -> None:
    everything = list(range(len(KINDS)))
    device = torch.device("cuda")
    logits = make_logits(everything).to(device)
    logits[::2, 77] = torch.nan
    result = Sampler(VOCAB, device).sample(logits, make_rows(everything, device)).to_host()
    assert result.bad_rows.tolist() == [kind % 2 == 0 for kind in everything]
    assert not result.tokens[::2].any()
    healthy = sample(everything, "cuda")
    for i in range(1, len(KINDS), 2):
        assert row_of(result, i) == row_of(healthy, i)
