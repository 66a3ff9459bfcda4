"""The NATS services API: answers to $SRV.PING, INFO and STATS, as `nats micro ls|info|stats` expect them.

By hand rather than through nats.micro: the answers then work on every Bus, and the endpoints shown are the
subscriptions that the process really has. Protocol: NATS architecture decision record ADR-32.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from shared.handler_tasks import HandlerTasks

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VERSION = re.compile(r"\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?")


class ServiceRegistration:
    """One process as a service: name and version, an id of its own, `host` and `pid` added to the metadata."""

    def __init__(self, name: str, version: str, metadata: Mapping[str, str]) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"a service name has 1 to 64 letters, digits, _ and -; got {name!r}")
        if not _VERSION.fullmatch(version):
            raise ValueError(f"a service version is a semantic version such as 0.1.0; got {version!r}")
        self.name = name
        self._identity: dict[str, Any] = {
            "name": name,
            "id": secrets.token_hex(11),
            "version": version,
            "metadata": {**metadata, "host": socket.gethostname(), "pid": str(os.getpid())},
        }
        self._started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

    def subjects(self) -> Sequence[str]:
        """What to subscribe to; the verb is the second token."""
        return ("$SRV.*", f"$SRV.*.{self.name}", f"$SRV.*.{self.name}.{self._identity['id']}")

    def answer(self, subject: str, endpoints: Iterable[HandlerTasks]) -> bytes:
        """The JSON answer to a discovery request; an unknown verb is answered with what would have been right."""
        endpoints = [e for e in endpoints if not e.subject.startswith("$SRV.")]
        match subject.split(".")[1]:
            case "PING":
                body: dict[str, Any] = {"type": "io.nats.micro.v1.ping_response"}
            case "INFO":
                body = {
                    "type": "io.nats.micro.v1.info_response",
                    "description": "",
                    "endpoints": [_describe(e) for e in endpoints],
                }
            case "STATS":
                body = {
                    "type": "io.nats.micro.v1.stats_response",
                    "started": self._started,
                    "endpoints": [_describe(e) | _measure(e) for e in endpoints],
                }
            case verb:
                return msgspec.json.encode({"error": f"{verb[:32]}: ask for PING, INFO or STATS"})
        return msgspec.json.encode(body | self._identity)


def _describe(endpoint: HandlerTasks) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", endpoint.subject)
    return {"name": name, "subject": endpoint.subject, "queue_group": endpoint.queue, "metadata": {}}


def _measure(endpoint: HandlerTasks) -> dict[str, Any]:
    return {
        "num_requests": endpoint.num_requests,
        "num_errors": endpoint.num_errors,
        "last_error": endpoint.last_error,
        "processing_time": endpoint.processing_ns,
        "average_processing_time": endpoint.processing_ns // max(endpoint.num_requests, 1),
    }
