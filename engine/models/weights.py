"""From a checkpoint's tensors to those that the models compute with: this rank's part, fused, cast, on its device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.skinny_linear import has_skinny
from ..parallel.communicator import Communicator
from .safetensors_file import SafetensorsDir
from .shard import Axis, Shard


class Weights:
    """Reads tensors by their names in the checkpoint and tells how far it got.

    Shapes are those of the checkpoint; an `Axis` in the place of a size says which part of it is wanted.
    """

    def __init__(
        self,
        files: SafetensorsDir,
        dtype: torch.dtype,
        device: torch.device,
        communicator: Communicator,
        progress: Callable[[int, int], None] | None = None,
        exact: bool = False,
    ) -> None:
        """progress: called with (bytes done, bytes in all), both as on disk; a tensor read in part counts whole.
        exact: what is made of them gives a token the same logits, bit for bit, beside any others."""
        self._files = files
        self.dtype = dtype
        self.communicator = communicator  # with the ranks that hold the other parts
        self.shard = Shard(communicator.rank, communicator.size)
        self.exact = exact
        # Of kernels whose results do not depend on the number of rows. Where there are none, rows come one by one.
        self.invariant = exact and has_skinny(device)
        self._device = device
        self._progress = progress
        self._done_bytes = 0

    def read(self, name: str, shape: tuple[int | Axis, ...]) -> Tensor:
        """One tensor, or a part of it. Raises ValueError when it is missing or of another shape."""
        axes = _axes(shape)
        kept = tuple(axis.kept for axis in axes)
        found = self._from_file(name, axes)
        if found.shape == kept:
            whole = all(axis.kept == axis.size for axis in axes)  # a part is copied, so as not to keep the rest mapped
            return found.to(device=self._device, dtype=self.dtype, copy=not whole).contiguous()
        padded = torch.zeros(kept, dtype=self.dtype, device=self._device)
        padded[tuple(map(slice, found.shape))] = found
        return padded

    def stack(self, names: Sequence[str], rows: Sequence[int | Axis], *columns: int | Axis) -> Tensor:
        """Several tensors, one above the other, so that one product does for all.    -> [sum(rows), *columns]."""
        return self.pile([names], rows, *columns)[0]

    def pile(self, names: Sequence[Sequence[str]], rows: Sequence[int | Axis], *columns: int | Axis) -> Tensor:
        """Several such stacks of the same shape, one for each expert.    -> [len(names), sum(rows), *columns].

        Each tensor goes to its place as it is read, so that at most one is held twice.
        """
        heights, rest = [axis.kept for axis in _axes(rows)], _axes(columns)
        size = (len(names), sum(heights), *(axis.kept for axis in rest))
        whole = torch.empty(size, dtype=self.dtype, device=self._device)
        for stack, own in zip(whole, names, strict=True):
            for place, name, axis in zip(stack.split(heights), own, _axes(rows), strict=True):
                place.copy_(self._from_file(name, (axis, *rest)))
        return whole

    def _from_file(self, name: str, axes: tuple[Axis, ...]) -> Tensor:
        shape = tuple(axis.size for axis in axes)
        tensor = self._files.read(name, shape, tuple(axis.there for axis in axes))
        self._done_bytes += torch.Size(shape).numel() * tensor.element_size()
        if self._progress is not None:
            self._progress(self._done_bytes, self._files.total_bytes)
        return tensor


def _axes(shape: Sequence[int | Axis]) -> tuple[Axis, ...]:
    return tuple(size if isinstance(size, Axis) else Axis(size, 0, size) for size in shape)
