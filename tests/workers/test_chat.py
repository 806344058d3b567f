"""Chat templates of the common families against prompts written by hand."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from orchestrator.errors import RequestError, WorkerError
from workers.words import chat
from workers.words.chat import ChatTemplate, eos_token_ids
from workers.words.sandbox import Limits
from workers.words.tokenizer import Tokenizer

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)

USER = {"role": "user", "content": "Hi <b> & 'you'"}
TALK = [USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
NOON = datetime(2024, 8, 6, 12, tzinfo=UTC)


def folder_of(folder: Path, template: object, **config: object) -> Path:
    """A model's folder with the template in its tokenizer_config.json."""
    config = {"chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def render(folder: Path, template: str, messages: list[Any] = TALK, **given: Any) -> str:
    return ChatTemplate.load(folder_of(folder, template)).render(messages, **given)


# --- the families


def test_chatml(tmp_path: Path) -> None:
    assert render(tmp_path, CHATML) == (
        "<|im_start|>user\nHi <b> & 'you'<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(tmp_path, CHATML, [USER], add_generation_prompt=False) == (
        "<|im_start|>user\nHi <b> & 'you'<|im_end|>\n"
    )


def test_llama_3(tmp_path: Path) -> None:
    bos = {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True}
    template = ChatTemplate.load(folder_of(tmp_path, LLAMA3, bos_token=bos))
    messages = [{"role": "system", "content": " Be brief. "}, *TALK]
    assert template.render(messages, now=NOON) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 06 Aug 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <b> & 'you'<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_llama_3_with_tools(tmp_path: Path) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"z": "é<>", "a": 1}'},
    }
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    template = ChatTemplate.load(folder_of(tmp_path, LLAMA3, bos_token="<s>"))
    assert template.render(messages, tools, now=NOON) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 06 Aug 2024\n\n<|eot_id|>"
        '{\n    "type": "function",\n    "function": {\n        "name": "f",\n'
        '        "parameters": {}\n    }\n}\n\n'
        "<|start_header_id|>user<|end_header_id|>\n\nHi <b> & 'you'<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "f", "parameters": {"z": "é<>", "a": 1}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert call["function"] == {"name": "f", "arguments": '{"z": "é<>", "a": 1}'}
    two = [{"role": "assistant", "content": None, "tool_calls": [call, call]}]
    with pytest.raises(RequestError, match="only supports single tool-calls"):
        template.render(two, tools, now=NOON)


def test_mistral(tmp_path: Path) -> None:
    template = ChatTemplate.load(folder_of(tmp_path, MISTRAL, bos_token="<s>", eos_token="</s>"))
    expected = "<s>[INST] Hi <b> & 'you' [/INST]Hello</s>[INST] Bye [/INST]"
    assert template.render(TALK) == expected
    with pytest.raises(RequestError) as caught:
        template.render([USER, USER])
    assert caught.value.code == "template_error"
    assert caught.value.message.startswith("chat template: Conversation roles must alternate")


# --- the environment


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ {'b': 'é<', 'a': [1, None]} | tojson }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ {'b': 'é'} | tojson(ensure_ascii=true) }}", '{"b": "\\u00e9"}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ documents is none }} {{ tools is none }}", "True True"),
        ("{{ strftime_now('%Y-%m-%d %H') }}", "2024-08-06 12"),
        (
            "{{ eos_token }}|{{ pad_token }}|{{ nothing }}|{{ unk_token is defined }}",
            "</s>|P||False",
        ),
        ("{% macro m(x) %}{{ bos_token }}{{ x }}{% endmacro %}{{ m(1) }}", "<s>1"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 5 %}{{ ns.n }}", "5"),
        ("{{ messages[0].content[::-1] }}", "'uoy' & >b< iH"),
        (
            "{{ messages[0].get('name', 'none') }} {{ messages[0].items() | list | length }}",
            "none 2",
        ),
    ],
)
def test_the_environment_is_that_of_transformers(
    tmp_path: Path, template: str, expected: str
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "P"}, "eos_token": "not this"})
    )
    loaded = ChatTemplate.load(folder_of(tmp_path, template, **tokens))
    assert loaded.render([USER], now=NOON) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__self__.year }}",
        "{{ nothing.at_all }}",
        "{{ nothing | tojson }}",
        "{{ 1 / 0 }}",
        "{{ 'x' + 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ raise_exception('') }}",
    ],
)
def test_what_a_template_does_wrong_is_the_requests_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(RequestError, match=r"^chat template: \S") as caught:
        render(tmp_path, template, [USER])
    assert caught.value.code == "template_error"


def test_the_prompt_is_bounded(tmp_path: Path) -> None:
    endless = (
        "{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    )
    template = ChatTemplate.load(folder_of(tmp_path, endless), Limits(characters=1_000))
    with pytest.raises(RequestError, match="exceeds 1000 characters") as caught:
        template.render(TALK)
    assert caught.value.code == "template_error"


# --- the messages, but for what is said in test_conversation.py


def test_a_part_that_is_no_text_is_refused(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]: expected text") as caught:
        render(tmp_path, CHATML, [{"role": "user", "content": [image]}])
    assert caught.value.code == "unsupported_content"


REFUSE = "{{ raise_exception('9!') }}{% endif %}"


@pytest.mark.parametrize(
    "check",
    [
        "{% if not tool_call.id is defined or tool_call.id|length != 9 %}" + REFUSE,
        "{% if not (tool_call['id'] | length == 9) %}" + REFUSE,
    ],
)
def test_ids_are_made_short_where_the_template_insists(tmp_path: Path, check: str) -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]
    messages = [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "x"}]
    listed = "{% set tool_call = messages[0].tool_calls[0] %}{{ tool_call.id }}"
    assert len(render(tmp_path, listed + check, messages)) == 9
    assert render(tmp_path, listed, messages) == "call_1"


