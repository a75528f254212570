"""Checks on values that a peer sent. Each raises InvalidRequest that names the field, never its content."""

import math
from collections.abc import Sequence
from itertools import pairwise

from ..core.errors import InvalidRequest

MAX_ID_BYTES = 200
MAX_TEXT_BYTES = 4096
MAX_TOKEN_ID = 2**31 - 1
MAX_NUMBER = 2**32 - 1  # of a sequence on its link
MAX_EPOCH = 2**63 - 1
MAX_PROMPT_TOKENS = 2**20
MAX_BLOCKS = 2**24  # of one pool
MAX_ITEMS = 2**16  # of any other list
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_EDIT = 1e6  # a bias or penalty, either way
MAX_TIMEOUT_MS = 30 * 24 * 3600 * 1000


def identifier(value: str, field: str) -> str:
    """1 to 200 bytes of printable UTF-8."""
    if not value or len(value.encode()) > MAX_ID_BYTES or not value.isprintable():
        raise InvalidRequest(f"{field} must be 1 to {MAX_ID_BYTES} bytes of printable text")
    return value


def text(value: str, field: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """May be empty."""
    if len(value) > max_bytes or len(value.encode()) > max_bytes:
        raise InvalidRequest(f"{field} must be at most {max_bytes} bytes")
    return value


def at_most(value: int, limit: int, field: str, least: int = 0) -> int:
    if not least <= value <= limit:
        raise InvalidRequest(f"{field} must be from {least} to {limit}")
    return value


def number(value: float, field: str, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number from low to high."""
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{field} is out of range")
    return value


def count(items: Sequence[object], field: str, limit: int = MAX_ITEMS) -> None:
    if len(items) > limit:
        raise InvalidRequest(f"{field} holds more than {limit} items")


def integers(values: Sequence[int], field: str, limit: int = MAX_ITEMS, high: int = MAX_TOKEN_ID) -> tuple[int, ...]:
    """At most `limit` unsigned integers, none above `high`."""
    count(values, field, limit)
    found = tuple(values)
    if found and max(found) > high:
        raise InvalidRequest(f"{field} holds a value above {high}")
    return found


def rising(values: Sequence[int], field: str, limit: int, high: int) -> tuple[int, ...]:
    """As `integers`, each greater than the one before."""
    found = integers(values, field, limit, high)
    if any(a >= b for a, b in pairwise(found)):
        raise InvalidRequest(f"{field} must rise")
    return found
