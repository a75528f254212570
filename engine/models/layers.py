"""What the families' layers are made of."""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.experts import mix_experts, route
from ...kernels.linear import add_linear, gated_linear, is_skinny, linear, pack_weight
from ...kernels.norm import rms_norm
from ...kernels.rotary_write import HeadNorms, Rotation, rotary_write
from ...kernels.skinny_linear import fits_skinny
from ..attention import attend
from ..batch import Batch
from ..parallel.communicator import Communicator
from ..parallel.peers import add_rms_norm


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass needs beside its input."""

    batch: Batch
    pool: Tensor  # [N, L, 2, G, P, D], G: this rank's KV heads
    rotation: Rotation


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T + b."""

    weight: Tensor  # [out, in], packed for its device
    bias: Tensor | None = None  # [out]
    invariant: bool = False  # a row's result is bit for bit the same whatever the other rows are

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, invariant: bool = False) -> "Linear":
        """From a weight as the checkpoint has it. Raises ValueError where it is to be invariant and no kernel is."""
        if not invariant:
            return cls(pack_weight(weight), bias)
        if not fits_skinny(weight[:1], weight, bias):  # its rows stand for those of x
            raise ValueError(
                f"deterministic: no kernel for a {weight.dtype} matrix {list(weight.shape)} is; bfloat16 and inputs a "
                "multiple of 64, outputs of 8, are needed"
            )
        return cls(weight, bias, invariant)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return linear(x, self.weight, self.bias, workspace=step.batch.products, invariant=self.invariant)


@dataclass(frozen=True, slots=True)
class PartialLinear:
    """x W^T + b, where each of `ranks` has some columns of W and as many of x: this rank's part. One rank has b."""

    part: Linear
    ranks: int

    def __call__(self, x: Tensor, stream: Tensor, step: Step) -> Tensor | None:
        """Adds the product to the stream where the kernel that makes it does, in the same pass; else returns it."""
        weight, bias, workspace, invariant = self.part.weight, self.part.bias, step.batch.products, self.part.invariant
        if self.ranks == 1 and is_skinny(x, weight, workspace, invariant, bias, stream):
            add_linear(stream, x, weight, bias, workspace=workspace, invariant=invariant)
            return None
        return self.part(x, step)


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

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[S, hidden] -> [S, vocab]; on other ranks than 0 an empty tensor."""
        return self.communicator.gather_last(self.part(x, step))[:, : self.vocab_size]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm of the stream, after what the stream still lacks is added to it: one pass over memory for both. Of that
    each rank has a part."""

    weight: Tensor  # [hidden]
    eps: float
    communicator: Communicator

    def __call__(self, stream: Tensor, delta: Tensor | None = None) -> Tensor:
        """stream += the sum of the ranks' deltas, in place; -> the norm of the sum. Both [rows, hidden]."""
        if delta is None:
            return rms_norm(stream, self.weight, self.eps)
        return add_rms_norm(self.communicator, delta, stream, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary positions over paged KV. The heads are those of this rank."""

    layer: int
    head_size: int
    window: int | None
    qkv: Linear  # q's heads, then k's, then v's
    output: PartialLinear
    head_norms: HeadNorms | None = None  # of q and k, before the rotation

    def __call__(self, x: Tensor, stream: Tensor, step: Step) -> Tensor | None:
        """x, stream [T, hidden] -> what the stream still lacks, [T, hidden], this rank's part of it. Writes the tokens'
        K and V."""
        batch, pool = step.batch, step.pool
        qkv = self.qkv(x, step).view(x.shape[0], -1, self.head_size)
        q = rotary_write(qkv, step.rotation, pool, self.layer, batch.slots, self.head_norms, batch.write_plan)
        attended = attend(q, pool, self.layer, self.head_size**-0.5, self.window, batch)
        return self.output(attended.view(x.shape[0], -1), stream, step)


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate(x)) * up(x)), this rank's part of the sum."""

    gate_up: Linear  # gate's rows, then up's
    down: PartialLinear

    def __call__(self, x: Tensor, stream: Tensor, step: Step) -> Tensor | None:
        weight, bias, invariant = self.gate_up.weight, self.gate_up.bias, self.gate_up.invariant
        inner = gated_linear(x, weight, bias, workspace=step.batch.products, invariant=invariant)
        return self.down(inner, stream, step)


@dataclass(frozen=True, slots=True)
class Experts:
    """Many small feed-forward layers, of which a router picks a few for each token. A rank has some columns of each."""

    router: Linear  # a logit for each expert
    gate_up: Tensor  # [E, 2F, hidden], gate's rows, then up's
    down: Tensor  # [E, hidden, F]
    top_k: int
    normalise: bool  # the shares of those picked sum to one

    def __call__(self, x: Tensor, stream: Tensor, step: Step) -> Tensor:
        shares, chosen = route(self.router(x, step), self.top_k, self.normalise)
        return mix_experts(x, self.gate_up, self.down, shares, chosen)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and feed-forward, each on the normalised stream. What they give and do not add, the next norm adds."""

    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp: Mlp | Experts

    def __call__(self, stream: Tensor, delta: Tensor | None, step: Step) -> Tensor | None:
        """stream [T, hidden], changed in place; delta: what it still lacks. -> what it lacks after this layer.

        Of what it lacks each rank has a part, and the next norm adds them up.
        """
        delta = self.attention(self.input_norm(stream, delta), stream, step)
        return self.mlp(self.post_attention_norm(stream, delta), stream, step)
