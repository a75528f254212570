"""Continuous batching: sequences join and leave between steps, and one step is planned while another runs.

    batch = ContinuousBatch(engine, policy("fcfs"))
    batch.add(seq, now)                                # waits for its turn: see residents.py for what becomes of it
    while (result := batch.step(now)) is not None:     # a forward pass, if any can run, and what the one before chose
        ...

The order within one call of `step`, with look-ahead:

    start who waits | plan n+1 | launch forward n+1 | take in the tokens of n | launch sampling n+1

So the device has step n+1 before the host waits for the tokens of n, and what sampling n+1 needs to know of them
(counts for penalties, a grammar's mask) is there in time. A sequence that is found to have ended with n has one slot of
n+1 too many: what it gives is dropped, and its blocks come back when n+1 no longer writes them.
"""

from collections.abc import Iterable, Mapping
from time import perf_counter

import torch

from ..core.errors import ModelFault
from ..core.frames import Holder
from ..core.ids import BlockId, SequenceId
from .device_clock import DeviceClock
from .engine import Engine
from .flight import Flight, build_step
from .holdings import Holdings
from .members import Goal, Member
from .policies import Policy
from .pool_report import PoolReport, pool_report
from .preemption import Preemption, PreemptionCounts
from .residents import Residents
from .rows import Rows
from .sampler import NO_TOKEN, Sampled
from .sampling_stage import SamplingStage
from .scheduler import Ranking, Snapshot, Stake, StepPlan, plan_step
from .sequence import Sequence
from .step_result import Chosen, StepResult, StepStats
from .swap import SwapSpace
from .waiting import Turns

_MIN_CHUNK_TOKENS = 16  # of prompts in a step, however many sequences decode: prompts always go on


