"""Drives stock's real TokenizerManager on a CPU through every way a request can end. One JSON line per path.

    python stock_driver.py FOLDER_WITH_SGLANG [PATH ...]

Run with the interpreter of the scratch environment (patches/scripts/stock_venv.sh). Only the two sockets are replaced:
behind them a scheduler that does what the real one does with requests, aborts and adapters, and notes when an adapter
is dropped under a request. The verdict of a path is what `/unload_lora_adapter` would see afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ABORT = {"type": "abort", "message": "Aborted"}
STOP = {"type": "length", "length": 1}
LIMIT = 1.0


def make(cls, **known):
    """An instance of a message class of any release: what is not known is None."""
    names = getattr(cls, "__struct_fields__", None) or [each.name for each in dataclasses.fields(cls) if each.init]
    return cls(**{name: known.get(name) for name in names})


class Scheduler:
    """The other end of both sockets."""

    def __init__(self, structs):
        self.structs = structs
        self.inbox = asyncio.Queue()
        self.mode = "finish"
        self.waiting, self.running, self.answers = {}, {}, []
        self.adapters, self.loaded, self.unsafe, self.seen = {}, [], [], []
        self.hold_loads = self.hold_aborts = None
        self.counters, self.early = {}, 0

    # The socket towards the scheduler.
    def send_pyobj(self, message):
        self.take(message)
        return asyncio.sleep(0)

    # The socket from the detokenizer.
    async def recv_pyobj(self):
        return await self.inbox.get()

    def look(self):
        """Note by how much the count of an adapter falls short of the requests that are here with it."""
        here = [lora_id for lora_id, _ in (*self.waiting.values(), *self.running.values()) if lora_id]
        for lora_id in set(here):
            counter = self.counters.get(lora_id)
            self.early = max(self.early, here.count(lora_id) - (counter.value() if counter else 0))

    def take(self, message):
        name = type(message).__name__
        if name.startswith("BatchTokenized"):
            for each in message.batch:
                self.request(each)
        elif name.startswith("Tokenized"):
            self.request(message)
        elif name == "AbortReq":
            self.abort(message)
        elif name.endswith("LoRAAdapterReqInput") or name == "LoadLoRAAdapterFromTensorsReqInput":
            self.adapter(message, name)

    def request(self, message):
        rid, self.seen = message.rid, [*self.seen, message.rid]
        holder = (message.lora_id, message.sampling_params.max_new_tokens)
        if self.mode == "finish" or (self.mode == "fanout" and not holder[1]):
            self.output(rid, STOP)
        elif self.mode in ("queue", "fanout"):
            self.waiting[rid] = holder
        elif self.mode == "run":
            self.running[rid] = holder
            self.output(rid, None)
        elif self.mode == "echo503":
            reason = {**ABORT, "status_code": 503}
            self.inbox.put_nowait(self.structs.AbortReq(rid=rid, finished_reason=reason))
        else:
            self.output(rid, {**ABORT, "status_code": int(self.mode)})

    def abort(self, message):
        if self.hold_aborts is not None:
            self.hold_aborts.append(message)
            return
        for rid in list(self.waiting):
            if message.abort_all or rid.startswith(message.rid):
                del self.waiting[rid]
                self.inbox.put_nowait(self.structs.AbortReq(rid=rid))
        for rid in list(self.running):
            if message.abort_all or rid.startswith(message.rid):
                del self.running[rid]
                self.output(rid, ABORT)

    def finish_all(self):
        for rid in [*self.waiting, *self.running]:
            self.output(rid, STOP)
        self.waiting, self.running = {}, {}

    def output(self, rid, reason):
        lists = {"prompt_tokens": 4, "completion_tokens": 1, "cached_tokens": 0, "reasoning_tokens": 0}
        lists |= {"retraction_counts": 0, "output_ids": [7], "finished_reasons": reason, "read_offsets": 0}
        lists |= {"cached_tokens_details": None, "spec_verify_ct": 0, "output_hidden_states": None, "decode_ids": [7]}
        lists = {name: [value] for name, value in lists.items()}
        self.inbox.put_nowait(make(self.structs.BatchTokenIDOutput, rids=[rid], **lists))

    def adapter(self, message, name):
        if name.startswith("Unload"):
            users = [
                rid for rid, (lora_id, _) in {**self.waiting, **self.running}.items() if lora_id == message.lora_id
            ]
            self.unsafe += users
            self.loaded.append(f"-{message.lora_name}")
            self.adapters.pop(message.lora_name, None)
        else:
            self.loaded.append(f"+{message.lora_name}")
            self.adapters[message.lora_name] = "path"
        answer = self.structs.LoRAUpdateOutput(success=True, loaded_adapters=dict(self.adapters))
        if self.hold_loads is None:
            self.inbox.put_nowait(answer)
        else:
            self.hold_loads.append(answer)

    def answer_aborts(self):
        held, self.hold_aborts = self.hold_aborts, None
        for message in held:
            self.abort(message)

    def answer_loads(self):
        held, self.hold_loads = self.hold_loads, None
        for answer in held:
            self.inbox.put_nowait(answer)


class Client:
    """Stands for the HTTP request object."""

    def __init__(self):
        self.gone = False
        self.headers = {}

    async def is_disconnected(self):
        return self.gone


class World:
    """One TokenizerManager with one scheduler."""

    def __init__(self, modules, arguments):
        self.structs, self.tm = modules["structs"], modules["tm"]
        self.crash = None
        self.manager = self.tm.TokenizerManager(*arguments)
        self.scheduler = Scheduler(self.structs)
        self.manager.send_to_scheduler = self.manager.recv_from_detokenizer = self.scheduler
        for name, each in vars(self.manager).items():
            if name.endswith("_communicator") and hasattr(getattr(each, "_sender", None), "send_pyobj"):
                each._sender = self.scheduler
        self.scheduler.counters = self.manager.lora_registry._counters
        self.tm.print_exception_wrapper = self.watched
        self.tasks = []

    async def watched(self, function):
        """Instead of ending the process."""
        try:
            await function()
        except Exception as error:
            self.crash = f"{type(error).__name__}: {error}"

    async def load(self, name):
        return await self.manager.load_lora_adapter(self.structs.LoadLoRAAdapterReqInput(lora_name=name, lora_path="p"))

    async def unload(self, name):
        return await self.manager.unload_lora_adapter(self.structs.UnloadLoRAAdapterReqInput(lora_name=name))

    def body(self, *, n=1, stream=False, lora="A", ids=(1, 2, 3), rid=None, **sampling):
        ids = [list(each) for each in ids] if isinstance(ids[0], tuple) else list(ids)
        parameters = {"max_new_tokens": 4, "n": n, **sampling}
        return self.structs.GenerateReqInput(
            input_ids=ids, sampling_params=parameters, lora_path=lora, stream=stream, rid=rid
        )

    async def consume(self, body, client=None):
        outputs = []
        try:
            async for output in self.manager.generate_request(body, client):
                outputs.append(output)
        except Exception as error:
            return error
        return outputs

    def start(self, body, client=None):
        task = asyncio.create_task(self.consume(body, client))
        self.tasks.append(task)
        return task

    def count(self, name="A"):
        registry = self.manager.lora_registry
        ref = registry._registry.get(name)
        return None if ref is None else registry._counters[ref.lora_id].value()


async def settle(world, turns=30):
    """Let everything that can go on go on."""
    for _ in range(turns):
        await asyncio.sleep(0.001)
        world.scheduler.look()


async def within(awaitable, seconds=LIMIT):
    """(answer, None), or (None, "HANG") after `seconds`."""
    task = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        return None, "HANG"  # and it goes on waiting, with what it holds
    return task.result(), None


# ---- the paths --------------------------------------------------------------------------------------------------

PATHS = {}


def path(function):
    PATHS[function.__name__] = function
    return function


@path
async def finish(w):
    await within(w.start(w.body()))


@path
async def finish_stream(w):
    await within(w.start(w.body(stream=True)))


@path
async def abort_running(w):
    w.scheduler.mode = "run"
    task = w.start(w.body(rid="r"))
    await settle(w)
    w.manager.abort_request("r")
    await within(task)


@path
async def abort_queued(w):
    w.scheduler.mode = "queue"
    task = w.start(w.body(rid="r"))
    await settle(w)
    w.manager.abort_request("r")
    await within(task)


@path
async def abort_all_32_queued(w):
    w.scheduler.mode = "queue"
    tasks = [w.start(w.body()) for _ in range(32)]
    await settle(w)
    w.manager.abort_request(abort_all=True)
    await within(asyncio.wait(tasks))


async def disconnect(w, mode):
    w.scheduler.mode = mode
    client = Client()
    task = w.start(w.body(), client)
    await settle(w)
    client.gone = True
    await within(task)


@path
async def disconnect_queued(w):
    await disconnect(w, "queue")


@path
async def disconnect_running(w):
    await disconnect(w, "run")


async def drop_stream(w, mode):
    """What the HTTP layer does: cancel the task that reads, then the background task's abort."""
    w.scheduler.mode = mode
    body = w.body(stream=True)
    task = w.start(body, Client())
    await settle(w)
    task.cancel()
    await settle(w)
    w.manager.abort_request(body.rid)


