"""The HTTP server: builds the application, starts the model, drains and stops.

`launch_server` is the entry point of `sglang.launch_server`, of the CLI and of clients that start a server in a process
of their own. Startup binds the port first (a taken port is an error before any weight is loaded), answers 503 while the
model loads, and prints a working command when it is ready.

A dead back process does not end the server: it keeps answering 503, so that clients and supervisors see a failing
health check instead of refused connections, until SIGTERM; the exit code is then 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from sglang.srt import environ
from sglang.srt.config.resolve import resolve
from sglang.srt.config.sections import Config
from sglang.srt.entrypoints.access import AccessMiddleware
from sglang.srt.entrypoints.http_protocol import JsonErrorProtocol, QuietServer
from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.entrypoints.replies import install_error_handlers
from sglang.srt.entrypoints.routes import control, generate, info, lora, metrics, openai, tokenize, weights
from sglang.srt.errors import ConfigError, SglangError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.observability.logging import configure_logging
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections the kernel may hold for us: RL clients open one per request, hundreds at once."""
KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of common connection pools, so that it is the client who closes."""
FLUSH_SECONDS = 5
"""How long responses that are already made may take to reach slow clients at shutdown."""
WARMUP_TOKENS = 4


def launch_server(server_args: ServerArgs, launch_callback: Callable[[], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        launch_callback: called once the server is ready.

    Raises:
        ConfigError: a flag that is refused, or a port that is taken.
        SystemExit: the model could not be served (code 1).
    """
    configure_logging(server_args.log_level)
    config = resolve(server_args)
    _raise_open_file_limit()
    code = uvloop.run(HttpServer(server_args, config, launch_callback).run())
    if code:
        sys.exit(code)


def create_app(runtime: Runtime) -> FastAPI:
    """The application: every route, its access rules, its error bodies."""
    app = FastAPI(title="sglang", openapi_url=None)
    app.state.runtime = runtime
    server = runtime.config.server
    for module in (generate, openai, tokenize, info, control, lora, weights):
        app.include_router(module.router)
    if server.enable_metrics:
        app.include_router(metrics.router)
    install_error_handlers(app)
    app.add_middleware(
        AccessMiddleware,
        api_key=server.api_key,
        admin_api_key=server.admin_api_key,
        is_loading=lambda: runtime.manager.status is ServerStatus.STARTING,
    )
    return app


class HttpServer:
    """One run of the server, from binding the port to the exit code."""

    def __init__(
        self, server_args: ServerArgs, config: Config, launch_callback: Callable[[], None] | None = None
    ) -> None:
        self._server_args = server_args
        self._config = config
        self._runtime = Runtime(server_args, config)
        self._launch_callback = launch_callback
        self._url = ""
        self._access_log = (server_args.log_level_http or "").lower() in ("info", "debug")
        self._drain_seconds = environ.SGLANG_DRAIN_TIMEOUT.get()
        self._uvicorn: QuietServer | None = None
        self._started = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals = 0
        self._exit_code = 0

    async def run(self) -> int:
        """Serve; returns the exit code."""
        with contextlib.closing(self._bind()) as listener:
            self._url = self._server_args.url(listener.getsockname()[1])
            try:
                self._catch_signals()
                await self._runtime.start()
                self._uvicorn = self._make_uvicorn()
                self._started.set()
                self._spawn(self._bring_up())
                await self._uvicorn.serve(sockets=[listener])
            finally:
                for task in self._tasks:
                    task.cancel()
                await self._runtime.shutdown()
        return self._exit_code

    def _bind(self) -> socket.socket:
        host, port = self._config.server.host, self._config.server.port
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: cannot listen there: {error}") from error
        return listener

    def _make_uvicorn(self) -> QuietServer:
        level = logging.getLevelName(self._config.server.log_level_http.upper())
        logging.getLogger("uvicorn.access").setLevel(level)
        # uvicorn's own announcements would only repeat ours.
        logging.getLogger("uvicorn.error").setLevel(level if self._access_log else max(level, logging.WARNING))
        return QuietServer(
            uvicorn.Config(
                create_app(self._runtime),
                http=JsonErrorProtocol,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                log_config=None,
                access_log=self._access_log,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
                server_header=False,
            )
        )

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bring_up(self) -> None:
        """Wait for the model, warm it up, say how to use it; a failure ends the server."""
        try:
            await self._runtime.wait_ready()
            if not self._config.server.skip_warmup:
                await self._warm_up()
            logger.info("ready; try: %s", self._example())
            if self._launch_callback is not None:
                self._launch_callback()
        except SglangError as error:
            if not self._signals:  # else it was us who ended the back
                logger.error("the server cannot start: %s", error)
                self._stop(exit_code=1)
        except Exception:
            logger.exception("the server cannot start")
            self._stop(exit_code=1)

    async def _warm_up(self) -> None:
        body = GenerateReqInput(
            input_ids=[0],
            sampling_params={"max_new_tokens": WARMUP_TOKENS, "temperature": 0.0, "ignore_eos": True},
            log_metrics=False,
            no_logs=True,
        )
        try:
            async for _ in self._runtime.manager.generate_request(body):
                pass
        except SglangError as error:
            logger.error("the warm-up request failed: %s", error)

    def _example(self) -> str:
        has_text = self._config.tokenizer.path is not None
        prompt = {"text": "The capital of France is"} if has_text else {"input_ids": [1, 2, 3]}
        body = json.dumps({**prompt, "sampling_params": {"max_new_tokens": 16, "temperature": 0}})
        key = ' -H "Authorization: Bearer $API_KEY"' if self._config.server.api_key else ""
        return f"curl {self._url}/generate{key} -d '{body}'"

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Outside the main thread there are no signals to catch: whoever runs us there stops us some other way.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals > 1:
            logger.warning("second signal: leaving at once")
            self._runtime.kill()
            os._exit(128 + number)
        self._spawn(self._drain(number))

    async def _drain(self, number: signal.Signals) -> None:
        logger.info("%s: refusing new requests; live ones have %.0f s to end", number.name, self._drain_seconds)
        await self._started.wait()
        failed = self._runtime.manager.status is ServerStatus.DOWN
        try:
            await self._runtime.shutdown(drain=self._drain_seconds)
        finally:
            self._stop(exit_code=1 if failed else 0)

    def _stop(self, exit_code: int) -> None:
        self._exit_code = self._exit_code or exit_code
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


def _raise_open_file_limit() -> None:
    """Allow as many connections as the system lets us: each is a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
