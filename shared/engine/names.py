"""The engines there are, by the names on command lines: `torch` computes, `emulated` keeps time."""

from typing import Literal

EngineName = Literal["torch", "emulated"]
