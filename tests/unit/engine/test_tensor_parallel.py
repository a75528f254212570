"""A model over several ranks, as real processes, gives what it gives on one."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.models import ModelConfig, Shard

from ...ranks import Ranks
from .sharded import Setting, alone, serve

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # of the Llama below, all heads
WIDE = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),  # two KV heads: four ranks hold each twice
    ("Llama", {**WIDE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("Mistral", {**WIDE, "sliding_window": 24}),
    ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    ("Qwen2", {"vocab_size": 5 * 41}),
    ("Qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True}),
]


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    numbers = random.Random(0)
    return [tuple(numbers.randrange(2, vocab_size) for _ in range(length)) for length in (5, 70, 33, 1)]


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=str)
def test_each_family_answers_alike_on_one_two_and_four_ranks(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., Path], ranks: Ranks
) -> None:
    setting = Setting(checkpoint(family, **changes), prompts(changes.get("vocab_size", 211)))
    whole = alone(setting)
    for size in (2, 4):
        split, *others = ranks.run(serve, size, setting)
        assert others == [None] * (size - 1)
        assert split.tokens == whole.tokens
        assert split.geometry == whole.geometry
        heads = max(1, whole.geometry.num_kv_heads // size)
        assert [shape[3] for shape in split.pool_shapes] == [heads] * size
        torch.testing.assert_close(split.logits, whole.logits, rtol=1e-4, atol=1e-4)


def test_sequences_that_were_swapped_out_answer_alike_on_two_ranks(
    checkpoint: Callable[..., Path], ranks: Ranks
) -> None:
    setting = Setting(checkpoint("Llama"), prompts(211)[:3], new_tokens=40)
    split, _ = ranks.run(serve, 2, replace(setting, kv_bytes=11 * BLOCK_BYTES // 2, swap_bytes=99 * BLOCK_BYTES))
    assert split.swapped > 0
    assert split.tokens == alone(setting).tokens


def test_bfloat16_stays_near_what_one_rank_computes(checkpoint: Callable[..., Path], ranks: Ranks) -> None:
    setting = Setting(checkpoint("Llama"), prompts(211), new_tokens=1, dtype=torch.bfloat16)
    split, _ = ranks.run(serve, 2, setting)
    whole = alone(setting)
    off = (split.logits.float() - whole.logits.float()).abs().mean() / whole.logits.float().std()
    print(f"off by {off:.2%} of the spread")
    assert off < 0.03


@pytest.mark.parametrize(
    ("size", "fields", "words"),
    [
        (3, {}, "4 heads do not split evenly over 3 ranks"),
        (4, {"intermediate_size": 98}, "98 feed-forward columns do not split"),
        (4, {"num_heads": 12, "num_kv_heads": 6}, "6 KV heads neither split nor repeat evenly"),
    ],
)
def test_a_model_that_does_not_split_is_refused(
    size: int, fields: dict[str, int], words: str, checkpoint: Callable[..., Path]
) -> None:
    config = replace(ModelConfig.from_dir(checkpoint("Llama")), **fields)  # type: ignore[arg-type]
    Shard(0, 1).check(config)
    with pytest.raises(ValueError, match=words):
        Shard(1, size).check(config)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vocab_size", [1, 5, 211, 4096])
def test_the_parts_of_a_vocabulary_are_equal_and_make_up_the_whole(size: int, vocab_size: int) -> None:
    parts = [Shard(rank, size).split_padded(vocab_size) for rank in range(size)]
    assert len({part.kept for part in parts}) == 1
    assert [token for part in parts for token in range(vocab_size)[part.there]] == list(range(vocab_size))
