"""The back process and everything the front holds for it: `BackProcess` starts, watches and ends it; `Runtime` owns the
channel, the TokenizerManager and the back process of one server.

Called by `http_server` and `engine`. Nothing here knows HTTP.
Invariants: the back process is always reaped (a thread waits for it), so it never stays behind as a zombie; it never
outlives the front, because its stdin closes with us and end of file tells it to leave; an exit that `Runtime` did not
ask for reaches `TokenizerManager.back_died` exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from sglang.srt.config.sections import Config
from sglang.srt.entrypoints.model_names import settle_adapter
from sglang.srt.lora.adapter_reader import AdapterReader
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.ipc import Endpoint, FrontChannel
from sglang.srt.managers.request_state import RequestMetrics
from sglang.srt.managers.response import OutputChunk
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.observability.logging import Observers, RequestLog
from sglang.srt.observability.metrics import ServerMetrics
from sglang.srt.parser.tokenizer import Tokenizer
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

BACK_COMMAND = (sys.executable, "-m", "sglang.srt.managers.scheduler_process")
LAST_WORDS_SECONDS = 0.1
STOP_GRACE_SECONDS = 10.0
"""How long the back may take to leave after SIGTERM before it is killed."""


def _environment() -> dict[str, str]:
    """Our environment, in which the child also finds this package where only our own sys.path knows it."""
    root = Path(__file__).resolve().parents[3]
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}


def describe_exit(code: int) -> str:
    """A process's return code in words, e.g. ``exited with code 1`` or ``was killed by SIGKILL``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often the kernel's out-of-memory killer)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


class BackProcess:
    """One scheduler process.

    Args:
        config: what it is to serve; sent as one JSON line on its stdin, which then stays open.
        endpoint: the channel it connects to.
        on_exit: called on the event loop with the return code, once, however the process ends.
    """

    def __init__(self, config: Config, endpoint: Endpoint, on_exit: Callable[[int], None]) -> None:
        self._message = msgspec.json.encode({"config": config, "endpoint": endpoint}) + b"\n"
        self._on_exit = on_exit
        self._exited = asyncio.Event()
        # A session of its own: Ctrl-C in a terminal reaches the front alone, which then drains before it ends the back.
        self._process = subprocess.Popen(
            BACK_COMMAND, stdin=subprocess.PIPE, start_new_session=True, env=_environment()
        )
        watcher = threading.Thread(target=self._feed_and_wait, args=(asyncio.get_running_loop(),), daemon=True)
        watcher.start()

    @property
    def pid(self) -> int:
        """Process id, valid until the process is reaped."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as the event loop has heard."""
        return not self._exited.is_set()

    def _feed_and_wait(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died before it read: the return code tells
            self._process.stdin.write(self._message)
            self._process.stdin.flush()
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            loop.call_soon_threadsafe(self._report_exit, code)

    def _report_exit(self, code: int) -> None:
        self._exited.set()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._on_exit(code)

    async def stop(self, grace: float = STOP_GRACE_SECONDS) -> None:
        """End the process and wait until it is reaped: SIGTERM, and SIGKILL after `grace` seconds."""
        if self.alive:
            self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._exited.wait(), grace)
        except asyncio.TimeoutError:
            logger.warning("the back process (pid %d) ignored SIGTERM for %.0f s; killing it", self.pid, grace)
            self.kill()
            await self._exited.wait()

    def kill(self) -> None:
        """Send SIGKILL; returns at once."""
        if self.alive:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


