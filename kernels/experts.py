"""The feed-forward layer of a mixture of experts (Shazeer et al., 2017): each token goes through a few of E of them."""

import torch
from torch import Tensor
from torch.nn import functional

from .activation import silu_gate


def route(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Which experts read each token and how much each counts: the softmax over all, in float32, and its largest.

    logits [T, E] -> (shares [T, K] f32, summing to one if `normalise`; chosen [T, K] i64).
    """
    assert top_k <= logits.shape[-1], (top_k, logits.shape)
    shares, chosen = functional.softmax(logits, -1, dtype=torch.float32).topk(top_k, -1)
    return (shares / shares.sum(-1, keepdim=True) if normalise else shares), chosen


def mix_experts(x: Tensor, gate_up: Tensor, down: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
    """The sum of the chosen experts' SwiGLU layers, each by its share.

    x [T, I], gate_up [E, 2F, I] with the gate's rows first, down [E, I, F], shares [T, K] f32, chosen [T, K] i64
    -> [T, I] in x's dtype. Tokens are sorted by expert, so that each expert that is used reads its weights once. The
    sum is taken in float32 in the order of `chosen`: a token's result does not depend on the order of its neighbours.
    """
    assert x.shape[-1] == gate_up.shape[2] == down.shape[1], (x.shape, gate_up.shape, down.shape)
    assert gate_up.shape[:2] == (down.shape[0], 2 * down.shape[2]), (gate_up.shape, down.shape)
    assert shares.shape == chosen.shape, (shares.shape, chosen.shape)
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # row = token * K + which of its choices; sorted by expert
    counts = chosen.flatten().bincount(minlength=gate_up.shape[0]).tolist()  # waits for a GPU: a kernel need not
    sent = x.index_select(0, order // top_k)
    mixed = torch.empty_like(sent)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(begin, begin + count)
            inner = silu_gate(functional.linear(sent[rows], gate_up[expert]))
            torch.mm(inner, down[expert].t(), out=mixed[rows])
            begin += count
    returned = torch.empty_like(mixed).index_copy_(0, order, mixed).view(*chosen.shape, -1)
    return (returned * shares[..., None]).sum(1).to(x.dtype)


def mix_experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
    """What `mix_experts` means, token by token, in the precision of x."""
    rows = []
    for token, its_shares, its_experts in zip(x, shares.to(x.dtype), chosen.tolist(), strict=True):
        outputs = [down[expert] @ silu_gate(gate_up[expert] @ token) for expert in its_experts]
        rows.append(sum((share * y for share, y in zip(its_shares, outputs, strict=True)), torch.zeros_like(token)))
    return torch.stack(rows)
