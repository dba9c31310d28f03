"""`/metrics`, present with --enable-metrics only."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sglang.srt.entrypoints.requests_io import runtime_of

router = APIRouter()


@router.api_route("/metrics", methods=["GET", "HEAD"])
async def metrics(request: Request) -> Response:
    """The registry in Prometheus' text format, at this very path (no redirect)."""
    registry = runtime_of(request).metrics
    assert registry is not None, "the route is only mounted when metrics are on"
    return Response(generate_latest(registry.registry), media_type=CONTENT_TYPE_LATEST)
