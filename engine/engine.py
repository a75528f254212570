"""The engine: one model on one device, as the workers use it.

    engine = Engine.build(model_dir, torch.bfloat16, torch.device("cpu"), kv_bytes=1 << 28)
    seq = Sequence(SequenceId("r/0"), prompt, Sampling(max_tokens=20, temperature=0.0))
    cached = engine.start(seq, hold_tokens=seq.max_length)      # raises OutOfBlocks, nothing changed
    while seq.remaining > 1:                                     # the prompt, in chunks
        result = engine.step([(seq, min(512, seq.remaining))], [])
    while seq.end_reason() is None:                              # one token of every running sequence
        result = engine.step([], [seq])
    engine.finish(seq)                                           # every block back; twice is as good as once

A prefill worker holds the prompt alone (`hold_tokens=len(seq.prompt)`), reads what `step` computed from
`engine.kv_cache.block_bytes_view[seq.blocks[i]]`, and adds holders to lent blocks with `engine.ledger.hold`. A decode
worker starts with `engine.start(seq, seq.max_length, whole_prompt=True)`: blocks `seq.computed // block_tokens` and on
of the prompt are the ones it lacks. When their bytes are in place: `engine.commit(seq, len(seq.prompt))`,
`seq.append(first_token)`, and the sequence may be stepped. There is no queue and no policy here: the worker's scheduler
says what is in a step.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.request import TokenLogprobs
from ..core.tickets import Geometry
from ..kernels.build import BuildError, cuda_library
from .batch import BatchBuilder
from .kv_cache import KvCache, num_blocks_for
from .ledger import Ledger, OutOfBlocks
from .models import Model, ModelConfig, load_model
from .prefix_cache import PrefixCache
from .runner import Runner
from .sampler import SamplingRows, sample
from .sequence import Sequence

__all__ = ["Engine", "OutOfBlocks", "StepResult", "StepStats", "StepToken"]

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True, slots=True)
class StepToken:
    """A token that a step chose; it is appended to its sequence already."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class StepStats:
    prefill_tokens: int
    decode_tokens: int
    batch_s: float  # making the input
    forward_s: float
    sample_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    tokens: tuple[StepToken, ...]  # of decode rows, in order, then of the prompts that are complete
    stats: StepStats


