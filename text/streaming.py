"""One answer's tokens to the text its reader gets: detokeniser and stop strings together."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .detokenizer import IncrementalDetokenizer
from .stops import StopStrings
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What some tokens added to an answer."""

    text: str  # certain: nothing of it is taken back
    num_tokens: int  # how many of the tokens belong to the answer; the rest came after its end
    stop: str | int | None = None  # the stop string or stop token that ended it

    @property
    def stopped(self) -> bool:
        return self.stop is not None


class AnswerText:
    """Text of one answer, as its tokens come. Neither a stop string nor a stop token is part of the text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        skip_special: bool = True,
    ) -> None:
        """`stop_token_ids`: ends of sequence among them, unless they are ignored."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
        self._stops = StopStrings(stops)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._ended_by: str | int | None = None

    @property
    def ended_by(self) -> str | int | None:
        """The stop string or stop token that ended the answer; None while nothing did."""
        return self._ended_by

    def push(self, token_ids: Sequence[int]) -> AnswerPart:
        """Take the next tokens. After the end nothing has text and no token counts."""
        if self._ended_by is not None:
            return AnswerPart("", 0, self._ended_by)
        texts: list[str] = []
        for count, token in enumerate(token_ids, start=1):
            if token in self._stop_token_ids:
                texts.append(self._finish())
                # A stop string that the last held text completed came first.
                self._ended_by = token if self._ended_by is None else self._ended_by
            else:
                text, self._ended_by = self._stops.push(self._detokenizer.push((token,)))
                texts.append(text)
            if self._ended_by is not None:
                return AnswerPart("".join(texts), count, self._ended_by)
        return AnswerPart("".join(texts), len(token_ids))

    def flush(self) -> AnswerPart:
        """The answer ended by its length or otherwise: the text that was held back, up to a stop string if one is in
        it."""
        if self._ended_by is not None:
            return AnswerPart("", 0, self._ended_by)
        return AnswerPart(self._finish(), 0, self._ended_by)

    def _finish(self) -> str:
        text, self._ended_by = self._stops.push(self._detokenizer.flush())
        return text if self._ended_by is not None else text + self._stops.flush()
