"""Plans against a model's files: token ids in range, prompts that fit, refused with their place."""

from pathlib import Path

import pytest

from orchestrator.errors import ParameterError
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import Plan, plan
from workers.chat import ChatTemplate
from workers.door import check_plan
from workers.folder import TINY
from workers.tokenizer import Tokenizer

JOB = """
name: door
model: tiny
dataset:
  items: [{q: short}, {q: "a much longer question that needs many more tokens than the other"}]
params:
  messages: [{role: user, content: "{{ q }}"}]
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.load(TINY)


def planned(more: str) -> Plan:
    return plan(parse_job(JOB + more, file="x.yaml", root=Path.cwd()))


def prompt_length(text: str, template: ChatTemplate, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(template.render([{"role": "user", "content": text}])))


def test_a_prompt_that_just_fits_passes_and_one_token_less_is_refused(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    made = planned("  max_tokens: 7\n")
    longest = max(
        prompt_length(str(item.columns["q"]), template, tokenizer) for item in made.items()
    )
    check_plan(made, template, tokenizer, context=longest + 7)
    with pytest.raises(ParameterError) as refused:
        check_plan(made, template, tokenizer, context=longest + 6)
    assert refused.value.code == "context_length_exceeded"
    assert str(refused.value) == (
        "x.yaml:7: params.messages: item 1 (custom_id '1'): This model's maximum context length is "
        f"{longest + 6} tokens. However, you requested {longest + 7} tokens ({longest} in the "
        "messages, 7 in the completion). Please reduce the length of the messages or completion."
    )


def test_the_largest_max_tokens_of_the_sweep_counts_for_every_prompt_of_it(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    made = planned("sweep: {max_tokens: [3, 900, 5]}\n")
    check_plan(made, template, tokenizer, context=1024)
    with pytest.raises(ParameterError, match="900 in the completion"):
        check_plan(made, template, tokenizer, context=905)


def test_a_token_id_beyond_the_vocabulary_is_refused_with_the_largest(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    largest = tokenizer.vocab_size - 1
    check_plan(planned(f"  logit_bias: {{{largest}: 1}}\n"), template, tokenizer, context=1024)
    with pytest.raises(ParameterError, match=rf"{largest + 1}\. Maximum value is {largest}\.$"):
        check_plan(
            planned(f"sweep: {{logit_bias: [{{1: 1}}, {{{largest + 1}: 1}}]}}\n"),
            template,
            tokenizer,
            context=1024,
        )


def test_a_prompt_without_room_for_one_token_is_refused_without_max_tokens(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    made = planned("")
    longest = max(
        prompt_length(str(item.columns["q"]), template, tokenizer) for item in made.items()
    )
    check_plan(made, template, tokenizer, context=longest + 1)
    with pytest.raises(ParameterError, match="maximum context length"):
        check_plan(made, template, tokenizer, context=longest)
