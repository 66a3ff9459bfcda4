"""Modules that several unit tests share lie beside them, policies in a folder of their own; none is a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "policies")]
