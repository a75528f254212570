"""From a checkpoint's tensors to those that the models compute with: fused, cast, on their device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .safetensors_file import SafetensorsDir


class Weights:
    """Reads tensors by their names in the checkpoint and tells how far it got."""

    def __init__(
        self,
        files: SafetensorsDir,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """progress: called with (bytes read, bytes in all), both as on disk."""
        self._files = files
        self.dtype = dtype
        self._device = device
        self._progress = progress
        self._done_bytes = 0

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as it is. Raises ValueError when it is missing or of another shape."""
        return self._from_file(name, shape).to(device=self._device, dtype=self.dtype)

    def stack(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> Tensor:
        """Several tensors, one above the other, so that one product does for all.    -> [sum(rows), *columns]."""
        return self.pile([names], rows, *columns)[0]

    def pile(self, names: Sequence[Sequence[str]], rows: Sequence[int], *columns: int) -> Tensor:
        """Several such stacks of the same shape, one for each expert.    -> [len(names), sum(rows), *columns].

        Each tensor goes to its place as it is read, so that at most one is held twice.
        """
        whole = torch.empty(len(names), sum(rows), *columns, dtype=self.dtype, device=self._device)
        for stack, own in zip(whole, names, strict=True):
            for part, name in zip(stack.split(list(rows)), own, strict=True):
                part.copy_(self._from_file(name, tuple(part.shape)))
        return whole

    def _from_file(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._files.read(name, shape)
        self._done_bytes += tensor.nbytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._files.total_bytes)
        return tensor
