"""Weights on disk: safetensors files, one or sharded with an index. Nothing is ever unpickled.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, tensors' bytes).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
_WHOLE_BYTES = 64 << 20  # files up to here tell themselves apart by every byte; larger ones by samples
_SAMPLE_BYTES, _SAMPLES = 4096, 1024


class SafetensorsDir:
    """The tensors of a model directory. Headers are checked at once; of the files one is open, the last read."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where files are missing, cut short, or hold what we can't load."""
        self._files: dict[str, Path] = {}  # tensor -> file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: tuple[Path, Any] | None = None  # opening reads the whole header, which names every expert
        self.total_bytes = 0
        for file in _files(path):
            header = _checked_header(file)
            for name, entry in header.items():
                if name in self._files:
                    raise ValueError(f"{file.name}: tensor {name} is also in {self._files[name].name}")
                self._files[name] = file
                self._shapes[name] = tuple(entry["shape"])
                self.total_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """Part of a tensor [shape], in the file's dtype, on the CPU: a view of the mapped file that takes no memory.

        Raises ValueError when the tensor is missing or of another shape.
        """
        if name not in self._files:
            raise ValueError(f"the checkpoint has no tensor {name}")
        if self._shapes[name] != shape:
            raise ValueError(f"tensor {name} has shape {self._shapes[name]}, config.json says {shape}")
        file = self._files[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, safe_open(file, framework="pt", device="cpu"))
        tensor: Tensor = self._open[1].get_slice(name)[part]
        return tensor

    def identity(self) -> Iterator[bytes]:
        """What tells one checkpoint from another: each file's size, header and content, of large ones a part of it."""
        for file in sorted(set(self._files.values())):
            size = file.stat().st_size
            with file.open("rb") as opened:
                (header_bytes,) = struct.unpack("<Q", opened.read(8))
                yield struct.pack("<QQ", size, header_bytes) + opened.read(header_bytes)
                step = _SAMPLE_BYTES if size <= _WHOLE_BYTES else (size - 8 - header_bytes) // _SAMPLES
                for offset in range(8 + header_bytes, size, step):
                    opened.seek(offset)
                    yield opened.read(_SAMPLE_BYTES)


def _files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        found = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{INDEX} has no weight_map of tensors to files")
        names = sorted(set(found.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{INDEX} names files outside of its directory")
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise ValueError(f"{INDEX} names {missing[0]}, which is not there")
        return [path / name for name in names]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are loaded")


def _checked_header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file.name} is not a whole safetensors file: {size} bytes, header of {length}")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file.name}: its header is no JSON object")
    header.pop("__metadata__", None)
    if not all(map(_is_entry, header.values())):
        raise ValueError(f"{file.name}: a tensor of its header lacks dtype, shape or data_offsets")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        begin, stop = entry["data_offsets"]
        width = _WIDTHS.get(entry["dtype"])
        if width is None:
            raise ValueError(f"{file.name}: tensor {name} has dtype {entry['dtype']}; F32, F16 and BF16 are supported")
        if begin != end or stop - begin != torch.Size(entry["shape"]).numel() * width:
            raise ValueError(f"{file.name}: tensor {name} does not lie where the header should say")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{file.name} was cut short or is too long: {size} bytes, its header says {8 + length + end}")
    return header


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [int(), int()]}:
            return all(isinstance(size, int) and size >= 0 for size in shape)
    return False
