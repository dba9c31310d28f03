"""A toy release: our own small code with the structure the patch looks for, and the same leaks.

It runs: `RUN` drives it in a process of its own, because the real name `sglang` belongs to this repository here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "patches" / "src"

STRUCTS = """
class Message:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class LoRAUpdateOutput(Message):
    error_message = None
    loaded_adapters = None


class UnloadLoRAAdapterReqInput(Message):
    pass
"""

REGISTRY = '''"""Toy registry."""

from __future__ import annotations

import asyncio
from collections import OrderedDict


class RWLock:
    def __init__(self):
        self.reader_lock = self.writer_lock = asyncio.Lock()


class ConcurrentCounter:
    def __init__(self):
        self.count = 0

    def value(self):
        return self.count

    async def increment(self, n=1, notify_all=True):
        self.count += n

    async def decrement(self, n=1):
        self.count -= n


class Ref:
    def __init__(self, name):
        self.lora_name, self.lora_id, self.pinned = name, "id-" + name, False


class LoRARegistry:
    def __init__(self):
        self._registry_lock = RWLock()
        self._registry = OrderedDict()
        self._counters = {}

    def add(self, ref):
        self._registry[ref.lora_name] = ref
        self._counters[ref.lora_id] = ConcurrentCounter()

    async def unregister(self, lora_name):
        async with self._registry_lock.writer_lock:
            return self._registry.pop(lora_name).lora_id

    async def acquire(self, lora_name):
        async with self._registry_lock.writer_lock:
            lora_id = self._registry[lora_name].lora_id
        await self._counters[lora_id].increment(notify_all=False)
        return lora_id

    async def release(self, lora_id):
        await self._counters[lora_id].decrement()

    async def wait_for_unload(self, lora_id):
        while self._counters[lora_id].value():
            await asyncio.sleep(0.01)

    async def get_unregistered_loras(self, lora_name):
        return [name for name in lora_name if name not in self._registry]
'''

CONTROL = """import asyncio

from sglang.srt.managers.io_struct import LoRAUpdateOutput, UnloadLoRAAdapterReqInput


class TokenizerControlMixin:
    async def _unload_lora_adapter_locked(self, obj):
        obj.lora_id = await self.lora_registry.unregister(obj.lora_name)
        await self.lora_registry.wait_for_unload(obj.lora_id)
        await asyncio.sleep(0)
        self.backend.discard(obj.lora_name)
        return LoRAUpdateOutput(success=True)

    async def load_lora_adapter(self, obj, _=None):
        from sglang.srt.lora.lora_registry import Ref

        async with self.lora_update_lock:
            await asyncio.sleep(0)
            self.backend.add(obj.lora_name)
            self.lora_registry.add(Ref(obj.lora_name))
            while len(self.lora_registry._registry) > self.limit:
                victim = next(iter(self.lora_registry._registry))
                await self._unload_lora_adapter_locked(UnloadLoRAAdapterReqInput(lora_name=victim))
            return LoRAUpdateOutput(success=True, loaded_adapters={name: "" for name in self.backend})

    async def load_lora_adapter_from_tensors(self, obj, _=None):
        return await self.load_lora_adapter(obj)

    async def unload_lora_adapter(self, obj, _=None):
        async with self.lora_update_lock:
            return await self._unload_lora_adapter_locked(obj)
"""

MANAGER = '''"""Toy manager."""

from __future__ import annotations

import asyncio
import copy
from typing import Dict

from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.io_struct import Message
from sglang.srt.managers.tokenizer_control_mixin import TokenizerControlMixin


class ReqState:
    def __init__(self, obj):
        self.obj, self.event, self.finished = obj, asyncio.Event(), False


class TokenizerManager(TokenizerControlMixin):
    enable_lora = True

    def __init__(self):
        self.rid_to_state: Dict[str, ReqState] = {}
        self.lora_registry = LoRARegistry()
        self.lora_update_lock = asyncio.Lock()
        self.limit, self.backend, self.sent, self.aborts = 2, set(), [], []

    async def generate_request(self, obj, request=None):
        self.rid_to_state[obj.rid] = ReqState(obj)
        await self._resolve(obj)
        if obj.too_long:
            raise ValueError("too long")
        if obj.n == 1:
            self._send_one_request(obj)
            async for output in self._wait_one_response(obj):
                yield output
            return
        samples = []
        for i in range(obj.n + 1):
            sample = copy.copy(obj)
            sample.rid = f"{obj.rid}-{i}"
            self.rid_to_state[sample.rid] = ReqState(sample)
            self._send_one_request(sample)
            samples.append(self._wait_one_response(sample))
        del self.rid_to_state[obj.rid]
        for sample in samples:
            async for output in sample:
                yield output

    async def _resolve(self, obj):
        await self.lora_registry.get_unregistered_loras({obj.lora_path})
        obj.lora_id = await self.lora_registry.acquire(obj.lora_path)

    def _send_one_request(self, tokenized_obj):
        if tokenized_obj.broken:
            raise OSError("broken")
        self.sent.append(tokenized_obj.rid)

    def _send_batch_request(self, tokenized_objs):
        for each in tokenized_objs:
            self._send_one_request(each)

    async def _wait_one_response(self, obj, request=None):
        state = self.rid_to_state[obj.rid]
        await state.event.wait()
        await self._handle_finish(state)
        yield obj.rid

    async def _handle_finish(self, state):
        if state.obj.failed:
            await self.lora_registry.release(state.obj.lora_id)

    def abort_request(self, rid="", abort_all=False):
        self.aborts.append(rid)

    async def _handle_batch_output(self, recv_obj):
        for rid in recv_obj.rids:
            state = self.rid_to_state.pop(rid, None)
            if state is None:
                continue
            if self.enable_lora:
                asyncio.create_task(self.lora_registry.release(state.obj.lora_id))
            state.event.set()

    def _handle_abort_req(self, recv_obj):
        state = self.rid_to_state[recv_obj.rid]
        state.finished = True
        state.event.set()
'''

FILES = {
    "srt/managers/io_struct.py": STRUCTS,
    "srt/managers/tokenizer_manager.py": MANAGER,
    "srt/managers/tokenizer_control_mixin.py": CONTROL,
    "srt/lora/lora_registry.py": REGISTRY,
}
TARGETS = sorted(path for path in FILES if "io_struct" not in path)


def write(site, version="0.5.12"):
    """Write the toy release into folder `site` and return it."""
    for path, text in FILES.items():
        file = site / "sglang" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (site / "sglang" / "__init__.py").write_text("")
    noted = site / f"sglang-{version}.dist-info"
    noted.mkdir()
    (noted / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return site


def run(site, code, *, path=(), **variables):
    """Run `code` in a fresh interpreter that imports the toy; return what it did."""
    places = os.pathsep.join(map(str, (site, *path)))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_LORA_PATCH")}
    env = {**clean, "PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=site, capture_output=True, text=True, check=False)


# Defines `serve(path)`: what the count and the records are after one way of ending a request.
RUN = """
import asyncio, json
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.managers.io_struct import Message, UnloadLoRAAdapterReqInput

