"""`sglang.Engine` in a Python process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from compat.waiting import until
from server_process import child_environment
from tiny_model import make_tiny_model

import sglang
from sglang.srt.errors import ServiceUnavailableError
from sglang.srt.managers.io_struct import PauseGenerationReqInput
from sglang.srt.managers.io_struct.wire import PauseMode

pytestmark = pytest.mark.slow

PROMPT = [10, 20, 30]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> Iterator[sglang.Engine]:
    with sglang.Engine(model_path=tiny_model, max_running_requests=4, max_total_tokens=20_000) as engine:
        yield engine


def test_single_batch_and_n(engine):
    one = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    assert len(one["output_ids"]) == 8
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    batch = engine.generate(input_ids=[PROMPT, PROMPT], sampling_params=[GREEDY, {**GREEDY, "max_new_tokens": 2}])
    assert [len(reply["output_ids"]) for reply in batch] == [8, 2]
    assert batch[0]["output_ids"] == one["output_ids"]
    assert len(engine.generate("the of", {**GREEDY, "n": 3})) == 3
    assert len(engine.generate(["the", "of"], GREEDY)) == 2


def test_logprobs(engine):
    reply = engine.generate(
        input_ids=PROMPT, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0, top_logprobs_num=2
    )
    meta = reply["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT
    assert len(meta["output_top_logprobs"]) == 8


def test_streams(engine):
    whole = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    events = list(engine.generate(input_ids=PROMPT, sampling_params=GREEDY, stream=True))
    assert events[-1]["text"] == whole["text"]
    for event in engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 9000}, stream=True):
        assert event["output_ids"]
        break  # leaving ends the request
    until(lambda: not engine.tokenizer_manager.records)
    assert engine.flush_cache().success


async def test_asynchronous_generation(engine):
    replies = await asyncio.gather(
        *(engine.async_generate(input_ids=[i, i + 1], sampling_params=GREEDY) for i in range(10, 16))
    )
    assert all(len(reply["output_ids"]) == 8 for reply in replies)
    stream = await engine.async_generate(input_ids=PROMPT, sampling_params=GREEDY, stream=True)
    events = [event async for event in stream]
    assert len(events[-1]["output_ids"]) == 8


async def test_synchronous_generation_inside_a_running_loop(engine):
    assert len(engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]) == 8


async def test_cancelling_ends_the_request(engine):
    task = asyncio.create_task(
        engine.async_generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 9000})
    )
    while not engine.tokenizer_manager.rid_to_state:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while engine.tokenizer_manager.records:
        await asyncio.sleep(0.01)


async def test_pause_abort_and_continue_through_the_manager(engine):
    manager = engine.tokenizer_manager
    long = asyncio.create_task(
        engine.async_generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 9000}, rid="long")
    )
    while "long" not in manager.rid_to_state:
        await asyncio.sleep(0.01)
    await manager.pause_generation(PauseGenerationReqInput(mode=PauseMode.ABORT))
    assert (await long)["meta_info"]["finish_reason"]["type"] == "abort"
    waiting = asyncio.create_task(engine.async_generate(input_ids=PROMPT, sampling_params=GREEDY))
    assert (await manager.flush_cache())[0]
    await manager.continue_generation()
    assert len((await waiting)["output_ids"]) == 8
    assert manager.abort_request(rid="nobody") == 0


def test_errors_are_value_errors(engine):
    with pytest.raises(ValueError, match="temperature"):
        engine.generate(input_ids=PROMPT, sampling_params={"temperature": -1})
    with pytest.raises(ValueError, match="Either text"):
        engine.generate(sampling_params=GREEDY)
    with pytest.raises(ValueError, match="temperature"):
        next(iter(engine.generate(input_ids=PROMPT, sampling_params={"temperature": -1}, stream=True)))
    with pytest.raises(TypeError, match="promt"):
        engine.generate(promt="x")


def test_server_info(engine, tiny_model):
    info = engine.get_server_info()
    assert info["model_path"] == tiny_model
    assert info["internal_states"][0]["memory_usage"]["token_capacity"] == info["max_total_num_tokens"]


def test_shutdown_ends_the_process_and_is_idempotent(tiny_model):
    before = {child.pid for child in psutil.Process().children()}
    engine = sglang.Engine(model_path=tiny_model, max_total_tokens=1000)
    [back] = [child for child in psutil.Process().children() if child.pid not in before]
    engine.shutdown()
    engine.shutdown()
    assert not back.is_running()


def test_an_interpreter_that_just_ends_leaves_nothing(tiny_model):
    script = (
        "import sglang, psutil\n"
        f"engine = sglang.Engine(model_path={tiny_model!r}, max_total_tokens=1000)\n"
        "engine.generate(input_ids=[1, 2], sampling_params={'max_new_tokens': 2})\n"
        "print(psutil.Process().children()[0].pid)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert not psutil.pid_exists(int(run.stdout))


def test_a_model_that_cannot_be_loaded_raises(tmp_path):
    model = make_tiny_model(tmp_path / "broken")
    (model / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ServiceUnavailableError, match=r"model\.safetensors"):
        sglang.Engine(model_path=str(model))
