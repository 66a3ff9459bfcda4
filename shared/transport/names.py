"""Names of the ways that KV may be told to move."""

from typing import Literal

TransportName = Literal["auto", "tcp", "shm", "nixl"]
TRANSPORT_HELP = (
    "how KV moves between workers: tcp and Unix sockets; shm, mapped memory within a host; nixl; "
    "auto: shm where two workers share a host, nixl (if installed) for KV on a device, else tcp"
)
