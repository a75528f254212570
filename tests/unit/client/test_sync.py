import grpc
import pytest

from baton.client import ChatMessage, InferenceClient, PromptLogprob, Retry, Sampling, ServerFault
from baton.core import errors
from baton.core.request import FinishReason

from .scripted_router import Break, ScriptedRouter, message

AT_ONCE = Retry(first_s=0, most_s=0)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def client(address: str, **options: object) -> InferenceClient:
    return InferenceClient(address, **{"timeout_s": 20, "retry": AT_ONCE, **options})


def test_a_stream_is_put_together(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "a"), message(2, "b"), message(2, last=True)]]
    with client(address) as ask:
        answer = ask.generate("x", sampling=Sampling(max_tokens=2))
    assert (answer.text, answer.answers[0].token_ids) == ("ab", (1, 2))
    assert answer.answers[0].finish_reason is FinishReason.STOP
    assert answer.usage.completion_tokens == 2
    assert router.asked[0].sampling.max_tokens == 2


def test_penalties_bias_and_min_tokens_are_sent_where_they_are_given(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "a"), message(1, last=True)]] * 2
    sampling = Sampling(repetition_penalty=1.25, frequency_penalty=-0.5, logit_bias={7: -100.0}, min_tokens=0)
    with client(address) as ask:
        ask.generate("x", sampling=sampling)
        ask.generate("x")
        with pytest.raises(errors.InvalidRequest):
            ask.generate("x", sampling=Sampling(logit_bias={-1: 1.0}))
    sent, plain = (request.sampling for request in router.asked)
    assert (sent.repetition_penalty, sent.frequency_penalty, dict(sent.logit_bias)) == (1.25, -0.5, {7: -100.0})
    assert sent.HasField("min_tokens")
    assert not sent.HasField("presence_penalty")
    assert [field.name for field, _ in plain.ListFields()] == ["seed"]


def test_log_probabilities_of_the_prompt_and_priority_cross(router: ScriptedRouter, address: str) -> None:
    first = message(1, "a")
    first.outputs[0].prompt_logprobs.add(token_id=7)
    first.outputs[0].prompt_logprobs.add(token_id=8, logprob=-0.5).top.add(token_id=9, logprob=-0.25)
    router.scripts = [[first, message(2, "b"), message(2, last=True)]] * 2
    with client(address) as ask:
        answer = ask.generate("x", sampling=Sampling(prompt_logprobs=1), priority=-3).answers[0]
        ask.generate("x")
        with pytest.raises(errors.InvalidRequest):
            ask.generate("x", priority=2**40)
    assert answer.prompt_logprobs == (
        PromptLogprob(token_id=7, logprob=None),
        PromptLogprob(token_id=8, logprob=-0.5, top=((9, -0.25),)),
    )
    assert (router.asked[0].priority, router.asked[0].sampling.prompt_logprobs) == (-3, 1)
    assert router.asked[1].priority == 0
    assert not router.asked[1].sampling.HasField("prompt_logprobs")


def test_a_broken_stream_goes_on_where_it_stopped_with_its_id_and_seed(router: ScriptedRouter, address: str) -> None:
    router.scripts = [
        [message(1, "a"), message(2, "b"), Break(UNAVAILABLE)],
        [message(3, "c"), message(3, last=True)],
    ]
    with client(address) as ask:
        assert ask.generate("x").text == "abc"
    first, second = router.asked
    assert first.request_id == second.request_id
    assert first.sampling.seed == second.sampling.seed
    assert not first.stream.HasField("resume_after_seq")
    assert second.stream.resume_after_seq == 2


def test_a_stream_that_ends_without_its_last_message_is_asked_for_again(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "a")], [message(2, "b"), message(2, last=True)]]
    with client(address) as ask:
        assert ask.generate("x").text == "ab"


def test_tokens_that_came_already_are_not_shown_again(router: ScriptedRouter, address: str) -> None:
    router.scripts = [
        [message(1, "a"), message(2, "b"), Break(UNAVAILABLE)],
        [message(1, "a"), message(3, "c"), message(3, last=True)],
    ]
    with client(address) as ask:
        assert ask.generate("x").text == "abc"


def test_it_gives_up_after_so_many_failures_without_progress(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[Break(UNAVAILABLE)] for _ in range(7)]
    with client(address) as ask, pytest.raises(errors.Unavailable, match="broken on purpose"):
        ask.generate("x")
    assert len(router.asked) == 7


