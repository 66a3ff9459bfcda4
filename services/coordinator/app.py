"""Command line and wiring of the coordinator process."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

from services.coordinator.config_flags import add_config_flags, read_config
from services.coordinator.event_log import EventLog
from services.coordinator.input_text import InputText
from services.coordinator.service import CoordinatorService
from shared.core.coordinator_config import CoordinatorConfig
from shared.errors import AmpdError, ErrorCode
from shared.log import get_logger
from shared.nats_bus import connect_nats_bus
from shared.record_log import JetStreamRecordLog
from shared.service import ServiceContext, run_service
from shared.text import TextCodec
from shared.transport.tickets import check_secret

log = get_logger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.coordinator",
        description="Serves the request API: binds sessions, routes prefills, keeps every session's durable record.",
        epilog="example: python -m services.coordinator --nats-url nats://127.0.0.1:4222 --model-dir models/smollm2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--nats-url", default=os.environ.get("AMPD_NATS_URL", "nats://127.0.0.1:4222"))
    add("--model-dir", type=Path, help="folder with the tokenizer; without it rounds are token ids only")
    add("--secret-file", type=Path, help="file with the cluster secret, hexadecimal; default: AMPD_CLUSTER_SECRET")
    add("--event-log", type=Path, metavar="FILE", help="append every event, prompts included: for replay")
    add_config_flags(parser)
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    try:
        config = read_config(args)
    except AmpdError as error:
        parser.error(error.message)
    return run_service(functools.partial(run_coordinator, args=args, config=config), name="coordinator")


async def run_coordinator(service: ServiceContext, *, args: argparse.Namespace, config: CoordinatorConfig) -> None:
    """Serve until `service.stop`."""
    secret = read_cluster_secret(args.secret_file)
    text = InputText(TextCodec.load(args.model_dir) if args.model_dir is not None else None)
    event_log = EventLog(args.event_log) if args.event_log is not None else None
    bus = await connect_nats_bus(args.nats_url, name="coordinator", on_lost=service.fail)
    try:
        coordinator = CoordinatorService(
            bus,
            await JetStreamRecordLog.open(bus),
            config=config,
            secret=secret,
            text=text,
            on_crash=service.fail,
            is_connected=lambda: bus.is_connected,
            event_log=event_log,
        )
        await coordinator.start()
        log.info("coordinator ready", policy=args.policy, disabled=args.disable, profile=args.profile or "measured")
        await service.stop.wait()
        await coordinator.stop()
    finally:
        await bus.close()
        text.close()
        if event_log is not None:
            event_log.close()


def read_cluster_secret(secret_file: Path | None) -> bytes:
    """The key that tickets are signed with: --secret-file, AMPD_CLUSTER_SECRET_FILE or AMPD_CLUSTER_SECRET (hex)."""
    path = secret_file or os.environ.get("AMPD_CLUSTER_SECRET_FILE")
    try:
        text = Path(path).read_text().strip() if path else os.environ.get("AMPD_CLUSTER_SECRET", "")
        secret = bytes.fromhex(text)
    except (OSError, ValueError) as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"the cluster secret cannot be read: {error}") from error
    if not secret:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            "set AMPD_CLUSTER_SECRET, or --secret-file, to at least 32 hexadecimal digits, the same for every service",
        )
    check_secret(secret)
    return secret
