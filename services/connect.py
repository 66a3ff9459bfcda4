"""How the commands reach a cluster that is already there."""

from __future__ import annotations

from shared.client import AmpdClient
from shared.errors import AmpdError, BusError
from shared.nats_bus import connect_nats_bus

CONNECT_TIMEOUT_S = 2.0  # a person waits, and a cluster that is there answers at once


async def connect_to_cluster(url: str, *, name: str, tenant: str = "default") -> AmpdClient:
    """Raises AmpdError BUS_UNAVAILABLE that says how to have a cluster."""
    try:
        bus = await connect_nats_bus(url, name=name, timeout_s=CONNECT_TIMEOUT_S)
    except BusError as error:
        raise AmpdError(
            error.code,
            f"{error.message}\nstart a cluster with `ampd up`, or name a running one with --nats-url or AMPD_NATS_URL",
        ) from error
    return AmpdClient(bus, tenant=tenant, owns_bus=True)
