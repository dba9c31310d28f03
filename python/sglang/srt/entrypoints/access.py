"""Who may call which route, and whether the route needs a loaded model: one table, one middleware.

Every route of the application stands in `ROUTES` (a test walks both). A path that is not there is treated like a route
that needs the api key, so a forgotten entry fails closed.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.replies import flat_error, json_response


class Access(enum.Enum):
    """Key that a route asks for.

    OPEN: none, ever. KEY: --api-key when set. ADMIN: --admin-api-key when set, else --api-key when set.
    """

    OPEN = "open"
    KEY = "key"
    ADMIN = "admin"


class Policy(NamedTuple):
    """`needs_model`: the route answers 503 until the model has been loaded."""

    access: Access
    needs_model: bool = True


ROUTES: dict[str, Policy] = {
    "/": Policy(Access.KEY, needs_model=False),
    "/ping": Policy(Access.OPEN, needs_model=False),
    "/health": Policy(Access.OPEN),
    "/health_generate": Policy(Access.OPEN),
    "/metrics": Policy(Access.OPEN, needs_model=False),
    "/generate": Policy(Access.KEY),
    "/v1/chat/completions": Policy(Access.KEY),
    "/v1/completions": Policy(Access.KEY),
    "/v1/models": Policy(Access.KEY),
    "/v1/models/{model:path}": Policy(Access.KEY),
    "/tokenize": Policy(Access.KEY),
    "/v1/tokenize": Policy(Access.KEY),
    "/detokenize": Policy(Access.KEY),
    "/v1/detokenize": Policy(Access.KEY),
    "/model_info": Policy(Access.KEY),
    "/get_model_info": Policy(Access.KEY),
    "/server_info": Policy(Access.KEY),
    "/get_server_info": Policy(Access.KEY),
    "/weight_version": Policy(Access.KEY),
    "/get_weight_version": Policy(Access.KEY),
    "/get_load": Policy(Access.KEY),
    "/v1/loads": Policy(Access.KEY),
    "/lora_adapters": Policy(Access.KEY),
    "/load_lora_adapter": Policy(Access.ADMIN),
    "/load_lora_adapter_from_tensors": Policy(Access.ADMIN),
    "/stage_lora_adapter": Policy(Access.ADMIN),
    "/commit_lora_adapter": Policy(Access.ADMIN),
    "/drop_lora_adapter": Policy(Access.ADMIN),
    "/unload_lora_adapter": Policy(Access.ADMIN),
    "/init_weights_update_group": Policy(Access.ADMIN),
    "/destroy_weights_update_group": Policy(Access.ADMIN),
    "/flush_cache": Policy(Access.ADMIN),
    "/abort_request": Policy(Access.ADMIN),
    "/pause_generation": Policy(Access.ADMIN),
    "/continue_generation": Policy(Access.ADMIN),
}

_UNKNOWN = Policy(Access.KEY, needs_model=False)
_PREFIXES = [(path.split("{", 1)[0], policy) for path, policy in ROUTES.items() if "{" in path]


def policy_of(path: str) -> Policy:
    """The policy of a request path (not of a route template)."""
    policy = ROUTES.get(path)
    if policy is not None:
        return policy
    return next((policy for prefix, policy in _PREFIXES if path.startswith(prefix)), _UNKNOWN)


class AccessMiddleware:
    """Answers 401 without the right key and 503 while the model is loading.

    Args:
        is_loading: whether the model is not there yet.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, admin_api_key: str | None, is_loading: Callable[[], bool]
    ) -> None:
        self._app = app
        self._keys = {Access.OPEN: None, Access.KEY: api_key, Access.ADMIN: admin_api_key or api_key}
        self._is_loading = is_loading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = policy_of(scope["path"])
        key = self._keys[policy.access]
        if key is not None and not _has_key(scope, key):
            response = json_response({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
            await response(scope, receive, send)
        elif policy.needs_model and self._is_loading():
            status = HTTPStatus.SERVICE_UNAVAILABLE
            message = "The server is starting: the model is still being loaded. Try again soon."
            await json_response(flat_error(message, status), status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _has_key(scope: Scope, key: str) -> bool:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return scheme.lower() == b"bearer" and secrets.compare_digest(token.strip(), key.encode())
    return False
