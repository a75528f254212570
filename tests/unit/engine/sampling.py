"""Sampling as the tests ask for it, and the same by a plain reading of the contract: one row, one token at a time."""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from baton.core.request import Sampling
from baton.engine.draws import uniform
from baton.engine.logit_edits import EditedPlaces, LogitEdits, TokenMasks, edited, places_of
from baton.engine.sampler import Sampled, SamplingRows, sample
from baton.engine.sampling_table import SamplingTable

CPU = torch.device("cpu")
INF = float("inf")
PROMPT = (1, 2, 3)


def rows_of(
    params: Seq[Sampling], positions: Seq[int], vocab_size: int, answers: Seq[Seq[int]] | None = None
) -> SamplingRows:
    """Row i of a new table for sequence i."""
    table = SamplingTable(len(params), vocab_size, CPU)
    for row, sampling in enumerate(params):
        table.put(row, sampling, PROMPT, answers[row] if answers else ())
    return table.take(np.arange(len(params)), np.array(positions, dtype=np.int64))


def choose(
    logits: Tensor, params: Seq[Sampling], positions: Seq[int] | None = None, answers: Seq[Seq[int]] | None = None
) -> Sampled:
    positions = [0] * len(params) if positions is None else positions
    return sample(logits, rows_of(params, positions, logits.shape[1], answers)).to_host().result()


def masks_of(rows: dict[int, set[int]], vocab_size: int) -> TokenMasks:
    """row of the logits -> the tokens that it may choose."""
    words = np.zeros((len(rows), -(-vocab_size // 32)), dtype=np.uint32)
    for line, allowed in zip(words, rows.values(), strict=True):
        for token in allowed:
            line[token // 32] |= np.uint32(1 << (token % 32))
    return TokenMasks(torch.tensor(list(rows)), torch.from_numpy(words.view(np.int32)))


def with_edits(logits: Tensor, edits: Seq[LogitEdits | None]) -> Tensor:
    """The logits [S, V] in f32, each row with its edits, if it has some."""
    rows = [row for row, edit in enumerate(edits) if edit is not None]
    if not rows:
        return logits.float()
    places, values = places_of([edit for edit in edits if edit is not None], np.array(rows), logits.shape[1])
    device = logits.device
    return edited(logits, EditedPlaces(torch.from_numpy(places).to(device), torch.from_numpy(values).to(device)))


def edited_row(logits: Seq[float], params: Sampling, answer: Seq[int], allowed: set[int] | None) -> list[np.float32]:
    """In float32, as the sampler has them: other tests hold the edits against float64."""
    one, found = np.float32, []
    bias = dict(params.logit_bias)
    for token, logit in enumerate(logits):
        value = one(logit) + one(bias.get(token, 0.0))
        if token in PROMPT or token in answer:
            factor = one(params.repetition_penalty)
            value = value / factor if value > 0 else value * factor
        if token in answer:
            value -= one(params.presence_penalty + params.frequency_penalty * answer.count(token))
        stopped = token in params.stop_token_ids and len(answer) < params.min_tokens
        found.append(one(-INF) if stopped or (allowed is not None and token not in allowed) else value)
    return found


def filtered(values: Seq[np.float32], params: Sampling, slack: float = 0.0) -> dict[int, float]:
    """Token -> weight, best first, ties by id, of what the filters leave. slack > 0 lets tokens at an edge in."""
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    with np.errstate(over="ignore"):
        scaled = [(values[token] - values[order[0]]) / np.float32(params.temperature) for token in order]
    weights = {token: float(np.exp(np.float64(x))) for token, x in zip(order, scaled, strict=True)}
    left = order[: params.top_k] if params.top_k else order
    total, before, nucleus = sum(weights[token] for token in left), 0.0, []
    for token in left:
        if nucleus and params.top_p < 1 and before >= params.top_p * total * (1 + slack):
            break
        nucleus.append(token)
        before += weights[token]
    strong = {token for token in nucleus if weights[token] > 0 and weights[token] >= params.min_p * (1 - slack)}
    return {token: weights[token] for token in order if token in strong or token == order[0]}


def reference_tokens(values: Seq[np.float32], params: Sampling, position: int, slack: float = 1e-12) -> set[int]:
    """The token of this row: one, unless the number or a filter falls on an edge."""
    if params.temperature == 0:
        return {max(range(len(values)), key=lambda token: (values[token], -token))}
    parts = (params.seed, params.branch, position)
    number = float(uniform(*(np.array([part], dtype=np.uint64) for part in parts))[0])
    found = set()
    for sign in (-1, 0, 1):
        weights = filtered(values, params, sign * slack)
        order = list(weights)
        sums = np.cumsum([weights[token] for token in order])
        for nudge in (-1, 0, 1):
            rank = int(np.searchsorted(sums, (number + nudge * slack) * sums[-1], side="right"))
            found.add(order[min(rank, len(order) - 1)])
    return found
