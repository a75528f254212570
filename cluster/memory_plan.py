"""How much memory a model takes and how many sequences fit: arithmetic alone. `baton serve` plans with the same.

    parameters x width = weights
    GPU x GPU_SHARE - weights - GPU_WORKSPACE = room for KV
    layers x (K, V) x KV heads x head size x width = a token;  a token x block_tokens = a block
    room / a block = blocks;  blocks / (context in blocks) = sequences

Under tensor parallelism a rank has its part of the heads, of the feed-forward and of the vocabulary; norms, the
experts' router and the biases of sums are on every rank; KV heads are, too, when there are fewer of them than ranks.
"""

import math
from dataclasses import dataclass

from ..core.errors import ConfigError
from ..engine.memory import kv_room, usable_bytes
from .checkpoint import StoredWeights
from .model_shape import AttentionShape, ModelShape

WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}  # bytes
RUNS = ("bfloat16", "float32")  # that weights are computed with

_GIB = 1 << 30
GPUS = {
    "b200": int(178.3 * _GIB),
    "h200": int(139.7 * _GIB),
    "h100": int(79.1 * _GIB),
    "a100-80": int(79.1 * _GIB),
    "l40s": int(44.4 * _GIB),
    "a100-40": int(39.4 * _GIB),
    "rtx5090": int(31.3 * _GIB),
    "rtx4090": int(23.5 * _GIB),
    "l4": int(21.9 * _GIB),
    "a10g": int(21.9 * _GIB),
}
"""Memory as CUDA counts it, which is less than the name says; rounded down, as it differs a little between drivers."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Tensors of one kind: how many there are and their shape, multiplied out by `count`."""

    name: str
    factors: tuple[int, ...]
    rank_factors: tuple[int, ...]  # of the rank that has the most

    @property
    def count(self) -> int:
        return math.prod(self.factors)

    @property
    def rank_count(self) -> int:
        return math.prod(self.rank_factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What one GPU holds for its rank."""

    memory: int
    usable: int
    room: int  # for KV; negative: the weights alone do not fit
    blocks: int
    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes and blocks of one rank, unless a name says otherwise."""

    shape: ModelShape
    tp: int
    dtype: str
    kv_dtype: str
    block_tokens: int
    context: int  # tokens of one sequence, prompt and answer
    weights: tuple[Weight, ...]
    stored: StoredWeights | None = None

    @property
    def counted(self) -> int:
        """Parameters by the configuration."""
        return sum(weight.count for weight in self.weights)

    @property
    def rank_counted(self) -> int:
        return sum(weight.rank_count for weight in self.weights)

    @property
    def unaccounted(self) -> int:
        """What the checkpoint holds beyond the count. Nobody says how it would be split: it counts for every rank."""
        return max(0, self.stored.count - self.counted) if self.stored else 0

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.counted + self.unaccounted

    @property
    def rank_parameters(self) -> int:
        return self.rank_counted + self.unaccounted

    @property
    def weight_bytes(self) -> int:
        return self.rank_parameters * WIDTHS[self.dtype]

    @property
    def rank_kv_heads(self) -> int:
        return kv_heads_of_rank(self.shape.attention, self.tp)

    @property
    def token_bytes(self) -> int:
        return kv_bytes_per_token(self.shape.attention, self.kv_dtype, self.tp)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    @property
    def sequence_blocks(self) -> int:
        return -(-self.context // self.block_tokens)

    @property
    def sequence_bytes(self) -> int:
        return self.sequence_blocks * self.block_bytes

    def fit(self, memory: int) -> Fit:
        """On a GPU with so many bytes that this rank has for itself."""
        usable = usable_bytes(memory)
        room = kv_room(usable, self.weight_bytes)
        blocks = max(0, room) // self.block_bytes
        return Fit(
            memory=memory,
            usable=usable,
            room=room,
            blocks=blocks,
            tokens=blocks * self.block_tokens,
            sequences=blocks // self.sequence_blocks,
        )


def plan_memory(
    shape: ModelShape,
    *,
    tp: int = 1,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    block_tokens: int = 16,
    context: int | None = None,
    max_model_len: int | None = None,
    stored: StoredWeights | None = None,
) -> MemoryPlan:
    """Raises ConfigError when the model does not split over `tp` ranks, or a length is beyond what it can."""
    check_split(shape, tp)
    longest = settle_context(max_model_len, shape.max_position_embeddings)
    if context is not None and context > longest:
        raise ConfigError(f"--context is {context}: a sequence has at most {longest} tokens.")
    runs = run_dtype(dtype, shape.dtype)
    return MemoryPlan(
        shape=shape,
        tp=tp,
        dtype=runs,
        kv_dtype=runs if kv_dtype == "auto" else kv_dtype,
        block_tokens=block_tokens,
        context=context or longest,
        weights=count_weights(shape, tp),
        stored=stored,
    )


def run_dtype(asked: str, stored: str) -> str:
    """What a model is computed in: as asked; "auto" is the checkpoint's where it is one of ours, else bfloat16."""
    if asked != "auto":
        return asked
    return stored if stored in RUNS else "bfloat16"


def settle_context(asked: int | None, longest: int) -> int:
    """Tokens of prompt and answer together. Raises ConfigError when more is asked for than the model knows."""
    if asked is not None and asked > longest:
        raise ConfigError(f"--max-model-len is {asked}: the model was made for at most {longest}.")
    return asked or longest


def kv_heads_of_rank(attention: AttentionShape, tp: int) -> int:
    """A part of them, or one that other ranks hold too."""
    return max(1, attention.num_kv_heads // tp)


def kv_bytes_per_token(attention: AttentionShape, dtype: str, tp: int = 1) -> int:
    """K and V of one token in all layers, on one rank."""
    return attention.num_layers * 2 * kv_heads_of_rank(attention, tp) * attention.head_size * WIDTHS[dtype]


def check_split(shape: ModelShape, tp: int) -> None:
    """Raises ConfigError unless heads and feed-forward divide, and KV heads divide or repeat evenly."""
    attention, experts = shape.attention, shape.experts
    parts = {"heads": attention.num_heads, "feed-forward columns": _dense_layers(shape) and shape.inner_size}
    if experts is not None:
        parts |= {"columns of an expert": experts.inner_size, "columns of the shared expert": experts.shared_size}
    for name, size in parts.items():
        if size % tp:
            raise ConfigError(f"--tp is {tp}: {size} {name} do not split evenly over {tp} ranks.")
    if attention.num_kv_heads % tp and tp % attention.num_kv_heads:
        raise ConfigError(f"--tp is {tp}: {attention.num_kv_heads} KV heads neither split nor repeat evenly.")


def count_weights(shape: ModelShape, tp: int = 1) -> tuple[Weight, ...]:
    """Every tensor of the model, by kind, as it is and as the fullest of `tp` ranks holds it."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    vocabulary_part = (-(-shape.vocab_size // tp), shape.hidden_size)
    weights = [
        Weight("embedding", vocabulary, vocabulary_part),
        *_attention_weights(shape, tp),
        *_feed_forward_weights(shape, tp),
        _everywhere("norms", 2 * shape.attention.num_layers + 1, shape.hidden_size),
    ]
    if not shape.tied:
        weights.append(Weight("head", vocabulary, vocabulary_part))
    return tuple(weights)


def _attention_weights(shape: ModelShape, tp: int) -> list[Weight]:
    attention, hidden = shape.attention, shape.hidden_size
    layers, size = attention.num_layers, attention.head_size
    heads, rank_heads = attention.num_heads, attention.num_heads // tp
    kv_heads, rank_kv_heads = attention.num_kv_heads, kv_heads_of_rank(attention, tp)
    weights = [
        Weight("q", (layers, heads, size, hidden), (layers, rank_heads, size, hidden)),
        Weight("k and v", (layers, 2, kv_heads, size, hidden), (layers, 2, rank_kv_heads, size, hidden)),
        Weight("output", (layers, hidden, heads, size), (layers, hidden, rank_heads, size)),
    ]
    if shape.qkv_bias:
        rows, rank_rows = heads + 2 * kv_heads, rank_heads + 2 * rank_kv_heads
        weights.append(Weight("q, k, v biases", (layers, rows, size), (layers, rank_rows, size)))
    if shape.output_bias:
        weights.append(_everywhere("output bias", layers, hidden))
    if shape.head_norms:
        weights.append(_everywhere("q and k norms", layers, 2, size))
    return weights


def _feed_forward_weights(shape: ModelShape, tp: int) -> list[Weight]:
    hidden, inner = shape.hidden_size, shape.inner_size
    weights = []
    dense = _dense_layers(shape)
    if dense:
        weights.append(Weight("gate, up, down", (dense, 3, inner, hidden), (dense, 3, inner // tp, hidden)))
    if dense and shape.mlp_bias:
        weights.append(Weight("gate, up biases", (dense, 2, inner), (dense, 2, inner // tp)))
        weights.append(_everywhere("down bias", dense, hidden))
    experts = shape.experts
    if experts is not None:
        layers, many, size, shared = experts.num_layers, experts.num_experts, experts.inner_size, experts.shared_size
        weights.append(Weight("experts", (layers, many, 3, size, hidden), (layers, many, 3, size // tp, hidden)))
        weights.append(_everywhere("router", layers, many, hidden))
        if shared:
            weights.append(Weight("shared expert", (layers, 3, shared, hidden), (layers, 3, shared // tp, hidden)))
            weights.append(_everywhere("its gate", layers, hidden))
    return weights


def _dense_layers(shape: ModelShape) -> int:
    return shape.attention.num_layers - (shape.experts.num_layers if shape.experts else 0)


def _everywhere(name: str, *factors: int) -> Weight:
    """On every rank whole."""
    return Weight(name, factors, factors)
