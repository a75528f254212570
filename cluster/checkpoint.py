"""What a model's files say of their size without being loaded: config.json, index, safetensors headers. No torch."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEAD = "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"  # in some old checkpoints; nobody loads it
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How many weights a checkpoint holds, and which file says so."""

    count: int
    source: str


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ConfigError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object.")
    return found


def weight_files(directory: Path) -> list[Path]:
    """Those that the index names, else the one that needs none, else whatever safetensors files are there.

    A directory may hold the same weights a second time in another layout; those files are in no index. Some of the
    named files may be missing.
    """
    if (directory / INDEX).is_file():
        named = read_json(directory / INDEX).get("weight_map")
        if isinstance(named, dict) and named:
            return [directory / Path(str(name)).name for name in sorted({str(name) for name in named.values()})]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    return sorted(directory.glob("*.safetensors"))


def stored_weights(directory: Path, *, width: int, tied_head: int) -> StoredWeights | None:
    """From the headers if all files are there, else from the index. None: neither is.

    width: bytes of a weight in the checkpoint, for the index, which counts bytes. tied_head: weights of a head that the
    embedding serves as, so that a stored one is not loaded; 0: the head is a matrix of its own. Raises ConfigError.
    """
    files = weight_files(directory)
    if files and all(file.is_file() for file in files):
        tensors = {name: size for file in files for name, size in _header(file).items()}
        count, source = sum(tensors.values()), f"safetensors headers ({len(files)} file{'s' * (len(files) > 1)})"
        stored_head = tensors.get(_HEAD, 0) if tied_head else 0
    elif (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            return None
        count, source = math.ceil(total / width), f"{INDEX} (total_size {total:,} B / {width} B)"
        names = index.get("weight_map")
        stored_head = tied_head if isinstance(names, dict) and _HEAD in names else 0
    else:
        return None
    if stored_head:
        source += f", less {stored_head:,} of a head that the embedding serves as"
    return StoredWeights(count - stored_head, source)


def _header(file: Path) -> dict[str, int]:
    """Weights in each tensor. Format: 8 bytes little-endian length, then JSON. Raises ConfigError."""
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(_MAX_HEADER_BYTES, file.stat().st_size - 8):
                raise ConfigError(f"{file} is not a whole safetensors file: fetch it again, or move it away.")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return {
            name: math.prod(map(int, entry["shape"])) for name, entry in header.items() if not name.endswith(_COMPUTED)
        }
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{file} has no safetensors header: fetch it again, or move it away.") from None