def test_several_answers_are_not_resumed_once_something_came(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "a", index=1), Break(UNAVAILABLE)]]
    with client(address) as ask, pytest.raises(errors.Unavailable):
        ask.generate("x", sampling=Sampling(n=2))
    assert len(router.asked) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.OUT_OF_RANGE, errors.ContextExceeded),
        (grpc.StatusCode.NOT_FOUND, errors.UnknownModel),
        (grpc.StatusCode.ALREADY_EXISTS, errors.RequestConflict),
        (grpc.StatusCode.UNAUTHENTICATED, errors.NotAuthenticated),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.DATA_LOSS, errors.CorruptPiece),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.ConfigError),
        (grpc.StatusCode.INTERNAL, ServerFault),
        (grpc.StatusCode.UNKNOWN, ServerFault),
    ],
)
def test_each_status_is_its_own_error_and_is_not_asked_again(
    router: ScriptedRouter, address: str, code: grpc.StatusCode, kind: type[errors.BatonError]
) -> None:
    router.scripts = [[Break(code)]]
    with client(address) as ask, pytest.raises(kind):
        ask.generate("x")
    assert len(router.asked) == 1


def test_a_request_larger_than_the_server_takes_is_not_sent_again_and_again(
    router: ScriptedRouter, address: str
) -> None:
    with client(address) as ask, pytest.raises(errors.InvalidRequest, match="larger than max"):
        ask.generate("x" * 200_000)


def test_the_name_in_the_trailing_metadata_goes_before_the_status(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[Break(grpc.StatusCode.FAILED_PRECONDITION, name="GeometryMismatch")]]
    with client(address) as ask, pytest.raises(errors.GeometryMismatch):
        ask.generate("x")
    with client(address) as ask, pytest.raises(errors.UnknownRequest):
        ask.explain("nobody")


def test_leaving_the_loop_ends_the_call(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(n, "a") for n in range(1, 1000)]]
    with client(address) as ask:
        stream = ask.stream("x")
        next(stream)
        stream.close()
        assert next(iter(ask.models())).name == "m"
    assert len(router.asked) == 1


def test_the_deadline_counts_over_all_tries(router: ScriptedRouter, address: str) -> None:
    with client(address) as ask, pytest.raises(errors.DeadlineExceeded):
        ask.generate("x", timeout_s=0)
    assert router.asked == []


def test_a_call_that_changes_nothing_is_repeated_while_the_router_is_away(router: ScriptedRouter, address: str) -> None:
    router.unavailable = 2
    with client(address) as ask:
        assert ask.models()[0].max_model_len == 128


def test_tokens_conversations_and_text_each_go_in_their_own_field(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(0, last=True)] for _ in range(3)]
    with client(address) as ask:
        ask.generate("x")
        ask.generate([1, 2, 3])
        ask.chat([ChatMessage("user", "hi")])
    assert [request.WhichOneof("input") for request in router.asked] == ["text", "token_ids", "chat"]
    assert list(router.asked[1].token_ids.ids) == [1, 2, 3]


def test_values_that_fit_no_field_are_refused_before_anything_is_sent(router: ScriptedRouter, address: str) -> None:
    with client(address) as ask:
        with pytest.raises(errors.InvalidRequest):
            ask.generate("x", sampling=Sampling(max_tokens=-1))
        with pytest.raises(errors.InvalidRequest):
            ask.generate([-1])
        with pytest.raises(errors.InvalidRequest):
            ask.detokenize([1 << 40])
    assert router.asked == []


def test_the_small_calls(router: ScriptedRouter, address: str) -> None:
    with client(address) as ask:
        assert ask.tokenize("abc") == [0, 1, 2]
        assert ask.tokenize([ChatMessage("user", "hi")]) == [0]
        assert ask.detokenize([4, 5]) == "4 5"
        assert ask.cancel("known") is True
        assert ask.cancel("other") is False
        assert ask.explain("known").decode_worker == "decode-0"
        assert ask.model("m").max_model_len == 128
        assert [(worker.worker_id, worker.running, worker.free_blocks) for worker in ask.workers("m")] == [
            ("decode-0", 2, 5)
        ]
        with pytest.raises(errors.UnknownModel):
            ask.model("nope")


def test_the_api_key_goes_with_each_call(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(0, last=True)]]
    with client(address, api_key="secret") as ask:
        ask.generate("x")
    assert router.metadata[0]["authorization"] == "Bearer secret"
