"""One try at one answer on a pair of workers: admit on both, hand over, take the tokens, release both.

    prefill   admit ........ token 0, end HANDED_OVER | STOP | LENGTH
    decode    admit . ticket ................ tokens 1.., end STOP | LENGTH

Or on one worker that is both, which has the place of prefill:

    both      admit ........ token 0, tokens 1.., end STOP | LENGTH

Frames come by call, not by queue: between a frame and the client's log there is no task to wake.
"""

import asyncio
from dataclasses import replace

from ..core.errors import BatonError, WorkerLost, from_code
from ..core.ids import SequenceId
from ..core.request import EndReason, FinishReason, Request
from .answer import Answer
from .workers import News, Seats

_FINISHED = {EndReason.STOP: FinishReason.STOP, EndReason.LENGTH: FinishReason.LENGTH}


class Attempt:
    def __init__(self, answer: Answer, seats: Seats) -> None:
        self._answer = answer
        self._seats = seats
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handed_over = False  # decode has all of the KV: what becomes of prefill matters no more

    async def run(self, request: Request) -> None:
        """Until the answer has finished. Raises what ended it before; the caller's deadline bounds the wait. Every
        way out of it releases both seats."""
        try:
            self._answer.restart()
            if self._seats.decode is not None:
                self._seats.decode.admit(request, self._on_decode)
            self._seats.prefill.admit(request, self._on_prefill)
            await self._done
        finally:
            self._seats.release()
            if self._done.done() and not self._done.cancelled():
                self._done.exception()  # looked at: a cancelled run leaves no warning about it

    def _on_prefill(self, news: News) -> None:
        reason = None if news.ended is None else news.ended.reason
        if reason is EndReason.HANDED_OVER:
            self._handed_over = True
        gone = news.lost or reason is EndReason.FAILED
        if not (gone and self._handed_over and self._answer.tokens):  # without token 0, decode's tokens can't be given
            self._take(news)

    def _on_decode(self, news: News) -> None:
        if news.ticket is not None and not self._done.done():
            try:
                self._seats.prefill.hand_over(news.ticket)
            except BatonError as error:
                self._fail(error)
        if news.tokens or news.plain:
            self._handed_over = True
        self._take(news)

    def _take(self, news: News) -> None:
        if self._done.done():
            return
        ended = news.ended
        try:
            self._answer.take(news.tokens, _FINISHED.get(ended.reason) if ended else None, news.plain)
            if self._answer.finished:
                self._done.set_result(None)
            elif ended and ended.reason is EndReason.FAILED:
                raise from_code(ended.error_code, ended.error_message)
            elif ended and ended.reason is EndReason.RELEASED:
                raise WorkerLost("a worker dropped the request")
            elif news.lost:
                raise WorkerLost("a worker was lost")
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._done.done():
            self._done.set_exception(error)


def nth_try(request: Request, number: int) -> Request:
    """The same sequence under a name of its own: what an earlier try has under way can't be taken for this one's."""
    if number == 0:
        return request
    return replace(request, sequence_id=SequenceId(f"{request.sequence_id}~{number}"))
