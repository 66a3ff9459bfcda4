"""Types of command-line arguments: each says what is wrong with a value it does not take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def positive(text: str) -> float:
    return _number(text, "a number above 0", 0.0, exclusive=True)


def non_negative(text: str) -> float:
    return _number(text, "a number of at least 0", 0.0)


def count(text: str) -> int:
    return _whole(text, 1)


def count_or_zero(text: str) -> int:
    return _whole(text, 0)


def context(text: str) -> int:
    return _whole(text, 2)


def seed(text: str) -> int:
    return _whole(text, 0)


def positives(text: str) -> tuple[float, ...]:
    """0.2,0.4,0.8"""
    return _list(text, positive, "numbers above 0")


def seeds(text: str) -> tuple[int, ...]:
    """0,1,2"""
    return _list(text, seed, "whole numbers of at least 0")


def names(text: str) -> tuple[str, ...]:
    """remote,ampd"""
    return _list(text, lambda part: part, "names")


def _list(text: str, read: Callable[[str], T], kind: str) -> tuple[T, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{kind} with commas between them are needed, not {text!r}")
    values = tuple(map(read, parts))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names something twice")
    return values


def _number(text: str, kind: str, minimum: float, *, exclusive: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
        raise argparse.ArgumentTypeError(f"{kind} is needed, not {text!r}")
    return value


def _whole(text: str, minimum: int) -> int:
    value = _number(text, f"a whole number of at least {minimum}", minimum)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"a whole number of at least {minimum} is needed, not {text!r}")
    return int(value)
