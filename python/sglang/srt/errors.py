"""Errors that reach a client, each with the HTTP status it becomes.

Raised anywhere in the front process or the engine; `entrypoints` turns them into replies, `sglang.Engine` lets them
through. `RequestError` is a `ValueError` because stock's `Engine` raises `ValueError` for bad input.
"""

from __future__ import annotations

from http import HTTPStatus


class SglangError(Exception):
    """Root of every error this package raises on purpose."""


class RequestError(SglangError, ValueError):
    """The client's mistake: the message says the value that failed and the remedy.

    Args:
        message: text shown to the client.
        status: HTTP status, 4xx.
        err_type: upstream's name of the error, e.g. ``BadRequestError``.
    """

    def __init__(self, message: str, status: int = HTTPStatus.BAD_REQUEST, err_type: str = "BadRequestError") -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)
        self.err_type = err_type


RETRYABLE_CODES = ("path_unreadable", "busy", "broadcast_failed", "broadcast_cancelled")
"""Codes of an AdapterError whose call may succeed later: status 409."""


class AdapterError(RequestError):
    """An adapter that cannot be loaded, found or unloaded.

    Args:
        code: what clients may branch on: adapter_not_found, already_loaded, invalid_adapter, capacity, not_enabled,
            no_group, or one of RETRYABLE_CODES.
    """

    def __init__(self, code: str, message: str) -> None:
        status = HTTPStatus.CONFLICT if code in RETRYABLE_CODES else HTTPStatus.BAD_REQUEST
        super().__init__(message, status, err_type=code)
        self.code = code


class ServiceUnavailableError(SglangError):
    """The server cannot take or finish the request now (queue full, draining, dead worker): HTTP 503."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(HTTPStatus.SERVICE_UNAVAILABLE)
        self.err_type = "ServiceUnavailableError"


class ConfigError(SglangError, ValueError):
    """A launch flag, or a combination of flags, that this server refuses; the message names flag, value and remedy."""


class WeightError(SglangError, ValueError):
    """A checkpoint that does not fit the model; the message names every missing, unknown or misshapen tensor."""