class Runtime:
    """A served model without its HTTP face: channel, TokenizerManager, back process.

    Build and use it on one event loop.
    """

    def __init__(self, server_args: ServerArgs, config: Config) -> None:
        self.server_args = server_args
        self.config = config
        self.metrics = ServerMetrics(config.server.served_model_name) if config.server.enable_metrics else None
        self._request_log: RequestLog | None = None
        self._manager: TokenizerManager | None = None
        self._channel: FrontChannel | None = None
        self._back: BackProcess | None = None
        self._exit_code: int | None = None
        self._stopping = False
        self._death_reported = False

    @property
    def manager(self) -> TokenizerManager:
        """The request side of the server; exists from `start()` on."""
        assert self._manager is not None, "Runtime.start() has not run"
        return self._manager

    async def start(self) -> None:
        """Start the back process, load the tokenizer meanwhile, and start reading what the back says.

        Raises:
            ConfigError: the tokenizer cannot be loaded; the back process has been ended again.
        """
        self._channel = FrontChannel()
        self._back = BackProcess(self.config, self._channel.endpoint, self._back_exited)
        try:
            tokenizer = await asyncio.to_thread(self._load_tokenizer)
            self._manager = TokenizerManager(
                self.config,
                self.server_args,
                self._channel,
                tokenizer,
                metrics=self._observers(tokenizer),
                reader=self._reader(),
                on_publish=None if self.metrics is None else self.metrics.published,
            )
            if self.metrics is not None:
                self.metrics.watch(lambda: self.manager.stats, self._manager.adapters.stats)
            await self._manager.start()
        except BaseException:
            await self._stop_back()
            raise
        if self._exit_code is not None:
            self._report_death(self._exit_code)

    def _load_tokenizer(self) -> Tokenizer | None:
        section = self.config.tokenizer
        return None if section.path is None else Tokenizer.from_path(section.path, chat_template=section.chat_template)

    def _reader(self) -> AdapterReader | None:
        config = self.config
        return AdapterReader(config.model, config.lora, config.load.path) if config.lora.enabled else None

    def _observers(self, tokenizer: Tokenizer | None) -> Observers:
        observers: list[RequestMetrics] = [] if self.metrics is None else [self.metrics]
        if self.config.server.log_requests:
            self._request_log = RequestLog(self.config.server.log_requests_level, tokenizer)
            observers.append(self._request_log)
        return Observers(observers)

    def generate(self, obj: GenerateReqInput, client: Any = None) -> AsyncGenerator[Any, None]:
        """Native replies of a request (see TokenizerManager.generate_request), noted in the log of requests.

        Args:
            client: has `async wait_disconnected()`, which ends the request when it returns; None for no client to lose.

        Raises:
            AdapterError: no adapter is named, and the server runs with --require-adapter.
        """
        self._receive(obj)
        return cast(AsyncGenerator[Any, None], self.manager.generate_request(obj, client))

    def stream(self, obj: GenerateReqInput, client: Any = None) -> AsyncGenerator[OutputChunk, None]:
        """`generate` as deltas (see TokenizerManager.stream_chunks)."""
        self._receive(obj)
        return cast(AsyncGenerator[OutputChunk, None], self.manager.stream_chunks(obj, client))

    def _receive(self, obj: GenerateReqInput) -> None:
        if self._request_log is not None:
            self._request_log.received(obj)
        settle_adapter(obj, self.config)

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return when the model is loaded.

        Raises:
            ServiceUnavailableError: the back process failed or died first; the message says why.
        """
        await self.manager.wait_ready(timeout)

    async def shutdown(self, drain: float = 0.0) -> None:
        """Refuse new requests, give live ones `drain` seconds, abort the rest, end the back process. Idempotent."""
        if self._back is None or self._channel is None:
            return
        if self._manager is not None:
            await self._manager.drain(drain)
        await self._stop_back()

    def kill(self) -> None:
        """End the back process without waiting for anything."""
        self._stopping = True
        if self._back is not None:
            self._back.kill()

    @property
    def back_pid(self) -> int | None:
        """Process id of the back process while it runs."""
        return self._back.pid if self._back is not None and self._back.alive else None

    async def _stop_back(self) -> None:
        self._stopping = True
        back, channel, self._back, self._channel = self._back, self._channel, None, None
        if back is not None:
            if self._manager is None or self._manager.ready is None:
                back.kill()  # it is still loading: there is nothing to finish, and it would not listen
            await back.stop()
        if self._manager is not None:
            await self._manager.close()
        if channel is not None:
            channel.close()

    def _back_exited(self, code: int) -> None:
        self._exit_code = code
        # Its last message, which may say more than an exit code, can still be on its way.
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._report_death, code)

    def _report_death(self, code: int) -> None:
        if self._stopping or self._manager is None or self._death_reported:
            return
        self._death_reported = True
        reason = f"the back process {describe_exit(code)}"
        logger.error("%s; every live request fails with 503, and the server must be restarted", reason)
        self._manager.back_died(reason)
