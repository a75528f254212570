"""A whole model: embedding, layers, norm, head. The families differ in how a layer is read; see their files."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.rotary_write import plan_rotation
from ..batch import Batch
from .config import ModelConfig
from .layers import (
    Attention,
    DecoderLayer,
    Embedding,
    Experts,
    Head,
    Linear,
    Mlp,
    Norm,
    PartialLinear,
    SplitEmbedding,
    Step,
)
from .rope import rope_tables
from .weights import Weights

ReadAttention = Callable[[Weights, ModelConfig, int], Attention]
ReadFeedForward = Callable[[Weights, ModelConfig, int], Mlp | Experts]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder-only language model, or this rank's part of one. Changes nothing but the pool that it is given."""

    config: ModelConfig  # of the whole
    embedding: Embedding | SplitEmbedding
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Head
    cos: Tensor  # [positions, D]
    sin: Tensor  # [positions, D], signed
    exact: bool = False  # products have the same bits for a token whatever the others are, or get one token at a time

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, batch: Batch, pool: Tensor) -> Tensor:
        """Logits of the rows that the batch wants.    -> [S', vocab] in the model's dtype.

        pool [N, L, 2, G, P, D]: G KV heads of this rank. Ranks that share a model call this with equal batches; others
        than rank 0 get an empty tensor.
        """
        step = Step(batch, pool, plan_rotation(self.cos, self.sin, batch.positions, pool))
        stream = self.embedding(batch.token_ids)
        delta: Tensor | None = None  # what the stream still lacks, this rank's part
        for layer in self.layers:
            delta = layer(stream, delta, step)
        if batch.wanted is not None:
            stream = stream.index_select(0, batch.wanted)
            delta = None if delta is None else delta.index_select(0, batch.wanted)
        return self.head(self.norm(stream, delta), step)


def read_model(
    weights: Weights,
    config: ModelConfig,
    num_positions: int,
    read_attention: ReadAttention,
    read_feed_forward: ReadFeedForward,
) -> Model:
    """Everything but attention and feed-forward has the same names in all families."""
    cos, sin = rope_tables(config.rope, config.head_size, num_positions, weights.dtype)
    vocabulary = (weights.shard.split_padded(config.vocab_size), config.hidden_size)
    embedding = weights.read("model.embed_tokens.weight", vocabulary)
    layers = tuple(
        _read_layer(weights, config, layer, read_attention(weights, config, layer), read_feed_forward)
        for layer in range(config.num_layers)
    )
    norm = _read_norm(weights, config, "model.norm")
    rows = embedding if config.tie_word_embeddings else weights.read("lm_head.weight", vocabulary)
    head = Head(Linear.of(rows, None, weights.invariant), config.vocab_size, weights.communicator)
    device = embedding.device
    cos, sin = cos.to(device), sin.to(device)
    return Model(config, _embedding(weights, embedding), layers, norm, head, cos, sin, weights.exact)


def read_qkv(weights: Weights, config: ModelConfig, layer: int) -> Linear:
    """q, k and v as one product, with biases where the configuration has them."""
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
    kv_rows = weights.shard.split_kv(config.num_kv_heads, config.head_size)
    rows = [weights.shard.split(config.num_heads * config.head_size), kv_rows, kv_rows]
    weight = weights.stack([f"{name}.weight" for name in names], rows, config.hidden_size)
    bias = weights.stack([f"{name}.bias" for name in names], rows) if config.attention_bias else None
    return Linear.of(weight, bias, weights.invariant)


def read_output(weights: Weights, config: ModelConfig, layer: int) -> PartialLinear:
    """The attention's output projection."""
    name = f"model.layers.{layer}.self_attn.o_proj"
    return _partial(weights, name, config.hidden_size, config.num_heads * config.head_size, config.output_bias)


def read_mlp(weights: Weights, config: ModelConfig, layer: int) -> Mlp:
    """One dense feed-forward layer."""
    hidden, inner, prefix = config.hidden_size, config.intermediate_size, f"model.layers.{layer}.mlp"
    names, rows = [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [weights.shard.split(inner)] * 2
    gate_up_bias = weights.stack([f"{name}.bias" for name in names], rows) if config.mlp_bias else None
    return Mlp(
        Linear.of(weights.stack([f"{name}.weight" for name in names], rows, hidden), gate_up_bias, weights.invariant),
        _partial(weights, f"{prefix}.down_proj", hidden, inner, config.mlp_bias),
    )


def read_experts(weights: Weights, config: ModelConfig, prefix: str, *, gate: str, up: str, down: str) -> Experts:
    """One layer of experts; gate, up, down: how the family calls their matrices."""
    assert config.experts is not None, "the configuration has no experts"
    count, inner, hidden = config.experts.count, config.experts.intermediate_size, config.hidden_size
    names = [f"{prefix}.experts.{expert}" for expert in range(count)]
    part = weights.shard.split(inner)
    return Experts(
        router=Linear.of(weights.read(f"{prefix}.gate.weight", (count, hidden))),
        gate_up=weights.pile([[f"{x}.{gate}.weight", f"{x}.{up}.weight"] for x in names], [part, part], hidden),
        down=weights.pile([[f"{x}.{down}.weight"] for x in names], [hidden], part),
        top_k=config.experts.per_token,
        normalise=config.experts.normalise,
    )


def _partial(weights: Weights, name: str, rows: int, columns: int, has_bias: bool) -> PartialLinear:
    """Some columns of a matrix. The ranks' products are summed with their biases, so the first rank alone has one."""
    weight = weights.read(f"{name}.weight", (rows, weights.shard.split(columns)))
    bias = weights.read(f"{name}.bias", (rows,)) if has_bias else None
    part = Linear.of(weight, bias if weights.shard.rank == 0 else None, weights.invariant)
    return PartialLinear(part, weights.shard.size)


def _embedding(weights: Weights, rows: Tensor) -> Embedding | SplitEmbedding:
    """The whole one where it is here: a lookup needs no mask then."""
    shard = weights.shard
    return Embedding(rows) if shard.size == 1 else SplitEmbedding(rows, shard.rank * len(rows), weights.communicator)


def _read_layer(
    weights: Weights, config: ModelConfig, layer: int, attention: Attention, read_feed_forward: ReadFeedForward
) -> DecoderLayer:
    prefix = f"model.layers.{layer}"
    return DecoderLayer(
        _read_norm(weights, config, f"{prefix}.input_layernorm"),
        attention,
        _read_norm(weights, config, f"{prefix}.post_attention_layernorm"),
        read_feed_forward(weights, config, layer),
    )


def _read_norm(weights: Weights, config: ModelConfig, name: str) -> Norm:
    weight = weights.read(f"{name}.weight", (config.hidden_size,))
    return Norm(weight, config.rms_norm_eps, weights.communicator)
