"""Texts of flags, environment and file turned into numbers. Each error is one line that says what to write instead."""

import re

from ..core.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_LAST_PORT = 65535


def parse_size(name: str, text: object) -> int:
    """Bytes of "512MiB", "4GiB", "4G" (all powers of 1024) or "1GB" (a power of 1000)."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{name} is {text!r}: write a size such as 512MiB or 4GiB.")
    unit = (match[2] or "").upper().removesuffix("B")
    decimal = (match[2] or "").upper() in ("KB", "MB", "GB", "TB")
    return int(float(match[1]) * (1000 if decimal else 1024) ** _POWER[unit.removesuffix("I")])


def format_size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit in ("B", "KiB") else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def parse_int(name: str, text: object, low: int, high: int | None = None) -> int:
    """A whole number in [low, high]. YAML's booleans are refused, though Python counts them as numbers."""
    span = f"from {low} to {high}" if high is not None else f"of at least {low}"
    try:
        if isinstance(text, bool | float):
            raise ValueError
        value = int(str(text).strip())
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: write a whole number {span}.") from None
    if value < low or (high is not None and value > high):
        raise ConfigError(f"{name} is {value}: write a whole number {span}.")
    return value


def parse_port(name: str, text: object) -> int:
    return parse_int(name, text, 1, _LAST_PORT)


def parse_choice(name: str, text: object, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ConfigError(f"{name} is {text!r}: write one of {', '.join(choices)}.")
    return str(text)


def parse_text(name: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{name} is {text!r}: write a text.")
    return text.strip()
