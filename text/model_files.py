"""Reads the JSON files of a model directory."""

import json
from pathlib import Path

from ..core.errors import ConfigError


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`; empty where there is no such file. Raises ConfigError when it is something else."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def token_ids(value: object, path: Path, key: str) -> tuple[int, ...]:
    """An id, a list of ids or null, as checkpoints write `eos_token_id`. Raises ConfigError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ConfigError(f"{path}: {key} must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))
