"""Routes that tell: health, model, server, load."""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from sglang.srt.entrypoints import health, server_state
from sglang.srt.entrypoints.replies import json_response
from sglang.srt.entrypoints.requests_io import runtime_of

router = APIRouter()

READ = ["GET", "HEAD"]


@router.api_route("/", methods=READ)
async def root() -> Response:
    """A line for people who open the address in a browser."""
    return PlainTextResponse("SGLang is running")


@router.api_route("/ping", methods=READ)
async def ping() -> Response:
    """200 as long as the process serves HTTP."""
    return Response()


@router.api_route("/health", methods=READ)
async def check_health(request: Request) -> Response:
    """200 when the scheduler answers, or while paused; else 503."""
    return _health(await health.is_alive(runtime_of(request)))


@router.api_route("/health_generate", methods=READ)
async def check_health_by_generating(request: Request) -> Response:
    """200 when a token can be generated, or while paused; else 503."""
    return _health(await health.can_generate(runtime_of(request)))


def _health(healthy: bool) -> Response:
    return Response(status_code=HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)


@router.api_route("/model_info", methods=READ)
@router.api_route("/get_model_info", methods=READ)
async def model_info(request: Request) -> Response:
    """Path and kind of the model, version of its weights."""
    return json_response(server_state.model_info(runtime_of(request)))


@router.api_route("/server_info", methods=READ)
@router.api_route("/get_server_info", methods=READ)
async def server_info(request: Request) -> Response:
    """Launch flags and scheduler state."""
    return json_response(await server_state.server_info(runtime_of(request)))


@router.api_route("/weight_version", methods=READ)
@router.api_route("/get_weight_version", methods=READ)
async def weight_version(request: Request) -> Response:
    """Version of the base model's weights."""
    return json_response({"weight_version": runtime_of(request).manager.weight_version})


@router.get("/get_load")
async def get_load(request: Request) -> Response:
    """Load in the form that older routers read."""
    loads = await server_state.get_loads(runtime_of(request), ("core",))
    return json_response(server_state.legacy_loads(loads["loads"]))


@router.get("/v1/loads")
async def v1_loads(
    request: Request,
    include: str | None = None,
    dp_rank: int | None = None,
    format: Literal["json", "prometheus"] | None = None,
) -> Response:
    """Load of the scheduler; `include` is a comma-separated list of sections (default: all)."""
    sections = [name.strip() for name in include.split(",") if name.strip()] if include else ["all"]
    loads = await server_state.get_loads(runtime_of(request), sections, dp_rank)
    if format == "prometheus":
        text = server_state.loads_as_prometheus(loads["loads"])
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
    return json_response(loads)