@path
async def disconnect_stream_queued(w):
    await drop_stream(w, "queue")


@path
async def disconnect_stream_running(w):
    await drop_stream(w, "run")


@path
async def disconnect_slow_abort(w):
    """Until the scheduler has taken the abort in, it computes with the adapter."""
    w.scheduler.hold_aborts = []
    await drop_stream(w, "run")
    await settle(w)
    w.scheduler.answer_aborts()


@path
async def prompt_too_long(w):
    await within(w.start(w.body(ids=tuple(range(1, 101)))))


@path
async def bad_parameter(w):
    await within(w.start(w.body(temperature=-1.0)))


async def error_from_scheduler(w, mode):
    w.scheduler.mode = mode
    await within(w.start(w.body()))


@path
async def scheduler_400(w):
    await error_from_scheduler(w, "400")


@path
async def scheduler_500(w):
    await error_from_scheduler(w, "500")


@path
async def scheduler_503(w):
    await error_from_scheduler(w, "503")


@path
async def queue_full_503(w):
    await error_from_scheduler(w, "echo503")


@path
async def n4(w):
    await within(w.start(w.body(n=4)))


@path
async def n4_batch_of_2(w):
    await within(w.start(w.body(n=4, ids=((1, 2), (3, 4)))))


@path
async def n4_too_long(w):
    await within(w.start(w.body(n=4, ids=tuple(range(1, 101)))))


