"""What benchmarks that simulate print and write alike."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def read_commit() -> str | None:
    """Of the code that runs, "+" when it has been changed since; None outside of a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return answer.stdout.strip() if answer.returncode == 0 else None


def show_table(console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column names, the others are numbers."""
    table = Table(title=title)
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
