import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, ContextExceeded, InvalidRequest
from baton.text.chat_template import MAX_MESSAGES, ChatMessage, ChatTemplate, template_source
from baton.text.template_process import Renderer

CHATML = """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' +
 message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """{%- set ns = namespace(index=0, found=false) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "system" %}{% set ns.found = true %}{% continue %}
    {%- elif message["role"] == "user" %}
        {{- "[INST] " + message["content"] + ("!" if ns.found else "") + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {% generation %}{{ message["content"] ~ eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{ messages[-1] | tojson }}"""
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
USER = [ChatMessage("user", "Hello <b>&'\" é 東 😀\n there ")]
TURNS = [*USER, ChatMessage("assistant", " Hi. "), ChatMessage("user", "")]
WITH_SYSTEM = [ChatMessage("system", "Be short."), *TURNS]


def a_template(source: str, **limits: float) -> ChatTemplate:
    return ChatTemplate(source, VARIABLES, **limits)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def echo() -> Iterator[ChatTemplate]:
    template = a_template(
        "{% for m in messages %}{% if m.role == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}",
        cpu_s=0.3,
        max_bytes=4000,
    )
    yield template
    template.close()


@pytest.mark.parametrize("messages", [USER, TURNS, WITH_SYSTEM])
@pytest.mark.parametrize("source", [CHATML, LLAMA2, LLAMA3, MISTRAL], ids=["chatml", "llama2", "llama3", "mistral"])
def test_a_conversation_is_rendered_as_by_transformers(source: str, messages: list[ChatMessage]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": message.role, "content": message.content} for message in messages]
    ((expected,), _) = render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=True, **VARIABLES
    )
    assert Renderer(source, VARIABLES, 10_000).render(conversation) == expected
    assert "Hello" in expected


def test_the_process_renders_what_the_renderer_does() -> None:
    template = a_template(MISTRAL)
    conversation = [{"role": message.role, "content": message.content} for message in TURNS]
    assert template.render(TURNS) == Renderer(MISTRAL, VARIABLES, 10_000).render(conversation)
    template.close()


def test_the_templates_own_refusal_reaches_the_client() -> None:
    template = a_template(LLAMA2)
    with pytest.raises(InvalidRequest, match="Conversation roles must alternate"):
        template.render([ChatMessage("assistant", "Hi")])
    assert "[INST]" in template.render(USER)
    template.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content.missing.field }}", "no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
        ("{% include 'other' %}", "no loader"),
        ("{{ 'a' * 10**10 }}", "memory|needed more"),
        ("{{ messages[0].content.ljust(10**10) }}", "memory|needed more"),
        ("{{ (messages|length + 9) ** (10 ** 9) }}", "took too long|memory|needed more"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took too long"),
        ("{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "memory"),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
            "too",
        ),
    ],
)
def test_a_hostile_or_mistaken_template_is_stopped(source: str, message: str) -> None:
    template = a_template(source, cpu_s=0.3, memory_bytes=200 << 20)
    with pytest.raises(InvalidRequest, match=message):
        template.render(USER)
    with pytest.raises(InvalidRequest, match=message):
        template.render(USER)
    template.close()


def test_a_stopped_process_is_replaced(echo: ChatTemplate) -> None:
    with pytest.raises(InvalidRequest, match="took too long"):
        echo.render([ChatMessage("loop", "")])
    assert echo.render(USER) == USER[0].content


def test_a_closed_template_opens_again(echo: ChatTemplate) -> None:
    echo.close()
    assert echo.render(USER) == USER[0].content


def test_messages_larger_than_the_bound_are_refused(echo: ChatTemplate) -> None:
    with pytest.raises(ContextExceeded, match="4000"):
        echo.render([ChatMessage("user", "a" * 5000)])


def test_a_prompt_larger_than_the_bound_is_refused(echo: ChatTemplate) -> None:
    with pytest.raises(ContextExceeded, match="4000"):
        echo.render([ChatMessage("user", "é" * 2001)])


def test_too_many_messages_are_refused(echo: ChatTemplate) -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        echo.render([ChatMessage("", "")] * (MAX_MESSAGES + 1))


def test_a_lone_surrogate_is_refused(echo: ChatTemplate) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        echo.render([ChatMessage("user", "\ud800")])


def test_threads_get_their_own_prompts(echo: ChatTemplate) -> None:
    results: dict[int, list[str]] = {}

    def render(number: int) -> None:
        results[number] = [echo.render([ChatMessage("user", f"{number}-{turn}")]) for turn in range(20)]

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number}-{turn}" for turn in range(20)] for number in range(4)}


def test_the_process_sees_no_secret_and_writes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_SECRET", "hidden")
    template = a_template("{{ messages[0].content }}")
    template.render(USER)
    process = template._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert b"BATON_SECRET" not in environment
    assert any(line.split()[:4] == ["Max", "file", "size", "0"] for line in limits.splitlines())
    template.close()
    assert process.poll() is not None


@pytest.mark.parametrize("source", ["{% for %}", "{{ 10 ** (10**9) }}", "{% unknown %}"])
def test_a_template_that_can_not_be_compiled_is_named_at_the_start(source: str) -> None:
    with pytest.raises(ConfigError, match="chat template is broken"):
        a_template(source, cpu_s=0.3)


def test_the_template_file_goes_before_the_tokenizers_config(tmp_path: Path) -> None:
    assert template_source(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "oldest"}))
    assert template_source(tmp_path) == "oldest"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert template_source(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_source(tmp_path) == "file"


def test_of_named_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_source(tmp_path) == "plain"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(ConfigError, match="default"):
        template_source(tmp_path)
