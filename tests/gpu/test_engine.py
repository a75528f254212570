"""The whole engine on a GPU: its greedy answers are those that transformers' logits, computed on the CPU, call best."""

import random as random_numbers
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.policies import policy
from baton.engine.sequence import Sequence

from ..batch_runs import Way, run
from .conftest import VOCABULARY

NEW_TOKENS = 24
# Two logits of transformers that lie closer than this are a tie, which either may win. Logits are of the order of 10.
TIE = 1e-4


def some_sequences() -> list[Sequence]:
    numbers = random_numbers.Random(0)
    lengths = [1, 2, 15, 16, 17, 33, 100, 350, 700] + [numbers.randint(1, 200) for _ in range(15)]
    return [
        Sequence(
            SequenceId(f"r/{index}"),
            tuple(numbers.randrange(2, VOCABULARY) for _ in range(length)),
            Sampling(max_tokens=NEW_TOKENS, temperature=0.0),
        )
        for index, length in enumerate(lengths)
    ]


def reference_logits(path: Path, sequences: list[Sequence]) -> list[Tensor]:
    """transformers' float32 logits [NEW_TOKENS, vocabulary] at the places where each sequence's answer was chosen."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for seq in sequences:
            logits = model(torch.tensor([[*seq.prompt, *seq.tokens[:-1]]])).logits[0]
            found.append(logits[len(seq.prompt) - 1 :])
    return found


KINDS = [
    ("Llama", {}),
    ("Llama", {"head_dim": 128, "num_key_value_heads": 1}),
    ("Llama", {"head_dim": 32}),  # no kernel for this size: the torch reference serves
    ("Mistral", {"sliding_window": 24}),
    ("Qwen3", {"head_dim": 80}),
    ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("Qwen3Moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}),
]


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_greedy_answers_in_float32_are_those_of_transformers(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., Path], gpu: torch.device
) -> None:
    path = checkpoint(family, **changes)
    engine = Engine.build(path, torch.float32, gpu, kv_bytes=64 << 20)
    sequences = some_sequences()
    run(engine, sequences, Way(step_tokens=128))
    ties = 0
    for seq, logits in zip(sequences, reference_logits(path, sequences), strict=True):
        assert len(seq.tokens) == NEW_TOKENS
        chosen = logits[torch.arange(NEW_TOKENS), seq.tokens]
        behind = logits.max(-1).values - chosen
        assert (behind < TIE).all(), (seq.sequence_id, len(seq.prompt), behind)
        ties += int((behind > 0).sum())
    print(f"{ties} of {len(sequences) * NEW_TOKENS} tokens were the other one of a tie")


def test_answers_in_bfloat16_stay_near_the_best(checkpoint: Callable[..., Path], gpu: torch.device) -> None:
    path = checkpoint("Llama")
    engine = Engine.build(path, torch.bfloat16, gpu, kv_bytes=64 << 20)
    sequences = some_sequences()
    run(engine, sequences, Way(step_tokens=128))
    for seq, logits in zip(sequences, reference_logits(path, sequences), strict=True):
        best, mean = logits.max(-1).values, logits.mean(-1)
        chosen = logits[torch.arange(NEW_TOKENS), seq.tokens]
        assert ((best - chosen) < 0.25 * (best - mean)).all(), seq.sequence_id


@pytest.mark.parametrize(
    "way",
    [
        Way(step_tokens=512, join_every=0, lookahead=True),
        Way(step_tokens=64, join_every=2, lookahead=False),
        Way(step_tokens=100, lookahead=True, ballast=2),
        Way(step_tokens=64, join_every=0, lookahead=True, ballast=3, swap_blocks=400),
    ],
    ids=str,
)
def test_look_ahead_chunks_and_preemption_give_answers_that_the_reference_calls_best(
    way: Way, checkpoint: Callable[..., Path], gpu: torch.device
) -> None:
    path = checkpoint("Llama")
    engine = Engine.build(path, torch.float32, gpu, kv_bytes=16 << 20)
    sequences = some_sequences()
    counts = run(engine, sequences, way)
    if way.ballast:
        assert (counts.swapped if way.swap_blocks else counts.recomputed) > 0, "nothing was preempted"
    for seq, logits in zip(sequences, reference_logits(path, sequences), strict=True):
        chosen = logits[torch.arange(NEW_TOKENS), seq.tokens]
        assert (logits.max(-1).values - chosen < TIE).all(), seq.sequence_id


def test_a_step_with_look_ahead_never_waits_for_its_own_tokens(
    checkpoint: Callable[..., Path], gpu: torch.device
) -> None:
    """Launching a decode step makes no call that waits for the GPU: torch would say so."""
    engine = Engine.build(checkpoint("Llama"), torch.bfloat16, gpu, kv_bytes=64 << 20)
    batch = ContinuousBatch(engine, policy("fcfs"), lookahead=True)
    for seq in some_sequences():
        batch.add(seq)
    while batch.waiting or batch.tokens_ahead():
        batch.step(0.0)
    batch.step(0.0)
    plan = batch._plan(0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():  # as in step()
            flight = batch._launch(plan)
            batch._sampling.launch(flight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(flight.decode_rows) > 0


def test_the_device_s_clock_covers_every_step_of_a_run(checkpoint: Callable[..., Path], gpu: torch.device) -> None:
    engine = Engine.build(checkpoint("Llama"), torch.bfloat16, gpu, kv_bytes=64 << 20)
    batch = ContinuousBatch(engine, policy("fcfs"))
    for seq in some_sequences():
        batch.add(seq)
    begin, steps, times = time.perf_counter(), 0, []
    while (result := batch.step(0.0)) is not None:
        steps += result.stats.sequences > 0
        times += result.device
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    assert steps - 2 <= len(times) <= steps  # who asks again later is told of the last ones
    assert all(one.busy_s > 0 and one.idle_s >= 0 for one in times)
    assert times[0].idle_s == 0
    assert sum(one.busy_s + one.idle_s for one in times) <= took