class Engine:
    """One thread owns it. Blocks move between holders through `ledger` alone."""

    def __init__(self, model: Model, kv_cache: KvCache, max_model_len: int, max_batch: int) -> None:
        self.config: ModelConfig = model.config
        self.kv_cache = kv_cache
        self.geometry: Geometry = kv_cache.geometry
        self.ledger = Ledger(kv_cache.num_blocks)
        self.prefix_cache = PrefixCache(self.ledger, self.geometry.block_tokens, self.geometry.fingerprint)
        self.max_model_len = max_model_len
        self.max_batch = max_batch
        self._device = model.device
        self._runner = Runner(model, kv_cache)
        self._builder = BatchBuilder(kv_cache.pool, frozenset(model.config.windows))

    @classmethod
    def build(
        cls,
        model_dir: Path,
        dtype: torch.dtype,
        device: torch.device,
        kv_bytes: int,
        block_tokens: int = 16,
        max_model_len: int | None = None,
        max_batch: int = 256,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Engine":
        """Load a model directory and make its pool.

        max_model_len: tokens of prompt and answer; None: what the model's configuration says. threads: of torch on the
        CPU, for the whole process; None: as they are. progress: called with (bytes read, bytes in all). Raises
        ValueError where the checkpoint can't be served or kv_bytes hold no block, BuildError where nvcc fails.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # float32 is float32: no TF32, whatever the environment asks for
        try:
            cuda_library(device)  # compiled now if it must be, not in the first request's step
        except BuildError as error:
            raise ValueError(str(error)) from error
        config = ModelConfig.from_dir(model_dir)
        length = max_model_len or config.max_position_embeddings
        if length > config.max_position_embeddings:
            raise ValueError(f"max_model_len {length} is beyond the model's {config.max_position_embeddings} positions")
        geometry = Geometry(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            block_tokens=block_tokens,
            dtype=_DTYPE_NAMES[dtype],
            fingerprint=config.kv_fingerprint(dtype),
        )
        num_blocks = num_blocks_for(kv_bytes, geometry)
        with torch.inference_mode():
            model = load_model(model_dir, config, dtype, device, progress, num_positions=length)
            return cls(model, KvCache(num_blocks, geometry, device), length, max_batch)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of so many tokens."""
        return -(-tokens // self.geometry.block_tokens)

    def start(self, seq: Sequence, hold_tokens: int, whole_prompt: bool = False) -> int:
        """Give a new sequence the cached beginning of its prompt and blocks for `hold_tokens` tokens in all.

        Returns how many tokens are computed already: all but one of the prompt at most, or, with whole_prompt, all of
        it. Raises OutOfBlocks, with nothing changed.
        """
        assert not seq.blocks, f"{seq.sequence_id} was started already"
        limit = len(seq.prompt) if whole_prompt else len(seq.prompt) - 1
        known, computed = self.prefix_cache.match(seq.prompt, seq.salt, limit)
        try:
            fresh = self.ledger.allocate(self.blocks_for(hold_tokens) - len(known))
        except OutOfBlocks:
            self.ledger.release(reversed(known))
            raise
        seq.give(known + fresh)
        seq.computed = computed
        return computed

    def commit(self, seq: Sequence, computed: int) -> None:
        """The KV of the first `computed` tokens is in the blocks; full ones become known to the prefix cache."""
        seq.computed = computed
        if computed // self.geometry.block_tokens > len(seq.keys):
            known = len(seq.keys)
            fresh = seq.ids[known * self.geometry.block_tokens : computed].tolist()
            parent = seq.keys[-1] if known else None
            seq.keys += self.prefix_cache.insert(fresh, seq.blocks[known:], parent, seq.salt)

    def finish(self, seq: Sequence) -> None:
        """Take all blocks of a sequence back; the known ones stay cached. Again: nothing."""
        self.ledger.release(reversed(seq.take_blocks()))

    def step(self, prefill: Seq[tuple[Sequence, int]], decode: Seq[Sequence]) -> StepResult:
        """One forward pass: the next n tokens of each (sequence, n), and the one open token of each decoding sequence.

        A sequence whose known tokens are all computed then gets its next one. Every sequence has blocks for its tokens.
        """
        assert all(0 < count <= seq.remaining for seq, count in prefill), "a chunk goes beyond its sequence"
        assert all(seq.remaining == 1 for seq in decode), "a decoding sequence lacks more than one token"
        begin = time.perf_counter()
        batch = self._builder.build(prefill, decode)
        built = time.perf_counter()
        logits = self._runner.forward(batch)
        forwarded = time.perf_counter()
        for seq in decode:
            self.commit(seq, seq.computed + 1)
        for seq, count in prefill:
            self.commit(seq, seq.computed + count)
        asking = [*decode, *(seq for seq, _ in prefill if seq.remaining == 0)]
        tokens: tuple[StepToken, ...] = ()
        if asking:
            rows = SamplingRows.of([seq.sampling for seq in asking], self.config.vocab_size, self._device)
            sampled = sample(logits, rows, [len(seq.tokens) for seq in asking], [seq.edits for seq in asking])
            tokens = tuple(map(StepToken, asking, sampled.token_ids, sampled.logprobs))
            for step_token in tokens:
                step_token.sequence.append(step_token.token)
        end = time.perf_counter()
        prefill_tokens = sum(count for _, count in prefill)
        stats = StepStats(prefill_tokens, len(decode), built - begin, forwarded - built, end - forwarded)
        return StepResult(tokens, stats)
