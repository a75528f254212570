"""What the families' layers are made of."""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.activation import silu_gate
from ...kernels.experts import mix_experts, route
from ...kernels.linear import linear, pack_weight
from ...kernels.norm import add_rms_norm, rms_norm
from ...kernels.rotary_write import HeadNorms, Rotation, rotary_write
from ..attention import attend
from ..batch import Batch
from ..parallel.communicator import Communicator


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T + b."""

    weight: Tensor  # [out, in], packed for its device
    bias: Tensor | None = None  # [out]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> "Linear":
        """From a weight as the checkpoint has it."""
        return cls(pack_weight(weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """x W^T + b, where each rank has some columns of W and as many of x. One rank has b."""

    part: Linear
    communicator: Communicator

    def __call__(self, x: Tensor) -> Tensor:
        return self.communicator.all_reduce(self.part(x))


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vectors of tokens."""

    weight: Tensor  # [vocab, hidden]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] i64 -> [T, hidden]."""
        return self.weight.index_select(0, token_ids)


@dataclass(frozen=True, slots=True)
class SplitEmbedding:
    """The same, where each rank has the vectors of some tokens."""

    weight: Tensor  # [rows, hidden] of tokens [first, first + rows)
    first: int
    communicator: Communicator

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self.first
        here = rows.clamp(0, self.weight.shape[0] - 1)
        vectors = self.weight.index_select(0, here).masked_fill_((rows != here)[:, None], 0)
        return self.communicator.all_reduce(vectors)


@dataclass(frozen=True, slots=True)
class Head:
    """Logits of all tokens, of which each rank computes some. Rank 0 alone gets them."""

    part: Linear
    vocab_size: int  # the parts together may be longer: they are equal
    communicator: Communicator

    def __call__(self, x: Tensor) -> Tensor:
        """[S, hidden] -> [S, vocab]; on other ranks than 0 an empty tensor."""
        return self.communicator.gather_last(self.part(x))[:, : self.vocab_size]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm of the stream, after what the stream still lacks is added to it: one pass over memory for both."""

    weight: Tensor  # [hidden]
    eps: float

    def __call__(self, stream: Tensor, delta: Tensor | None = None) -> Tensor:
        """stream += delta, in place; -> the norm of the sum. Both [rows, hidden]."""
        if delta is None:
            return rms_norm(stream, self.weight, self.eps)
        return add_rms_norm(delta, stream, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass needs beside its input."""

    batch: Batch
    pool: Tensor  # [N, L, 2, G, P, D], G: this rank's KV heads
    rotation: Rotation


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary positions over paged KV. The heads are those of this rank."""

    layer: int
    head_size: int
    window: int | None
    qkv: Linear  # q's heads, then k's, then v's
    output: SummedLinear
    head_norms: HeadNorms | None = None  # of q and k, before the rotation

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, hidden] -> [T, hidden]. Writes the tokens' K and V."""
        batch, pool = step.batch, step.pool
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_size)
        q = rotary_write(qkv, step.rotation, pool, self.layer, batch.slots, self.head_norms, batch.write_plan)
        attended = attend(q, pool, self.layer, self.head_size**-0.5, self.window, batch)
        return self.output(attended.view(x.shape[0], -1))


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate(x)) * up(x))."""

    gate_up: Linear  # gate's rows, then up's
    down: SummedLinear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_gate(self.gate_up(x)))


@dataclass(frozen=True, slots=True)
class Experts:
    """Many small feed-forward layers, of which a router picks a few for each token. A rank has some columns of each."""

    router: Linear  # a logit for each expert
    gate_up: Tensor  # [E, 2F, hidden], gate's rows, then up's
    down: Tensor  # [E, hidden, F]
    top_k: int
    normalise: bool  # the shares of those picked sum to one
    communicator: Communicator

    def __call__(self, x: Tensor) -> Tensor:
        shares, chosen = route(self.router(x), self.top_k, self.normalise)
        return self.communicator.all_reduce(mix_experts(x, self.gate_up, self.down, shares, chosen))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and feed-forward, each on the normalised stream. What they give is added to it by the next norm."""

    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp: Mlp | Experts

    def __call__(self, stream: Tensor, delta: Tensor | None, step: Step) -> Tensor:
        """stream [T, hidden], changed in place; delta: what it still lacks. -> what it lacks after this layer."""
        delta = self.attention(self.input_norm(stream, delta), step)
        return self.mlp(self.post_attention_norm(stream, delta))
