"""Tables, targets and charts of what was measured."""

from dataclasses import dataclass
from pathlib import Path

from .chart import Panel, write_chart
from .measure import Result
from .shared_prompt import Shared
from .sides import Baton, ContinuousBatches, StaticBatches


@dataclass(frozen=True)
class Target:
    name: str
    least: float
    found: float

    @property
    def met(self) -> bool:
        return self.found >= self.least


def targets(results: list[Result], shared: list[Shared]) -> list[Target]:
    rates = {(one.workload, one.side): one.tokens_per_s for one in results}

    def ratio(work: str, peer: str) -> float:
        return rates[work, Baton.name] / rates[work, peer]

    made = [
        Target(f"{work}: {Baton.name} / {peer}, tok/s", least, ratio(work, peer))
        for work, peer, least in (
            ("1 spread", StaticBatches.name, 1.2),
            ("1 spread", ContinuousBatches.name, 1.2),
            ("64 spread", StaticBatches.name, 3.0),
            ("64 spread", ContinuousBatches.name, 1.0),
        )
        if (work, peer) in rates
    ]
    return made + [
        Target(f"{one.prompt_tokens} tokens, 90 % shared: first token sooner", 5.0, one.times) for one in shared
    ]


def print_results(results: list[Result], head: bool = True) -> None:
    if head:
        first, between = (f"{what} p50/p95/p99 ms" for what in ("first", "next"))
        print(f"\n{'jobs':<10}{'side':<26}{'threads':>8}{'batch':>6}{'tok/s':>8}{first:>26}{between:>26}")
    for one in results:
        first, between = (
            f"{spread.p50:.1f}/{spread.p95:.1f}/{spread.p99:.1f}" for spread in (one.first_token_ms, one.inter_token_ms)
        )
        print(
            f"{one.workload:<10}{one.side:<26}{one.threads:>8}{one.batch or '-':>6}{one.tokens_per_s:>8.0f}"
            f"{first:>26}{between:>26}",
            flush=True,
        )


def print_shared(shared: list[Shared]) -> None:
    print(f"\n{'prompt':>7}{'cached':>8}{'threads':>8}{'without ms':>12}{'with ms':>9}{'times':>7}")
    for one in shared:
        print(
            f"{one.prompt_tokens:>7}{one.cached_tokens:>8}{one.threads:>8}{one.without_ms:>12.1f}{one.with_ms:>9.2f}"
            f"{one.times:>7.1f}"
        )


def print_targets(found: list[Target]) -> None:
    print()
    for one in found:
        print(f"{'pass' if one.met else 'FAIL'}  {one.name}: {one.found:.2f} (at least {one.least})")


def chart(path: Path, results: list[Result], about: str) -> None:
    sides = list(dict.fromkeys(one.side for one in results))
    at = {(one.workload, one.side): one for one in results}

    def panel(title: str, kind: str, number: str) -> Panel:
        names = [one for one in dict.fromkeys(result.workload for result in results) if one.endswith(kind)]
        values = {"rate": lambda one: one.tokens_per_s, "first": lambda one: one.first_token_ms.p50,
                  "next": lambda one: one.inter_token_ms.p99}[number]  # fmt: skip
        rows = tuple(tuple(values(at[name, side]) for name in names) for side in sides)
        return Panel(title, tuple(f"{name.split()[0]} at once" for name in names), rows)

    write_chart(
        path,
        f"Bundled model, {about}",
        sides,
        [
            panel("tokens/s, lognormal lengths", "spread", "rate"),
            panel("tokens/s, equal lengths", "equal", "rate"),
            panel("first token, median, ms (lognormal)", "spread", "first"),
            panel("between two tokens, p99, ms (lognormal)", "spread", "next"),
        ],
    )