@path
async def n4_abort_all_queued(w):
    w.scheduler.mode = "fanout"
    task = w.start(w.body(n=4))
    await settle(w)
    w.manager.abort_request(abort_all=True)
    await within(task)


@path
async def n4_disconnect_queued(w):
    w.scheduler.mode = "fanout"
    client = Client()
    task = w.start(w.body(n=4), client)
    await settle(w)
    client.gone = True
    await within(task)


@path
async def n4_disconnect_warm_up(w):
    await disconnect_of(w, w.body(n=4), "queue")


async def disconnect_of(w, body, mode):
    w.scheduler.mode = mode
    client = Client()
    task = w.start(body, client)
    await settle(w)
    client.gone = True
    await within(task)


@path
async def batch(w):
    await within(w.start(w.body(ids=((1, 2), (3, 4), (5, 6)))))


@path
async def batch_one_bad(w):
    w.scheduler.mode = "queue"
    await within(w.start(w.body(ids=((1, 2), (3, 4), tuple(range(1, 101))))))


@path
async def batch_one_bad_late(w):
    """As with prompts that are text: sent one by one, and the last cannot be."""
    w.manager._should_use_batch_tokenization = lambda *_: False
    await batch_one_bad(w)


@path
async def batch_abort_all_queued(w):
    w.scheduler.mode = "queue"
    task = w.start(w.body(ids=((1, 2), (3, 4))))
    await settle(w)
    w.manager.abort_request(abort_all=True)
    await within(task)


