"""Sampling on a GPU: it waits for nothing, and chooses what the CPU chooses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from baton.core.request import Sampling
from baton.engine.device_table import DeviceSamplingTable, sampling_table
from baton.engine.logit_edits import TokenMasks
from baton.engine.logprobs import ranked_logprobs
from baton.engine.sampler import NO_TOKEN, SamplingRows, sample
from baton.engine.sampling_table import SamplingTable

VOCABULARY = 4096
CPU = torch.device("cpu")
PROMPT = np.arange(50, dtype=np.int64)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever would wait for the device raises instead."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tables(count: int, *devices: torch.device, torch_alone: bool = False) -> list[SamplingTable | DeviceSamplingTable]:
    """torch_alone: as where a GPU has no kernels."""
    dice = np.random.default_rng(3)
    make = SamplingTable if torch_alone else sampling_table
    found = [make(count, VOCABULARY, device) for device in devices]
    for row in range(count):
        params = Sampling(
            max_tokens=99,
            temperature=float(dice.choice([0.0, 0.7, 1.5])),
            top_k=int(dice.choice([0, 0, 40, 3000])),
            top_p=float(dice.choice([1.0, 0.9])),
            min_p=float(dice.choice([0.0, 0.01])),
            seed=row,
            repetition_penalty=float(dice.choice([1.0, 1.3])),
            logit_bias=((3, 9.0),) if row % 3 == 0 else (),
            min_tokens=99 if row % 4 == 0 else 0,
            stop_token_ids=frozenset({7}),
            logprobs=[None, 0, 5][row % 3],
        )
        for table in found:
            table.put(row, params, PROMPT, range(row, row + 20))
    return found


def masked(rows: SamplingRows, device: torch.device) -> SamplingRows:
    bits = torch.randint(-(2**31), 2**31, (2, VOCABULARY // 32), generator=torch.Generator().manual_seed(1))
    masks = TokenMasks(torch.tensor([1, 5], device=device), bits.to(torch.int32).to(device))
    return replace(rows, masks=masks)


@pytest.mark.parametrize("torch_alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_and_logprobs_are_those_of_the_cpu(dtype: torch.dtype, torch_alone: bool, gpu: torch.device) -> None:
    there, here = tables(256, gpu, CPU, torch_alone=torch_alone)
    logits = (torch.randn(256, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    logits[9, 100] = torch.nan
    rows, positions = np.arange(256), np.full(256, 20)
    found = sample(logits.to(gpu), masked(there.take(rows, positions), gpu)).to_host().result()
    expected = sample(logits, masked(here.take(rows, positions), CPU)).to_host().result()
    # exp differs in its last bit: a number may fall on the other side of an edge.
    assert sum((found.token_ids != expected.token_ids).tolist()) <= 1
    assert found.token_ids[9] == NO_TOKEN
    assert found.logprobs.keys() == expected.logprobs.keys()
    for row in found.logprobs.keys() - {9}:
        if found.token_ids[row] == expected.token_ids[row]:
            one, other = found.logprobs[row], expected.logprobs[row]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("torch_alone", [False, True])
def test_choosing_waits_for_nothing_and_steps_in_flight_do_not_disturb_each_other(
    torch_alone: bool, gpu: torch.device
) -> None:
    (table,) = tables(64, gpu, torch_alone=torch_alone)
    logits = torch.randn(64, VOCABULARY, device=gpu) * 4
    rows = np.arange(64)
    expected = [
        sample(logits, masked(table.take(rows, np.full(64, step)), gpu)).to_host().result() for step in range(8)
    ]
    ready = [masked(table.take(rows, np.full(64, step)), gpu).masks for step in range(8)]
    pending = []
    with no_waiting():
        for step in range(8):
            taken = table.take(rows, np.full(64, step))
            pending.append(sample(logits, replace(taken, masks=ready[step])).to_host())
    for one, other in zip((later.result() for later in pending), expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.logprobs == other.logprobs
    assert all(one.ready() for one in pending)


def test_prompt_logprobs_wait_for_nothing(gpu: torch.device) -> None:
    logits = torch.randn(300, VOCABULARY, device=gpu)
    token_ids = torch.arange(300, device=gpu)
    with no_waiting():
        pending = ranked_logprobs(logits, token_ids, 5).to_host()
    expected = torch.log_softmax(logits.double(), -1).cpu()
    for row, entry in enumerate(pending.result()):
        assert entry.logprob == pytest.approx(float(expected[row, row]), abs=1e-4)
        assert len(entry.top) == 5
