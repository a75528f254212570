"""What the ranks of a worker do together: rank 0 leads, the others carry out what it does.

leader    put the step -> forward -> sample -> broadcast the tokens -> accept
follower  take the step -> forward           -> receive the tokens  -> accept
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..step_input import StepInput
from .communicator import Communicator
from .plan_channel import PlanReader, PlanWriter


class StepExecutor(Protocol):
    """Carries steps out on one rank's device."""

    def forward(self, step: StepInput) -> Tensor:
        """Logits of the tokens that are wanted; an empty tensor on other ranks than 0."""

    def accept(self, token_ids: Tensor) -> None:
        """What was sampled for the last step's `sampled_rows`.    token_ids [S'] i64, on the device."""


@dataclass(frozen=True, slots=True)
class Followers:
    """How rank 0 reaches the others."""

    communicator: Communicator
    plans: PlanWriter


class Leader:
    """Rank 0's executor: what it does, the others do too."""

    def __init__(self, executor: StepExecutor, followers: Followers) -> None:
        self._executor = executor
        self._plans = followers.plans
        self._communicator = followers.communicator

    def forward(self, step: StepInput) -> Tensor:
        """Every step with `sampled_rows` is followed by one `accept` before the next step. Raises RankLost."""
        self._plans.put(step)
        return self._executor.forward(step)

    def accept(self, token_ids: Tensor) -> None:
        self._executor.accept(self._communicator.broadcast(token_ids))


class Follower:
    """Another rank."""

    def __init__(
        self, executor: StepExecutor, plans: PlanReader, communicator: Communicator, device: torch.device
    ) -> None:
        self._executor = executor
        self._plans = plans
        self._communicator = communicator
        self._device = device

    @torch.inference_mode()
    def run(self) -> None:
        """Until rank 0 says that there are no more steps. Raises RankLost when a rank has died."""
        while (step := self._plans.take()) is not None:
            self._executor.forward(step)
            if len(step.sampled_rows):
                token_ids = torch.empty(len(step.sampled_rows), dtype=torch.int64, device=self._device)
                self._executor.accept(self._communicator.broadcast(token_ids))
