"""A server with one place: each round the first in a policy's order has it, and loses its KV when another is first."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from baton.core.ids import SequenceId
from baton.engine.accounts import Accounts, cost
from baton.engine.policies import Candidate, Policy

CHUNK = 8  # prompt tokens that a round computes; or one token of an answer
CROWD = 5  # sequences that are let in at once
PROMPT, ANSWER = 16, 6  # tokens at most

LARGEST_COST = cost(PROMPT, ANSWER)
ALONE = -(-PROMPT // CHUNK) + ANSWER  # rounds of the largest, undisturbed
AGAIN = -(-(PROMPT + ANSWER) // CHUNK)  # rounds to compute what a preemption has lost

Charge = Callable[[Accounts, dict[str, float], set[str]], Accounts]


@dataclass(slots=True)
class Job:
    sequence_id: SequenceId
    arrived: int  # the round
    priority: int
    tenant: str
    prompt: int
    answer: int
    predicted: int  # said of the answer throughout, right or wrong
    done: int = 0  # tokens of prompt and answer, each counted once
    computed: int = 0  # of them have KV now

    @property
    def known(self) -> int:
        return max(self.prompt, self.done)

    @property
    def ended(self) -> bool:
        return self.done == self.prompt + self.answer

    def candidate(self) -> Candidate:
        return Candidate(
            sequence_id=self.sequence_id,
            arrived=float(self.arrived),
            priority=self.priority,
            tenant=self.tenant,
            tokens_ahead=self.known - self.computed,
            predicted_tokens=self.predicted,
        )

    def run(self) -> int:
        """One round; the cost of what was never computed before."""
        before, lacking = self.done, self.known - self.computed
        self.computed += min(lacking, CHUNK) if lacking else 1
        self.done = max(self.done, self.computed)
        return cost(self.done - before, 0) if before < self.prompt else cost(0, self.done - before)


class OnePlace:
    """Time is in rounds. Tenants named "" are new ones each."""

    def __init__(
        self, policy: Policy, accounts: Accounts, *, preempts: bool = True, charge: Charge = Accounts.charged
    ) -> None:
        self.policy = policy
        self.accounts = accounts
        self.preempts = preempts
        self.charge = charge
        self.round = 0
        self.jobs: dict[SequenceId, Job] = {}
        self.running: Job | None = None
        self.served: dict[str, float] = {}  # cost, by tenant
        self._count = 0

    def arrive(self, job: Job) -> Job | None:
        """None when the place is crowded."""
        if len(self.jobs) == CROWD:
            return None
        self._count += 1
        name = SequenceId(f"{self._count:05}")
        job = replace(job, sequence_id=name, arrived=self.round, tenant=job.tenant or f"new {name}")
        self.jobs[name] = job
        return job

    def step(self, arrivals: Iterable[Job] = ()) -> None:
        for job in arrivals:
            self.arrive(job)
        self.round += 1
        if not self.jobs:
            return
        chosen = self.running
        if chosen is None or self.preempts:
            candidates = [job.candidate() for job in self.jobs.values()]
            chosen = self.jobs[self.policy.order(candidates, float(self.round), self.accounts)[0]]
        if self.running is not None and self.running is not chosen:
            self.running.computed = 0
        charge = chosen.run()
        self.served[chosen.tenant] = self.served.get(chosen.tenant, 0) + charge
        waiting = {job.tenant for job in self.jobs.values() if job is not chosen}
        self.accounts = self.charge(self.accounts, {chosen.tenant: charge}, waiting)
        if chosen.ended:
            del self.jobs[chosen.sequence_id]
        self.running = None if chosen.ended else chosen
