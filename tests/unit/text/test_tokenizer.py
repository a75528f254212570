import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from baton.core.errors import ConfigError, ContextExceeded, InvalidRequest
from baton.text.chat_template import ChatMessage
from baton.text.tokenizer import Tokenizer

TEXTS = st.one_of(st.text(max_size=60), st.text("aé the😀東<|im_start|>\n", max_size=60))
BRACKETS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def copy_with(model_dir: Path, path: Path, **config: object) -> Path:
    (path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return path


@given(text=TEXTS)
@settings(deadline=None, max_examples=150)
def test_tokens_equal_those_of_transformers(tokenizer: Tokenizer, reference, text: str) -> None:  # type: ignore[no-untyped-def]
    if not text.startswith("<s>"):
        assert tokenizer.encode(text) == reference.encode(text)
    ids = reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids)


def test_ids_equal_those_of_transformers(tokenizer: Tokenizer, reference) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.special_token_ids >= set(reference.all_special_ids)
    assert tokenizer.vocab_size == len(reference)


def test_begin_and_end_follow_tokenizer_json_alone(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = copy_with(model_dir, tmp_path, add_bos_token=False, add_eos_token=True)
    ids = Tokenizer.from_dir(path).encode("the answer")
    assert ids == AutoTokenizer.from_pretrained(path).encode("the answer")
    assert (ids[0] == 0, ids[-1] == 1) == (True, False)


def test_a_text_with_its_own_begin_gets_no_second_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<s>the answer").count(0) == 1
    assert tokenizer.encode("<s><s>the answer").count(0) == 2
    assert tokenizer.encode("the answer").count(0) == 1


def test_a_conversation_has_one_begin_and_equals_transformers(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = copy_with(model_dir, tmp_path, chat_template=BRACKETS)
    tokenizer = Tokenizer.from_dir(path)
    messages = [ChatMessage("user", "the <|im_start|> answer?"), ChatMessage("assistant", "in é 東")]
    ids = tokenizer.encode_chat(messages)
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    reference = AutoTokenizer.from_pretrained(path)
    assert ids == reference.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ids.count(0) == 1
    tokenizer.close()


def test_a_special_token_written_out_in_a_message_is_that_token_as_with_transformers(
    model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = copy_with(model_dir, tmp_path, chat_template=BRACKETS)
    content = "a<|im_end|><|im_start|>system b"
    reference = AutoTokenizer.from_pretrained(path)
    tokenizer = Tokenizer.from_dir(path)
    ids = tokenizer.encode_chat([ChatMessage("user", content)])
    assert ids == reference.apply_chat_template([{"role": "user", "content": content}], return_dict=False)
    assert reference.convert_tokens_to_ids("<|im_start|>") in ids
    tokenizer.close()


@given(text=TEXTS)
@settings(deadline=None, max_examples=60)
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special=False).encode()
    if not tokenizer.byte_tokens:  # else the decoder drops a leading space, which only the whole text has
        assert b"".join(tokenizer.bytes_of(token) for token in ids) == whole
    assert tokenizer.bytes_of(10**9) == b""


def test_a_token_that_is_part_of_a_character_has_its_own_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦀", add_special_tokens=False)
    assert len(ids) > 1
    assert b"".join(tokenizer.bytes_of(token) for token in ids).lstrip() == "🦀".encode()


def test_a_model_without_chat_template_refuses_conversations(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat([ChatMessage("user", "hello")])


def test_truncation_and_padding_in_the_file_are_not_used(model_dir: Path, tmp_path: Path) -> None:
    path = copy_with(model_dir, tmp_path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(path / "tokenizer.json"))
    assert Tokenizer.from_dir(path).encode("the answer in the answer") == Tokenizer.from_dir(model_dir).encode(
        "the answer in the answer"
    )


def test_a_text_that_can_not_fit_is_refused_unread(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextExceeded, match="at most 10 fit"):
        tokenizer.encode("a" * (10 * tokenizer.longest_token_bytes + 1), max_tokens=10)


@given(text=TEXTS)
@settings(deadline=None)
def test_a_text_that_fits_is_not_refused(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, max_tokens=len(ids)) == ids


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        tokenizer.encode("a\ud800b")


def test_ids_outside_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([10**6]) == ""
    assert not tokenizer.is_known(10**6)


def test_named_tokens_are_special_though_the_file_does_not_say_so(byte_level_dir: Path, tmp_path: Path) -> None:
    path = copy_with(byte_level_dir, tmp_path, eos_token="a")
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.eos_token_id in tokenizer.special_token_ids
    assert tokenizer.decode(tokenizer.encode("bab", add_special_tokens=False)) == "bb"


def test_older_checkpoints_name_tokens_in_special_tokens_map(byte_level_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 4)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no tokenizer.json"), ("{}", "not a tokenizer"), ("x", "not a tokenizer")]
)
def test_a_directory_without_a_readable_tokenizer_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_dir(tmp_path)
