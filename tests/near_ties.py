"""Where two answers differ and rounding alone decides between them: one rule for all tests that compare tokens.

A near-tie counts as no difference, and is printed; any other difference fails. Behind a near-tie two answers go on
from different tokens, so the rest is not compared.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from baton.core.request import Sampling
from baton.engine.draws import uniform

EPSILON = 1e-4  # two logits closer than this are a tie: which one is larger is rounding
DRAWN_EPSILON = 1e-5  # of a distribution's whole: so close to a boundary, on which side a number falls is rounding
GREEDY = Sampling(max_tokens=1, temperature=0.0)

Values = npt.NDArray[np.float64]


class NearTies:
    """Compares answers with a reference's, and counts those that leave it at a near-tie."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._compared = 0

    def compare(
        self,
        name: object,
        tokens: Seq[int],
        expected: Seq[int],
        logits: Callable[[int], npt.ArrayLike],
        sampling: Sampling = GREEDY,
    ) -> None:
        """logits(position): the reference's [V] where it chose that token of its answer, with penalties and biases."""
        self._compared += 1
        if list(tokens) == list(expected):
            return
        position = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
        assert position is not None, f"{name} has {len(tokens)} tokens, the reference {len(expected)}"
        assert sampling.stop_token_ids or len(tokens) == len(expected), f"{name} has {len(tokens)} tokens"
        values = np.asarray(logits(position), np.float64)
        pair = (tokens[position], expected[position])
        told = f"{name}, token {position}: {pair[0]} of logit {values[pair[0]]}, not {pair[1]} of {values[pair[1]]}"
        assert choosable(values, sampling, position).issuperset(pair), f"no near-tie: {told}"
        self.found.append(told)

    def report(self, what: str, most: int) -> None:
        """Print what was found. More than `most` fail."""
        print(f"{what}: {self._compared} answers, {len(self.found)} near-ties", *self.found, sep="\n  ")
        assert len(self.found) <= most, self.found


def choosable(values: Values, sampling: Sampling, position: int) -> set[int]:
    """The tokens that a rounding error can make the choice. One, nearly always.    values [V]"""
    if sampling.temperature == 0:
        return set(np.flatnonzero(values.max() - values < EPSILON).tolist())
    number = number_of(sampling, position)
    found: set[int] = set()
    for edge in (-DRAWN_EPSILON, 0.0, DRAWN_EPSILON):
        order, sums = filtered(values, sampling, edge)
        first, last = np.searchsorted(sums, (number - DRAWN_EPSILON, number + DRAWN_EPSILON), side="right")
        found |= set(order[first : last + 1].tolist())
    # Two logits that tie may change places in the order of ranks, and at the edge of top-k.
    apart = np.abs(values[:, None] - values[sorted(found)]).min(1)
    return set(np.flatnonzero(apart < EPSILON).tolist())


def chosen(values: Values, sampling: Sampling, position: int) -> int:
    """The token, where nothing is rounded."""
    if sampling.temperature == 0:
        return int(values.argmax())
    order, sums = filtered(values, sampling)
    return int(order[np.searchsorted(sums, number_of(sampling, position), side="right")])


def number_of(sampling: Sampling, position: int) -> float:
    """What is drawn for a token of an answer, in [0, 1)."""
    parts = (sampling.seed, sampling.branch, position)
    return float(uniform(*(np.array([part], dtype=np.uint64) for part in parts))[0])


def filtered(values: Values, sampling: Sampling, edge: float = 0.0) -> tuple[npt.NDArray[np.int64], Values]:
    """What top-k, then top-p, then min-p leave, best first, and the running sums of its probabilities: the last is 1.

    edge: of the whole; above 0 lets in what lies beyond an edge by so little.
    """
    order = np.argsort(-values, kind="stable")[: sampling.top_k or None]
    weights = np.exp((values[order] - values[order[0]]) / sampling.temperature)
    before = (weights.cumsum() - weights) / weights.sum()
    stays = (weights > 0) & (weights >= sampling.min_p * (1 - edge))
    if sampling.top_p < 1:
        stays &= before < sampling.top_p + edge
    stays[0] = True
    sums = weights[stays].cumsum()
    return order[stays], sums / sums[-1]


def edited(logits: npt.ArrayLike, sampling: Sampling, prompt: Seq[int], answer: Seq[int]) -> Values:
    """Logits with bias, penalties and `min_tokens` after this much of an answer, read plainly.    [V] -> [V]"""
    values = np.array(logits, np.float64)
    for token, bias in sampling.logit_bias:
        values[token] += bias
    if len(answer) < sampling.min_tokens:
        values[sorted(sampling.stop_token_ids)] = -np.inf
    seen, said = np.unique([*prompt, *answer]), np.unique(answer).astype(np.int64)
    factors = np.where(values[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    values[seen] *= factors
    for token in said.tolist():
        values[token] -= sampling.presence_penalty + sampling.frequency_penalty * list(answer).count(token)
    return values
