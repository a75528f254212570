"""What is asked: prompts and how many tokens each answer has. Seeds are fixed, so every run asks the same."""

from dataclasses import dataclass

import numpy as np

MEAN = 128  # tokens of a prompt and of an answer
MOST = 1024
_SIGMA = 0.9  # of the lognormal: the longest of 64 answers is then five or six times the mean
_FIRST_ID = 300  # below are special tokens


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    new_tokens: int  # exactly: no end of sequence is looked at


@dataclass(frozen=True)
class Workload:
    """Waves of jobs, one wave after the other. All jobs of a wave are there at its start."""

    name: str
    waves: tuple[tuple[Job, ...], ...]

    @property
    def width(self) -> int:
        """Jobs at once, at most."""
        return max(map(len, self.waves))

    @property
    def new_tokens(self) -> int:
        return sum(job.new_tokens for wave in self.waves for job in wave)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer, of the job with the most."""
        return max(len(job.prompt) + job.new_tokens for wave in self.waves for job in wave)


class Dice:
    """Makes jobs for one vocabulary."""

    def __init__(self, vocab_size: int, seed: int = 7) -> None:
        self._random = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def lengths(self, count: int, most: int = MOST) -> list[int]:
        """Lognormal with mean MEAN, at least 1, at most `most`."""
        drawn = self._random.lognormal(np.log(MEAN) - _SIGMA**2 / 2, _SIGMA, count)
        return np.clip(drawn.round(), 1, most).astype(int).tolist()

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.integers(_FIRST_ID, self._vocab_size, length).tolist())

    def jobs(self, prompts: list[int], answers: list[int]) -> tuple[Job, ...]:
        return tuple(Job(self.prompt(prompt), new) for prompt, new in zip(prompts, answers, strict=True))


def served(vocab_size: int, widths: tuple[int, ...], most: int = MOST) -> list[Workload]:
    """For each width: lengths drawn ("spread") and all the same ("equal"). Width 1 is eight jobs, one by one."""
    dice, made = Dice(vocab_size), []
    for width in widths:
        count = max(width, 8)
        for kind in ("spread", "equal"):
            prompts, answers = (
                dice.lengths(count, most) if kind == "spread" else [min(MEAN, most)] * count for _ in "pa"
            )
            jobs = dice.jobs(prompts, answers)
            waves = tuple(jobs[at : at + width] for at in range(0, count, width))
            made.append(Workload(f"{width} {kind}", waves))
    return made
