"""Jobs of an `LLM`, run by an engine in this process. Text is done here: tokens in, tokens out, stop strings."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

from ..core.errors import BatonError
from ..core.ids import RequestId, SequenceId, sequence_id
from ..core.request import EndReason, FinishReason, Request, Sampling, TokenLogprobs
from ..engine.offline import Offline
from ..engine.sequence import Sequence
from ..engine.step_result import StepResult
from ..text.generation_config import GenerationDefaults
from ..text.model_source import resolve, served_name
from ..text.settling import ModelLimits, check_chat, check_prompt_ids
from ..text.streaming import AnswerText
from ..text.tokenizer import Tokenizer
from .jobs import Job, about
from .progress import ProgressLine
from .results import ChatMessage, Completion, Prompt, Result, Usage

_FINISH = {EndReason.STOP: FinishReason.STOP, EndReason.LENGTH: FinishReason.LENGTH}


class InProcess:
    """See `Backend`."""

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_bytes: int | None = None,
        block_tokens: int = 16,
        max_model_len: int | None = None,
        max_batch: int = 256,
        policy: str = "hybrid",
        threads: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """Raises ConfigError."""
        directory = resolve(str(model), option="model")
        self._tokenizer = Tokenizer.from_dir(directory)
        try:
            self.defaults = GenerationDefaults.from_dir(directory).ending_also_with(self._tokenizer.eos_token_id)
            self.offline = Offline.build(
                directory,
                dtype=dtype,
                device=device,
                kv_bytes=kv_bytes,
                block_tokens=block_tokens,
                max_model_len=max_model_len,
                max_batch=max_batch,
                policy=policy,
                threads=threads,
                deterministic=deterministic,
            )
        except BaseException:
            self._tokenizer.close()
            raise
        engine = self.offline.engine
        self.limits = ModelLimits(
            name=served_name(str(model), directory),
            max_model_len=engine.max_model_len,
            vocab_size=engine.config.vocab_size,
        )

    def tokenise(self, prompts: Seq[Prompt]) -> list[tuple[int, ...]]:
        found = []
        for index, prompt in enumerate(prompts):
            with about(index):
                found.append(self._tokens(prompt))
        return found

    def run(self, jobs: Seq[Job], progress: ProgressLine) -> list[Result]:
        running = [_Running(job, self._tokenizer) for job in jobs]
        answers = {answer.sequence_id: (part, answer) for part in running for answer in part.answers}

        def on_step(step: StepResult) -> list[Sequence]:
            over = [seq for seq, token, logprobs in step.tokens if answers[seq.sequence_id][1].take(token, logprobs)]
            for seq, reason in step.ended:
                part, answer = answers[seq.sequence_id]
                if isinstance(reason, BatonError):
                    with about(part.job.index):
                        raise reason
                answer.end(_FINISH[reason])
                over.append(seq)
            done = 0
            for seq in over:
                part, _ = answers[seq.sequence_id]
                done += part.ended(seq)
            progress.add(done=done, tokens_in=step.stats.prefill_tokens, tokens_out=len(step.tokens))
            return over

        self.offline.run((request for part in running for request in part.requests()), on_step)
        return [part.result() for part in running]

    def close(self) -> None:
        self._tokenizer.close()

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt, max_tokens=self.limits.max_model_len))
        messages = [part for part in prompt if isinstance(part, ChatMessage)]
        if messages:
            return tuple(self._tokenizer.encode_chat(check_chat(messages), self.limits.max_model_len))
        return check_prompt_ids([part for part in prompt if isinstance(part, int)], self.limits)


class _Answer:
    """One of a job's answers, as its tokens come."""

    def __init__(self, name: SequenceId, sampling: Sampling, text: AnswerText) -> None:
        self.sequence_id = name
        self.sampling = sampling
        self.finished: FinishReason | None = None
        self._text = text
        self._parts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def take(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Whether the answer ends with this token, by its text or by a stop token."""
        self._token_ids.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        part = self._text.push((token,))
        self._parts.append(part.text)
        if part.stopped:
            self.finished = FinishReason.STOP
        return part.stopped

    def end(self, reason: FinishReason) -> None:
        """The engine has ended it; what its text ended comes first."""
        if self.finished is None:
            rest = self._text.flush()
            self._parts.append(rest.text)
            self.finished = FinishReason.STOP if rest.stopped else reason

    def completion(self) -> Completion:
        assert self.finished is not None
        return Completion(
            index=self.sampling.branch,
            text="".join(self._parts),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finished,
            stop_reason=self._text.ended_by,
            logprobs=tuple(self._logprobs),
        )


class _Running:
    """One job while the engine works on it."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self.job = job
        self.answers = [
            _Answer(
                sequence_id(RequestId(str(job.index)), sampling.branch),
                sampling,
                AnswerText(tokenizer, job.stops, sampling.stop_token_ids),
            )
            for sampling in job.samplings
        ]
        self._left = {answer.sequence_id for answer in self.answers}
        self._cached_tokens = 0
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    def requests(self) -> list[Request]:
        """The prompt's log probabilities are computed once, for the first answer."""
        first, *others = (answer.sampling for answer in self.answers)
        samplings = [first, *(replace(sampling, prompt_logprobs=None) for sampling in others)]
        return [
            Request(sequence_id=answer.sequence_id, prompt=self.job.token_ids, sampling=sampling)
            for answer, sampling in zip(self.answers, samplings, strict=True)
        ]

    def ended(self, seq: Sequence) -> bool:
        """Keep what is to be known of an ended sequence. True: it was the last one, now."""
        if seq.sequence_id not in self._left:
            return False
        self._left.remove(seq.sequence_id)
        if seq.sequence_id == self.answers[0].sequence_id:
            self._cached_tokens = seq.cached_tokens
            self._prompt_logprobs = seq.prompt_logprobs
        return not self._left

    def result(self) -> Result:
        outputs = tuple(answer.completion() for answer in self.answers)
        return Result(
            prompt=self.job.prompt,
            prompt_token_ids=self.job.token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            usage=Usage(
                prompt_tokens=len(self.job.token_ids),
                completion_tokens=sum(len(output.token_ids) for output in outputs),
                cached_tokens=self._cached_tokens,
            ),
        )
