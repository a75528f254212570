"""The whole engine on a GPU: its greedy answers are those that transformers' logits, computed on the CPU, call best."""

import random as random_numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine.engine import Engine
from baton.engine.logit_edits import LogitEdits, edited
from baton.engine.sequence import Sequence

VOCABULARY = 211
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
NEW_TOKENS = 24
# Two logits of transformers that lie closer than this are a tie, which either may win. Logits are of the order of 10.
TIE = 1e-4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of a family, as transformers saves it."""

    def make(family: str, **changes: Any) -> Path:
        import transformers

        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
        return path

    return make


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


def run(engine: Engine, sequences: list[Sequence], chunk: int = 128) -> None:
    """A new sequence joins in every step; prompts go in chunks beside those that decode. All blocks come back."""
    waiting, running = list(sequences), []
    while waiting or running:
        if waiting:
            joined = waiting.pop(0)
            engine.start(joined, joined.max_length)
            running.append(joined)
        decode = [seq for seq in running if seq.remaining == 1 and seq.tokens]
        prefill = [(seq, min(chunk, seq.remaining)) for seq in running if seq not in decode]
        engine.step(prefill, decode)
        for seq in [seq for seq in running if seq.end_reason()]:
            engine.finish(seq)
            running.remove(seq)
    engine.ledger.check()
    assert engine.ledger.held_count == 0


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
    run(engine, sequences)
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
    run(engine, sequences)
    for seq, logits in zip(sequences, reference_logits(path, sequences), strict=True):
        best, mean = logits.max(-1).values, logits.mean(-1)
        chosen = logits[torch.arange(NEW_TOKENS), seq.tokens]
        assert ((best - chosen) < 0.25 * (best - mean)).all(), seq.sequence_id


def test_edited_logits_are_those_of_the_cpu(gpu: torch.device) -> None:
    params = Sampling(
        max_tokens=99,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias=((3, 9.0),),
        min_tokens=99,
        stop_token_ids=frozenset({7}),
    )
    dice = random_numbers.Random(1)
    edits: list[LogitEdits | None] = []
    for index in range(64):
        seq = Sequence(SequenceId(f"r/{index}"), tuple(dice.choices(range(VOCABULARY), k=50)), params)
        for token in dice.choices(range(VOCABULARY), k=index):
            seq.append(token)
        edits.append(seq.edits if index % 3 else None)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 5).to(dtype)
        torch.testing.assert_close(edited(logits.to(gpu), edits).cpu(), edited(logits, edits))
