"""The sampling kernels on a GPU: against float64, under a CUDA graph, and beside the sampler of mixed batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine.row_sampling_cases import (
    Batch,
    Drawn,
    assert_same_bits,
    check,
    draw,
    make_batch,
    random_batch,
)

from sglang.srt.sampling import device_draw
from sglang.srt.sampling.distribution import Workspace
from sglang.srt.sampling.rows import sample_rows_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

VOCAB = 151936
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make_sampler(max_rows: int, vocab_size: int = VOCAB) -> Any:
    pytest.importorskip("triton")
    from sglang.srt.ops.triton.sampling import RowSampler

    return RowSampler(max_rows, vocab_size, torch.device("cuda"))


def typical_batch(num_rows: int, dtype: torch.dtype, temperature: float | list[float], seed: int = 0) -> Batch:
    """A language model's distributions: log-probability falls with the logarithm of the rank."""
    generator = torch.Generator("cuda").manual_seed(seed)
    ranks = torch.rand(num_rows, VOCAB, device="cuda", generator=generator).argsort(-1) + 1
    uniforms = torch.rand(num_rows, dtype=torch.float64, device="cuda", generator=generator)
    return make_batch((18.0 - 1.5 * ranks.log()).to(dtype), temperature, uniforms)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("num_rows", [1, 3, 64, 256])
def test_random_rows(num_rows: int, dtype: torch.dtype) -> None:
    batch = random_batch(num_rows, VOCAB, dtype, num_rows, "cuda")
    check(draw(make_sampler(256).sample, batch), batch)


@pytest.mark.parametrize("vocab_size", [1, 100, 4096, 4097, 32003, 262143, 262144])
def test_vocabularies(vocab_size: int) -> None:
    batch = random_batch(16, vocab_size, BF16, vocab_size, "cuda")
    check(draw(make_sampler(16, vocab_size).sample, batch), batch)


# Float rounding moves the borders between tokens by about 1e-8. What that changes depends on how many tokens are as
# narrow as that: at 0.7 hardly any, at 1.0 and above most of this distribution's far tail, one draw in 500.
AGREEMENT = [(0.7, 0.999), (1.0, 0.995), (1.3, 0.99)]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("temperature", "least"), [(0.0, 1.0), *AGREEMENT])
def test_tokens_are_the_references(temperature: float, least: float, dtype: torch.dtype) -> None:
    sampler = make_sampler(256)
    agreed = []
    for seed in range(8):
        batch = typical_batch(256, dtype, temperature, seed)
        drawn, expected = draw(sampler.sample, batch), draw(sample_rows_reference, batch)
        check(drawn, batch)
        same = drawn.tokens == expected.tokens
        torch.testing.assert_close(drawn.logprobs[same], expected.logprobs[same], rtol=1e-6, atol=5e-6)
        agreed.append(same)
    assert torch.cat(agreed).double().mean() >= least


@pytest.mark.parametrize(("temperature", "least"), AGREEMENT)
def test_tokens_are_those_of_the_sampler_of_mixed_batches(temperature: float, least: float) -> None:
    sampler, workspace = make_sampler(256), Workspace(VOCAB, torch.device("cuda"))
    agreed = []
    for seed in range(16):
        batch = typical_batch(256, FP32, temperature, seed)
        weights = workspace.weights(batch.logits, batch.temperature)
        expected = device_draw.draw(weights, None, batch.uniforms.cpu().numpy())
        agreed.append(draw(sampler.sample, batch).tokens == expected)
    assert torch.cat(agreed).double().mean() >= least


def test_greedy_ties_have_the_lowest_id() -> None:
    batch = typical_batch(64, BF16, 0.0)
    batch.logits[:, 77777] = batch.logits[:, 150000] = 30.0
    assert draw(make_sampler(64).sample, batch).tokens.tolist() == [77777] * 64


def test_bad_rows_and_infinite_logits() -> None:
    batch = typical_batch(8, BF16, 0.9)
    before = draw(make_sampler(8).sample, batch)
    logits = batch.logits.clone()
    logits[0, 0] = logits[1, VOCAB - 1] = logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, [5, 140000]] = torch.inf
    changed = batch._replace(logits=logits)
    drawn = draw(make_sampler(8).sample, changed)
    check(drawn, changed)
    assert drawn.bad.tolist() == [True] * 4 + [False] * 4
    assert_same_bits(Drawn(*(values[5:] for values in drawn)), Drawn(*(values[5:] for values in before)))


def test_rows_do_not_notice_their_neighbours() -> None:
    sampler = make_sampler(256)
    batch = random_batch(256, VOCAB, BF16, 1, "cuda")
    together = draw(sampler.sample, batch)
    for size in (1, 2, 100):
        assert_same_bits(draw(sampler.sample, batch.rows(slice(size))), Drawn(*(v[:size] for v in together)))
    for i in (3, 77, 255):
        assert_same_bits(draw(sampler.sample, batch.rows([i])), Drawn(*(v[i : i + 1] for v in together)))


def test_replays_of_a_graph_read_what_is_there_now() -> None:
    """Of two graphs of other sizes in one workspace, replayed in turn."""
    sampler = make_sampler(64)
    buffers = random_batch(64, VOCAB, BF16, 0, "cuda")
    drawn = draw(sampler.sample, buffers)  # compiles
    graphs = {}
    for size in (64, 5):
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size]):
            sampler.sample(*buffers.rows(slice(size)), *(values[:size] for values in drawn))
    for seed, size in enumerate((64, 5, 64, 64, 5), start=1):
        batch = random_batch(size, VOCAB, BF16, seed, "cuda")
        for buffer, values in zip(buffers, batch, strict=True):
            buffer[:size].copy_(values)
        graphs[size].replay()
        replayed = Drawn(*(values[:size].clone() for values in drawn))
        check(replayed, batch)
        assert_same_bits(replayed, draw(make_sampler(64).sample, batch))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_sampling_never_waits_and_never_allocates() -> None:
    sampler, batch = make_sampler(16), random_batch(16, VOCAB, BF16, 0, "cuda")
    drawn = draw(sampler.sample, batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(*batch, *drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_counts_over_a_grid_are_the_distribution() -> None:
    """An interval of length p holds n p points of a grid of n, rounded up or down."""
    size, vocab_size = 20000, 30000
    logits = torch.from_numpy(np.random.default_rng(0).normal(0.0, 3.0, vocab_size)).to("cuda", FP32)
    uniforms = (torch.arange(size, dtype=torch.float64, device="cuda") + 0.5) / size
    drawn = draw(make_sampler(size, vocab_size).sample, make_batch(logits.expand(size, -1), 1.0, uniforms))
    counts = torch.bincount(drawn.tokens, minlength=vocab_size).double()
    assert ((counts - torch.softmax(logits.double(), -1) * size).abs() < 1.05).all()