class ContinuousBatch:
    """One thread owns it. No block moves between holders but through its engine's ledger."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        *,
        step_tokens: int = 512,
        swap_bytes: int = 0,
        lookahead: bool | None = None,
    ) -> None:
        """step_tokens: of one step at most, as far as decoding sequences leave some. swap_bytes: host memory for the KV
        of preempted sequences. lookahead: plan a step while another runs; None: on a GPU, where the two overlap."""
        pools = [pool.view(len(pool), -1).view(torch.uint8) for pool in engine.rank_pools]
        block_bytes = sum(pool.shape[1] for pool in pools)
        slots = swap_bytes // block_bytes
        self._engine = engine
        self._holdings = Holdings(engine.ledger, engine.prefix_cache, engine.geometry.block_tokens)
        self._preemption = Preemption(self._holdings, SwapSpace(slots, pools) if slots else None, block_bytes)
        self._turns = Turns(policy)
        self._rows = Rows(engine.max_batch, self._holdings.blocks_for(engine.max_model_len))
        self._sampling = SamplingStage(engine)
        self._residents = Residents(engine, self._rows, self._holdings, self._preemption, self._sampling, self._turns)
        self._step_tokens = step_tokens
        self._lookahead = engine.device.type == "cuda" if lookahead is None else lookahead
        self._clock = DeviceClock(engine.device)
        self._launched = False  # by the last call
        self._flight: Flight | None = None
        self._rows_starve = False  # rows had something to compute, and none had its blocks

    # Who comes and goes

    def add(self, seq: Sequence, now: float = 0.0, goal: Goal = Goal.ANSWER, spare: int = 0) -> None:
        """A new sequence waits for its turn. spare: blocks that must stay available when it starts."""
        self._residents.add(Member(seq, goal, now, spare=spare))

    def urge(self, seq: Sequence) -> None:
        """It need spare no blocks any more: somebody waits for what it computes."""
        member = self._residents.get(seq)
        if member is not None and member.spare:
            member.spare = 0
            self._residents.waiting.stir()

    def landed(self, seq: Sequence, first_token: int, *, exact: bool = True) -> None:
        """The KV of a reserved sequence's prompt is in its blocks, which it holds itself again. Where it is not exactly
        what this engine would have computed, no other sequence is to find it."""
        self._residents.landed(seq, first_token, exact=exact)

    def remove(self, seq: Sequence) -> None:
        """Whatever state it is in: it ends, and every block comes back. Of a sequence that is not here: nothing."""
        member = self._residents.get(seq)
        if member is not None:
            self._residents.leave(member)

    # One step

    @torch.inference_mode()
    def step(self, now: float) -> StepResult | None:
        """Take in what has finished, and run one step, or make room for one. None: nothing was there to do."""
        begin = perf_counter()
        result = StepResult(started=self._residents.start(now))
        plan = self._plan(now)
        flight = self._launch(plan) if len(plan.decode) or plan.chunks else None
        self._launched = flight is not None
        launched = perf_counter()
        before, self._flight = self._flight, flight
        if before is not None:
            self._collect(before, result)
        collected = perf_counter()
        if flight is not None:
            self._sampling.launch(flight)
            self._clock.end()
        result.device = self._clock.read()
        sampled = perf_counter()
        if flight is not None and not self._lookahead:
            self._flight = None
            self._collect(flight, result)
        if before is None and flight is None and not (result.started or plan.preempt):
            return result if self._unpin() else None
        if flight is not None:
            result.stats = StepStats(
                sequences=flight.num_sequences,
                prefill_tokens=flight.chunk_tokens,
                decode_tokens=len(flight.decode_rows),
                plan_s=flight.launched_at - begin,
                forward_s=launched - flight.launched_at,
                collect_s=collected - launched + perf_counter() - sampled,
                sample_s=sampled - collected,
            )
        return result

    def _unpin(self) -> bool:
        """Pins last as long as there is room beside them: where nothing runs for want of blocks, the oldest goes."""
        residents = self._residents
        starved = (self._rows_starve or residents.lacks_blocks) and not residents.blocks_may_come
        if not (starved and self._engine.prefix_cache.unpin_oldest()):
            return False
        residents.waiting.stir()
        return True

    # What is there

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._residents.running

    @property
    def waiting(self) -> int:
        """Sequences that have no place in it yet."""
        return self._residents.seatless

    @property
    def preemptions(self) -> PreemptionCounts:
        return self._preemption.counts

    def tokens_ahead(self) -> int:
        """Prompt tokens still to be computed here."""
        return self._residents.waiting.tokens + self._rows.tokens_ahead()

    def unused_slots(self) -> int:
        """Places for tokens in blocks of running sequences that hold none; costs little, where `report` tells all."""
        return self._rows.unused_slots(self._engine.geometry.block_tokens)

    def holders(self) -> Iterable[Holder]:
        """Who holds blocks, but for reserved sequences: these are whoever's lands them."""
        yield from self._residents.holders()
        if self._flight is not None and self._flight.copied:
            yield Holder(sequence_id=SequenceId(""), state="copied", block_ids=self._flight.copied)

    def report(self) -> PoolReport:
        """How well the pool is used now."""
        engine = self._engine
        uses = [(use.sequence_id, use.block_ids, use.tokens) for use in self.holders() if use.sequence_id]
        return pool_report(engine.ledger, engine.geometry.block_tokens, uses, engine.prefix_cache.pins())

    # Planning

    def _plan(self, now: float) -> StepPlan:
        rows, block_tokens = self._rows, self._engine.geometry.block_tokens
        running, lacking, chunked = rows.runnable()
        snapshot = Snapshot(
            rows=running,
            lacking=lacking,
            blocks_needed=rows.blocks_needed(running, block_tokens),
            chunked=chunked,
            available=self._engine.ledger.available,
            step_tokens=self._step_tokens,
            min_chunk_tokens=_MIN_CHUNK_TOKENS,
        )
        members: dict[int, Member] = {}

        def rank() -> Ranking:
            members.update(self._residents.preemptible())
            return self._ranking(members, now)

        plan = plan_step(snapshot, rank)
        self._rows_starve = len(running) > 0 and not (len(plan.decode) or plan.chunks)
        for handle in plan.preempt:
            self._residents.preempt(members[handle])
        return plan

    def _ranking(self, members: Mapping[int, Member], now: float) -> Ranking:
        handles = {member: handle for handle, member in members.items()}
        stakes = {handle: Stake(one.seq.blocks, self._residents.is_flying(one)) for handle, one in members.items()}
        going = self._residents.going()
        if self._flight is not None:
            going.append(self._flight.copied)
        holders = self._engine.ledger.holders
        blocks = {block for held in (*going, *(stake.blocks for stake in stakes.values())) for block in held}
        return Ranking(
            rows=[handles[one] for one in self._residents.ranked(now) if one in handles],
            stakes=stakes,
            going=going,
            holders={block: holders(block) for block in blocks},
        )

    # Launching

    def _launch(self, plan: StepPlan) -> Flight:
        waiting = self._residents.waiting.tenants  # while nobody waits nobody owes anything: also what was is forgiven
        alone = self._residents.num_tenants <= 1 and self._turns.even  # and stays even, whatever it is served
        if (plan.chunks or waiting or not self._turns.even) and not alone:
            self._turns.charge(self._rows.costs(plan.decode, plan.chunks), waiting.keys())
        copies = self._make_room(plan)
        step, flight = build_step(plan, self._rows, copies, self._engine.geometry.block_tokens, perf_counter())
        flight.copied = [source for source, _ in copies]
        self._clock.begin(follows=self._launched)
        flight.logits = self._engine.executor.forward(step)
        return flight

    def _make_room(self, plan: StepPlan) -> list[tuple[BlockId, BlockId]]:
        """Blocks for what the step writes; gives what has to be copied first."""
        rows, block_tokens = self._rows, self._engine.geometry.block_tokens
        copies: list[tuple[BlockId, BlockId]] = []
        if rows.borrowers:
            taking = {*plan.decode.tolist(), *(row for row, _ in plan.chunks)}
            for row in sorted(rows.borrowers & taking):
                seq = rows.sequence(row)
                copy = self._holdings.own_last_block(seq)
                if copy is not None:
                    copies.append(copy)
                    rows.replace_block(row, len(seq.blocks) - 1, copy[1])
                rows.borrowers.remove(row)
        growing = plan.decode[rows.blocks_needed(plan.decode, block_tokens) > 0]  # nobody of the step borrows any more
        if len(growing):
            rows.add_block_each(growing, self._holdings.grow(rows.sequences_of(growing)))
        return copies

    # Taking in

    def _collect(self, flight: Flight, result: StepResult) -> None:
        """What a step has computed and chosen. On a GPU this waits for it."""
        chosen = self._sampling.take(flight)
        self._rows.collect()
        if flight.copied:
            self._holdings.copied(flight.copied)
            self._residents.waiting.stir()
        self._advance(flight, result)
        self._take_tokens(flight, chosen, result)
        self._residents.step_is_over()

    def _advance(self, flight: Flight, result: StepResult) -> None:
        rows, ends = self._rows, flight.decode_ends
        rows.computed[flight.decode_rows] = ends
        for index in (ends % self._engine.geometry.block_tokens == 0).nonzero()[0].tolist():
            row = int(flight.decode_rows[index])
            if rows.live[row] and self._holdings.advance(rows.sequence(row), int(ends[index])):
                self._residents.waiting.stir()
        if not flight.chunk_tokens:
            return
        for row, end in zip(flight.chunk_rows.tolist(), flight.chunk_ends.tolist(), strict=True):
            rows.computed[row] = end
            if rows.live[row]:
                seq = rows.sequence(row)
                self._holdings.advance(seq, end)
                result.advanced.append(seq)
        self._preemption.computed(flight.chunk_tokens, perf_counter() - flight.launched_at)
        self._residents.waiting.stir()

    def _take_tokens(self, flight: Flight, sampled: Sampled, result: StepResult) -> None:
        rows = self._rows
        taken, ids, lengths = flight.sampled_rows, sampled.token_ids, flight.lengths
        positions, logprobs = flight.positions, sampled.logprobs
        if self._residents.some_leave or not sampled.complete:
            if not sampled.complete:
                self._fail(flight, sampled, result)
            at = (rows.live[taken] & (ids != NO_TOKEN)).nonzero()[0]
            taken, positions, ids, lengths = taken[at], positions[at], ids[at], lengths[at]
            logprobs = {place: logprobs[index] for place, index in enumerate(at.tolist()) if index in logprobs}
        sequences = rows.sequences_of(taken)
        for seq, token in zip(sequences, ids.tolist(), strict=True):
            seq.tokens.append(token)
        self._sampling.settle(taken, ids)
        result.tokens = Chosen(sequences, ids, positions, rows.tag[taken], logprobs)
        over = (rows.stops[taken] == ids[:, None]).any(1) | (lengths == rows.limit[taken])
        for index in over.nonzero()[0].tolist():
            self._finish(self._residents.of(sequences[index]), result)

    def _finish(self, member: Member, result: StepResult) -> None:
        """Its last token is there: of the answer, or of what was asked of this batch."""
        reason = member.seq.end_reason()
        if reason is None:
            self._residents.finish(member)
            return
        self._turns.ended(member)
        self._residents.leave(member)
        result.ended.append((member.seq, reason))

    def _fail(self, flight: Flight, sampled: Sampled, result: StepResult) -> None:
        """End those whose logits gave no token."""
        for row, token in zip(flight.sampled_rows.tolist(), sampled.token_ids.tolist(), strict=True):
            if token == NO_TOKEN and self._rows.live[row]:
                seq = self._rows.sequence(row)
                self._holdings.distrust(seq)
                self._residents.leave(self._residents.of(seq))
                result.ended.append((seq, ModelFault("the model computed logits that are not numbers")))
