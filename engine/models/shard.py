"""Which part of each weight a rank holds. Pure.

Heads, feed-forward columns and the vocabulary are split; norms and the experts' router are everywhere. Where there are
fewer KV heads than ranks, several ranks hold the same one, beside the query heads that read it.
"""

from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a weight, of which [begin, end) is wanted. Beyond `size`, where the checkpoint ends, are zeros."""

    size: int
    begin: int
    end: int

    @property
    def kept(self) -> int:
        return self.end - self.begin

    @property
    def there(self) -> slice:
        """The part of what is wanted that the checkpoint has."""
        return slice(min(self.begin, self.size), min(self.end, self.size))


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of `size` that compute each layer together."""

    rank: int = 0
    size: int = 1

    def split(self, size: int) -> Axis:
        """An axis of equal parts; `size` is a multiple of the number of ranks."""
        part = size // self.size
        return Axis(size, self.rank * part, (self.rank + 1) * part)

    def split_padded(self, size: int) -> Axis:
        """An axis of equal parts, of which the last reach beyond its end where it does not divide."""
        part = -(-size // self.size)
        return Axis(size, self.rank * part, (self.rank + 1) * part)

    def heads(self, num_heads: int) -> range:
        """Query heads."""
        part = self.split(num_heads)
        return range(part.begin, part.end)

    def kv_heads(self, num_kv_heads: int) -> range:
        """A part of them, or one that other ranks hold too."""
        first = self.rank * num_kv_heads // self.size
        return range(first, first + max(1, num_kv_heads // self.size))

    def split_kv(self, num_kv_heads: int, head_size: int) -> Axis:
        """The axis of all KV heads' dimensions."""
        heads = self.kv_heads(num_kv_heads)
        return Axis(num_kv_heads * head_size, heads.start * head_size, heads.stop * head_size)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError unless heads and feed-forward divide, and KV heads divide or repeat evenly."""
        experts = config.experts
        parts = {"heads": config.num_heads}
        if experts is None or len(experts.layers) < config.num_layers:
            parts["feed-forward columns"] = config.intermediate_size
        if experts is not None:
            parts["columns of an expert"] = experts.intermediate_size
        for name, size in parts.items():
            if size % self.size:
                raise ValueError(f"tp is {self.size}: {size} {name} do not split evenly over {self.size} ranks")
        if config.num_kv_heads % self.size and self.size % config.num_kv_heads:
            raise ValueError(f"tp is {self.size}: {config.num_kv_heads} KV heads neither split nor repeat evenly")