def test_tools_and_functions_look_alike_to_the_template(tmp_path: Path) -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    for tools in ([function], [{"type": "function", "function": function}]):
        assert render(tmp_path, "{{ tools | tojson }}", tools=tools) == (
            '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]'
        )


# --- where the template comes from


def test_the_file_goes_before_the_configuration(tmp_path: Path) -> None:
    folder_of(tmp_path, "from the configuration")
    (tmp_path / "chat_template.jinja").write_text("from the file {{ bos_token }}é", "utf-8")
    loaded = ChatTemplate.load(tmp_path)
    assert (loaded.render(TALK), loaded.source) == (
        "from the file é",
        "from the file {{ bos_token }}é",
    )


def test_a_file_of_its_own_holds_the_template_for_tools(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    loaded = ChatTemplate.load(tmp_path)
    assert (loaded.source, loaded.tool_source) == ("plain", "tools")
    assert loaded.render(TALK, [{"function": {"name": "f"}}]) == "tools"


def test_a_list_names_the_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    loaded = ChatTemplate.load(folder_of(tmp_path, named))
    assert (loaded.source, loaded.tool_source) == ("plain", "tools")
    tool = {"type": "function", "function": {"name": "f"}}
    assert [loaded.render(TALK, tools) for tools in (None, [], [tool])] == [
        "plain",
        "plain",
        "tools",
    ]
    alone = ChatTemplate.load(folder_of(tmp_path, named[:1]))
    assert alone.render(TALK, [tool]) == "plain"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ([{"name": "rag", "template": "x"}], "no chat template"),
        (["x", {"name": "default"}], "no chat template"),
        ("{% if %}", "the chat template is not valid"),
    ],
)
def test_a_model_without_a_sound_template_is_refused(
    tmp_path: Path, template: object, message: str
) -> None:
    with pytest.raises(WorkerError, match=message) as caught:
        ChatTemplate.load(folder_of(tmp_path, template))
    assert caught.value.code == "model"


def test_a_bare_folder_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="no chat template"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(WorkerError, match="not UTF-8"):
        ChatTemplate.load(tmp_path)
    for content, message in (("{", "not JSON"), ("[]", "expected an object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(WorkerError, match=message):
            ChatTemplate.load(tmp_path)


# --- the end of a turn


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made = tokenizers.Tokenizer(
        models.BPE({token: id for id, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    made.add_special_tokens([AddedToken(name, special=True) for name in names])
    made.add_tokens([AddedToken("<plain>", special=False)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, {"<|im_end|>"}),
        (LLAMA3, {"<|eot_id|>"}),
        (MISTRAL, {"</s>"}),
        ("{% for m in messages %}{{ m.content }}</s>\n{% endfor %}", {"</s>"}),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", {"</s>"}),
        ("{% for m in messages %}{{ m.content }}<plain>{% endfor %}", set()),
        ("{% for m in messages %}{{ m.content }}\nUser: <|im_end|>{% endfor %}", set()),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", set()),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>{% endif %}",
            set(),
        ),
        ("no answer in here <|im_end|>", set()),
        ("{{ raise_exception('never') }}", set()),
        (None, set()),
    ],
)
def test_the_templates_turn_end_is_an_eos(
    tmp_path: Path, tokenizer: Tokenizer, template: str | None, expected: set[str]
) -> None:
    folder_of(tmp_path, template)
    if template == MISTRAL:
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    ids = eos_token_ids(tmp_path, tokenizer)
    assert {tokenizer.token(id) for id in ids} == expected


def test_every_file_adds_its_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder_of(tmp_path, CHATML, eos_token={"content": "</s>"})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "genai_config.json").write_text('{"model": {"eos_token_id": 9}}')
    end, turn_end = tokenizer.token_id("</s>"), tokenizer.token_id("<|im_end|>")
    assert eos_token_ids(tmp_path, tokenizer) == {7, 8, 9, end, turn_end}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    (tmp_path / "genai_config.json").write_text("{}")
    assert eos_token_ids(tmp_path, tokenizer) == {end, turn_end}


def test_the_embedded_model_serves_chat() -> None:
    folder = Path(chat.__file__).parents[1] / "models" / "tiny"
    tokenizer, template = Tokenizer(folder), ChatTemplate.load(folder)
    end = tokenizer.token_id("<|im_end|>")
    assert end in eos_token_ids(folder, tokenizer)
    prompt = template.render([{"role": "user", "content": "Repeat exactly: é \U0001f680"}])
    assert prompt == (
        "<|im_start|>user\nRepeat exactly: é \U0001f680<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt)
    assert end in ids
    assert "".join(tokenizer.token(id) or "" for id in ids).count("<|im_") == 3
    assert tokenizer.decode(ids) == "user\nRepeat exactly: é \U0001f680\nassistant\n"
