"""Modules that several unit tests share lie beside them, policies and samples of messages in folders of their
own; none is a package."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "policies"), str(TESTS / "samples")]
