"""What a publication is and what becomes of it: settings, reports, errors. Data; `publisher` has the public names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sglang.rl.publisher_package import DType, Form
from sglang.rl.publisher_server import Transport
from sglang.srt.errors import SglangError

PublishMode = Literal["live", "switch", "pause"]
MODES: tuple[PublishMode, ...] = ("live", "switch", "pause")


@dataclass(frozen=True, slots=True)
class Settings:
    """Arguments of `Publisher`, under their names."""

    name: str
    transport: Transport
    keep_last: int
    timeout: float
    grace: float
    dtype: DType
    directory: str
    versioned_name: str


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server made of a publication.

    Fields:
        kind: versioned or stock.
        version_id, digest: of what it serves, as it says; None on stock servers, which have neither.
        transport: how the adapter came: shm, path, bytes or broadcast.
        latency_s: from the start of the publication until this server had committed.
        phases: seconds by phase: probe, stage, commit; in mode pause also pause, drain, flush, resume; unload; join,
            when a group was made for the transport broadcast.
        warnings: what went wrong and did no harm.
    """

    url: str
    kind: str
    version_id: int | None
    digest: str | None
    transport: str
    latency_s: float
    phases: Mapping[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Version:
    """A published policy.

    Fields:
        name: what requests ask for, on every server.
        number: of this publisher's publications, from 1.
        digest: SHA-256 of the adapter's config and safetensors bytes, as they were sent.
        nbytes: of these bytes; latency_s: of the whole publication.
        form: slab, when these bytes are the slab that servers keep, else tensors.
    """

    name: str
    number: int
    digest: str
    nbytes: int
    latency_s: float
    servers: Mapping[str, ServerReport]
    form: Form = "tensors"

    @property
    def warnings(self) -> list[str]:
        """Of all servers, each with its URL."""
        return [f"{url}: {text}" for url, report in self.servers.items() for text in report.warnings]


class PublishError(SglangError):
    """A publication that failed.

    Attributes:
        phase: in which it failed.
        failures: server -> what it did.
        serving: what servers serve now, in words, of those that were asked; empty when nothing was committed.
        version: the publication, with the reports of those servers that serve it; None when none does.
    """

    def __init__(
        self,
        phase: str,
        failures: Mapping[str, str],
        outcome: str,
        serving: Mapping[str, str] | None = None,
        version: Version | None = None,
    ) -> None:
        lines = [f"{phase} failed on {url}: {text}" for url, text in failures.items()]
        lines += [f"{url} serves {text}" for url, text in (serving or {}).items()]
        super().__init__("\n".join([*lines, outcome]))
        self.phase, self.failures = phase, dict(failures)
        self.serving, self.version = dict(serving or {}), version