def body(rid="r", n=1, too_long=False, broken=False, failed=False, lora_path="A"):
    return Message(rid=rid, n=n, too_long=too_long, broken=broken, failed=failed, lora_path=lora_path)

def batch(*rids):
    return Message(rids=list(rids), finished_reasons=[{"type": "stop"}] * len(rids))

async def read(manager, obj):
    return [output async for output in manager.generate_request(obj)]

async def settle():
    for _ in range(20):
        await asyncio.sleep(0)

async def finish(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    await m._handle_batch_output(batch("r"))
    await task

async def abort_queued(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    m._handle_abort_req(Message(rid="r"))
    await task

async def too_long(m):
    await asyncio.gather(read(m, body(too_long=True)), return_exceptions=True)

async def send_fails(m):
    await asyncio.gather(read(m, body(broken=True)), return_exceptions=True)

async def failed_by_scheduler(m):
    task = asyncio.create_task(read(m, body(failed=True)))
    await settle()
    await m._handle_batch_output(batch("r"))
    await task

async def n3(m):
    task = asyncio.create_task(read(m, body(n=3)))
    await settle()
    await m._handle_batch_output(batch(*m.sent))
    await task

async def gone_client(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    task.cancel()
    await settle()
    assert m.aborts in ([], ["r"])
    assert m.lora_registry._counters["id-A"].value() == 1, "held until the scheduler answers"
    m._handle_abort_req(Message(rid="r"))

async def evict_busy(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    for name in "BC":
        await asyncio.wait_for(m.load_lora_adapter(Message(lora_name=name)), 0.4)
    assert m.backend == {"A", "B", "C"}
    await m._handle_batch_output(batch("r"))
    await task

async def evict_and_use_again(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    for name in "BC":
        await asyncio.wait_for(m.load_lora_adapter(Message(lora_name=name)), 0.4)
    again = asyncio.create_task(read(m, body("again")))
    await settle()
    await m._handle_batch_output(batch("r", "again"))
    await asyncio.gather(task, again)
    assert "A" in m.lora_registry._registry and "A" in m.backend

async def unload_busy(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    answer = await asyncio.wait_for(m.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name="A")), 0.4)
    assert not answer.success and "still in use" in answer.error_message
    await asyncio.wait_for(m.load_lora_adapter(Message(lora_name="B")), 0.4)
    await m._handle_batch_output(batch("r"))
    await task

async def unload_cancelled(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    unload = asyncio.create_task(m.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name="A")))
    await settle()
    unload.cancel()
    await settle()
    await m._handle_batch_output(batch("r"))
    await task

async def load_the_leaving(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    unload = asyncio.create_task(m.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name="A")))
    await settle()
    load = asyncio.create_task(m.load_lora_adapter(Message(lora_name="A")))
    await settle()
    assert not load.done() and not m.lora_update_lock.locked(), "waits, and not with the lock"
    await m._handle_batch_output(batch("r"))
    await task
    assert (await unload).success and (await load).success

async def load_the_leaving_too_long(m):
    task = asyncio.create_task(read(m, body()))
    await settle()
    unload = asyncio.create_task(m.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name="A")))
    await settle()
    answer = await asyncio.wait_for(m.load_lora_adapter(Message(lora_name="A")), 0.4)
    assert not answer.success and "still in use" in answer.error_message
    await m._handle_batch_output(batch("r"))
    await asyncio.gather(task, unload)

async def serve(path):
    manager = TokenizerManager()
    await manager.load_lora_adapter(Message(lora_name="A"))
    counter = manager.lora_registry._counters["id-A"]
    try:
        await asyncio.wait_for(path(manager), 5)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    await settle()
    return [counter.value(), len(manager.rid_to_state), sorted(manager.backend)]

PATHS = [finish, abort_queued, too_long, send_fails, failed_by_scheduler, n3, gone_client, evict_busy,
         evict_and_use_again, unload_busy, unload_cancelled, load_the_leaving, load_the_leaving_too_long]
print(json.dumps({path.__name__: asyncio.run(serve(path)) for path in PATHS}))
"""
