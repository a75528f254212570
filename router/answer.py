"""One answer: from what workers send to what a client reads, each token once and in order. No I/O, no clock.

    tokens by position, from two links, any of them twice        [0, next) given on | held | not here yet
      -> in order, exactly once -> detokenised -> cut at a stop string -> deltas

A second try at the answer starts again at position 0; sampling is keyed by position, so it repeats what was given on.
That is checked, token by token, and nothing of it is given on again.
"""

from collections.abc import Callable, Iterable, Sequence

from ..core.errors import WorkerLost
from ..core.request import FinishReason, PromptLogprob, Sampling, SequenceTokens, TokenLogprobs
from ..text.streaming import AnswerText
from .records import Delta, merge


class Answer:
    """The state of one answer. Holds back at most `max_tokens` tokens."""

    def __init__(
        self,
        sampling: Sampling,
        text: AnswerText,
        emit: Callable[[Delta], None],
        *,
        prompt: Sequence[int] = (),
        each_token: bool = False,
    ) -> None:
        """`prompt`: for its log probabilities, where they are asked for. `each_token`: a delta for each, so that a
        reader may begin after any of them."""
        self.finished: FinishReason | None = None
        self.cached_tokens = 0  # prompt tokens that prefill did not compute
        self._sampling = sampling
        self._text = text
        self._emit = emit
        self._prompt = prompt
        self._prompt_logprobs: tuple[PromptLogprob, ...] = ()  # until the first delta takes them
        self._each_token = each_token
        self._given: list[int] = []
        self._held: dict[int, tuple[int, TokenLogprobs | None]] = {}
        self._end: tuple[int, FinishReason] | None = None  # (number of tokens, why), once a worker has told

    @property
    def tokens(self) -> int:
        """How many were given on."""
        return len(self._given)

    def restart(self) -> None:
        """Other workers begin again."""
        self._held.clear()
        self._prompt_logprobs = ()
        self._end = None
        if not self._given:
            self.cached_tokens = 0

    def take(
        self, news: Iterable[SequenceTokens], end: FinishReason | None, plain: Iterable[tuple[int, int]] = ()
    ) -> None:
        """What one frame says of this answer, `plain` as (position, token); `end`: the last token that its worker ever
        sends is among them, or came before. Gives on what is now in order, as one delta.

        Raises WorkerLost when a worker contradicts what was given on, or ends before any token.
        """
        if self.finished:
            return
        for tokens in news:
            self._hold_all(tokens)
        for position, token in plain:
            self._hold(position, token, None)
        if end is not None:
            last = max(self._held, default=len(self._given) - 1)
            if last < 0:
                raise WorkerLost("a worker ended the answer before its first token")
            self._end = (last + 1, end)
        self._give()

    def finish(self, reason: FinishReason) -> None:
        """Ends the answer where it stands; does nothing when it has ended. Text that was held back is not given."""
        if self.finished is None:
            self.finished = reason
            self._emit(Delta(index=self._sampling.branch, finish=reason))

    def _hold_all(self, tokens: SequenceTokens) -> None:
        logprobs: tuple[TokenLogprobs | None, ...] = tokens.logprobs or (None,) * len(tokens.token_ids)
        if tokens.first_position == 0 and not self._given:
            self.cached_tokens = tokens.cached_tokens
            self._prompt_logprobs = self._of_prompt(tokens.prompt_logprobs)
        for position, (token, entry) in enumerate(zip(tokens.token_ids, logprobs, strict=True), tokens.first_position):
            self._hold(position, token, entry)

    def _hold(self, position: int, token: int, entry: TokenLogprobs | None) -> None:
        if position < len(self._given):
            if self._given[position] != token:
                raise WorkerLost("a worker was lost, and another could not continue its answer exactly")
        elif position < self._sampling.max_tokens:
            self._held.setdefault(position, (token, entry))

    def _of_prompt(self, entries: tuple[TokenLogprobs | None, ...]) -> tuple[PromptLogprob, ...]:
        if self._sampling.prompt_logprobs is None or not entries:
            return ()
        if len(entries) != len(self._prompt):
            raise WorkerLost("a worker gave log probabilities of another prompt")
        return tuple(
            PromptLogprob(token_id=token, logprob=None)
            if entry is None
            else PromptLogprob(token_id=token, logprob=entry.logprob, top=entry.top)
            for token, entry in zip(self._prompt, entries, strict=True)
        )

    def _give(self) -> None:
        parts: list[Delta] = []
        index = self._sampling.branch
        while self.finished is None and (held := self._held.pop(len(self._given), None)) is not None:
            token, entry = held
            self._given.append(token)
            logprobs = () if self._sampling.logprobs is None or entry is None else (entry,)
            part = self._text.push((token,))
            of_prompt, self._prompt_logprobs = self._prompt_logprobs, ()
            parts.append(
                Delta(index=index, text=part.text, token_ids=(token,), logprobs=logprobs, prompt_logprobs=of_prompt)
            )
            if part.stopped:
                self.finished = FinishReason.STOP
            elif len(self._given) == self._sampling.max_tokens:
                self.finished = FinishReason.LENGTH
        if self.finished is None and self._end is not None and len(self._given) >= self._end[0]:
            self.finished = self._end[1]
        if self.finished:
            rest = self._text.flush()
            self.finished = FinishReason.STOP if rest.stopped else self.finished
            parts.append(Delta(index=index, text=rest.text, finish=self.finished))
        for delta in parts if self._each_token else merge(parts):
            self._emit(delta)
