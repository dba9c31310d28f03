"""HTTP replies: JSON bodies, the two error bodies clients know, and the mapping from exceptions to them.

Native endpoints answer a client's mistake with `{"error": {"message": …}}`; everything else (OpenAI endpoints, bodies
that do not parse, unknown routes, 503) uses the flat `{"object": "error", …}` that stock's clients read.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sglang.srt.errors import AdapterError, RequestError, ServiceUnavailableError

logger = logging.getLogger(__name__)

_encoder = msgspec.json.Encoder()
_FLAT_PATHS = ("/v1/", "/tokenize", "/detokenize")
"""Paths (prefixes) whose request errors take the flat body."""


class BodyError(RequestError):
    """The body or the query is not what the endpoint takes (missing, not JSON, wrong types)."""


def encode(value: Any) -> bytes:
    """JSON bytes; infinities and NaN become null."""
    return _encoder.encode(value)


def json_response(value: Any, status: int = HTTPStatus.OK) -> Response:
    """A JSON reply of anything msgspec can encode."""
    return Response(encode(value), status_code=status, media_type="application/json")


def flat_error(message: str, status: int, err_type: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Body in the shape of stock's ErrorResponse."""
    return {
        "object": "error",
        "message": message,
        "type": err_type if err_type is not None else str(int(status)),
        "param": param,
        "code": int(status),
    }


def native_error(error: RequestError | ServiceUnavailableError) -> dict[str, Any]:
    """Body of a refused native request; an adapter's error brings its code."""
    code = {"code": error.code} if isinstance(error, AdapterError) else {}
    return {"error": {"message": error.message, **code}}


def error_body(error: RequestError | ServiceUnavailableError, path: str) -> dict[str, Any]:
    """The body that clients of `path` expect for an error raised on purpose."""
    if isinstance(error, ServiceUnavailableError):
        return flat_error(error.message, error.status)
    if isinstance(error, BodyError):
        return flat_error(error.message, error.status, HTTPStatus(error.status).phrase)
    if path.startswith(_FLAT_PATHS):
        return flat_error(error.message, error.status, error.err_type)
    return native_error(error)


async def _on_known_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError | ServiceUnavailableError)
    return json_response(error_body(error, request.url.path), error.status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = json_response(flat_error(str(error.detail), error.status_code), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _on_bad_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
    body = flat_error(details, HTTPStatus.BAD_REQUEST, HTTPStatus.BAD_REQUEST.phrase)
    return json_response(body, HTTPStatus.BAD_REQUEST)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # the client left while it was sending; nobody reads this


async def _on_bug(request: Request, error: Exception) -> Response:
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return json_response(flat_error("Internal server error; the server's log has the details.", status), status)


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every exception with a documented body."""
    app.add_exception_handler(RequestError, _on_known_error)
    app.add_exception_handler(ServiceUnavailableError, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_query)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