@path
async def cancel_at_every_step(w):
    """Four at a time, so that they meet at the locks."""
    for turns in range(24):
        tasks = [w.start(w.body()) for _ in range(4)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await settle(w, 3)
    w.scheduler.finish_all()


@path
async def cancel_in_reload(w):
    """A request names an evicted adapter, and goes while the back end is loading it."""
    await w.unload("A")
    w.scheduler.hold_loads = []
    task = w.start(w.body())
    await settle(w)
    task.cancel()
    await settle(w)
    w.scheduler.answer_loads()
    await settle(w)
    _, hang = await within(w.load("C"))
    return {"other_load": hang or "ok"}


@path
async def abort_after_finish(w):
    """The echo of an abort meets a request that has ended."""
    await within(w.start(w.body(rid="r")))
    w.scheduler.inbox.put_nowait(w.structs.AbortReq(rid="r"))


@path
async def same_rid_again(w):
    for _ in range(3):
        w.scheduler.mode = "queue"
        task = w.start(w.body(rid="r"))
        await settle(w)
        w.manager.abort_request("r")
        await within(task)


async def busy(w):
    w.scheduler.mode = "run"
    task = w.start(w.body())
    await settle(w)
    return task


@path
async def load_evicts_busy(w):
    """Three adapters may be loaded, a fourth comes, and the oldest is in use."""
    await w.load("C")
    task = await busy(w)
    for name in ("B", "C"):  # used since, so that A is the one to go
        w.manager.lora_registry._registry.move_to_end(name)
    answer, hang = await within(w.load("D"))
    kept = "A" in w.scheduler.adapters
    w.scheduler.finish_all()
    await within(task)
    await settle(w)
    gone = "A" not in w.scheduler.adapters
    return {"load": hang or ("ok" if answer.success else answer.error_message), "kept_while_used": kept, "gone": gone}


@path
async def unload_busy(w):
    """An unload whose adapter stays in use must not block the other adapters."""
    os.environ["SGLANG_LORA_PATCH_UNLOAD_TIMEOUT"] = "0.2"
    task = await busy(w)
    unload = asyncio.create_task(w.unload("A"))
    await settle(w)
    _, other = await within(w.load("C"))
    _, hang = await within(unload)
    w.scheduler.finish_all()
    await within(task)
    await settle(w)
    os.environ.pop("SGLANG_LORA_PATCH_UNLOAD_TIMEOUT")
    return {"other_load": other or "ok", "unload": hang or "answered", "gone": "A" not in w.scheduler.adapters}


@path
async def pause_abort(w):
    """The weight update of a training loop: pause (which aborts), load, continue."""
    w.scheduler.mode = "queue"
    tasks = [w.start(w.body()) for _ in range(4)] + [w.start(w.body(ids=tuple(range(1, 101))))]
    await settle(w)
    paused = w.manager.pause_generation(w.structs.PauseGenerationReqInput(mode="abort"))
    _, hang = await within(paused, 2.5)
    await within(asyncio.wait(tasks))
    await w.manager.continue_generation(w.structs.ContinueGenerationReqInput())
    return {"pause": hang or "ok"}


# ---- one path, one verdict --------------------------------------------------------------------------------------


async def measure(function, modules, arguments):
    """Run one path; what is left afterwards, and what an unload of the adapter makes of it."""
    world = World(modules, arguments)
    await world.load("A")
    await world.load("B")
    report = {"extra": await function(world) or {}}
    await settle(world)
    report["unanswered"] = sum(not task.done() for task in world.tasks)
    report["early"] = world.scheduler.early
    report["count"] = world.count()
    report["records"] = len(world.manager.rid_to_state)
    report["in_scheduler"] = len(world.scheduler.waiting) + len(world.scheduler.running)
    if world.count() is not None:
        started = time.perf_counter()
        _, hang = await within(world.unload("A"))
        report["unload"] = hang or "ok"
        report["unload_ms"] = round((time.perf_counter() - started) * 1e3, 1)
    else:
        report["unload"] = "ok" if "A" not in world.scheduler.adapters else "HANG"
    _, hang = await within(world.load("E"), LIMIT / 2)
    report["next_load"] = hang or "ok"
    report["crash"], report["unsafe"] = world.crash, len(world.scheduler.unsafe)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0)
    return report


def settings(server_args, model, **more):
    """Arguments of a server for a small model, whose configuration is written into the folder `model`."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 128}
    config |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 64, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
    Path(model, "config.json").write_text(json.dumps(config))
    return server_args(
        model_path=model,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=8,
        lora_target_modules=["q_proj"],
        max_loras_per_batch=2,
        max_loaded_loras=3,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        lora_backend="triton",
        **more,
    )


def prepare(tree, model):
    """Import stock from `tree` and return what the paths need."""
    sys.path.insert(0, str(Path(__file__).parent))
    import stock_stub

    stock_stub.install()
    sys.path.insert(0, str(tree))
    if os.environ.get("STOCK_HOOK"):
        importlib.import_module("sglang_lora_patch.hook").install()
    server_args = importlib.import_module("sglang.srt.server_args")
    structs = importlib.import_module("sglang.srt.managers.io_struct")
    tm = importlib.import_module("sglang.srt.managers.tokenizer_manager")
    tm._REQUEST_STATE_WAIT_TIMEOUT = 0.02
    if hasattr(tm, "sock_send"):
        tm.sock_send = lambda sock, message: sock.take(message)
        tm.async_sock_send = lambda sock, message: sock.send_pyobj(message)
        tm.async_sock_recv = lambda sock: sock.recv_pyobj()
    args = settings(server_args.ServerArgs, model)
    context = None
    with contextlib.suppress(ModuleNotFoundError):
        context = importlib.import_module("sglang.srt.runtime_context")
    if hasattr(context, "publish"):
        context.publish(args, role="tokenizer")
    arguments = (args, server_args.PortArgs.init_new(args))
    return {"structs": structs, "tm": tm}, arguments


def main():
    tree, names = Path(sys.argv[1]), sys.argv[2:] or list(PATHS)
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = tempfile.TemporaryDirectory(prefix="stock-model-")
    modules, arguments = prepare(tree, model.name)
    origin = Path(modules["tm"].__file__)
    if tree.resolve() not in origin.resolve().parents:
        raise SystemExit(f"another sglang was imported: {origin}")
    patched = hasattr(modules["tm"], "_lora_patch")
    for name in names:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            report = loop.run_until_complete(measure(PATHS[name], modules, arguments))
        except Exception as error:
            report = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps({"path": name, "patched": patched, **report}) + "\n")
        out.flush()
    model.cleanup()
    os._exit(0)


if __name__ == "__main__":
    main()
