"""A claim to a completion: its parameters, its prompt, its random numbers, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.db.store import Claimed, ClaimedChoice
from orchestrator.errors import RequestError
from orchestrator.spec.params import parse_params
from workers.admission import prompt_seed, to_completion
from workers.drawing.sampler import Sampling, uniform
from workers.engine.engine import Choice, Completion
from workers.folders.folder import TINY
from workers.grammars.constraint import Shape
from workers.loading.wording import Wording
from workers.shapes import Asked, asked
from workers.words.chat import ChatTemplate

WORDING = Wording.load(TINY)
TOKENIZER = WORDING.tokenizer
ASK = [{"role": "user", "content": "What is {{ a }} + {{ b }}?"}]
CHRISTMAS = 1_766_620_800  # 2025-12-25, 00:00 UTC
GOLDEN = (1_786_884_285_633_530_058, 2_299_122_497_161_046_891, 7_676_152_789_606_308_007)


def claimed(
    params: dict[str, Any] | None = None,
    point: dict[str, Any] | None = None,
    *,
    seed: int = 5,
    choices: tuple[ClaimedChoice, ...] | None = None,
    **columns: object,
) -> Claimed:
    return Claimed(
        request_id=1_000_000_007,
        epoch=2,
        attempt=2,
        job_id="job_x",
        model="tiny",
        params={"model": "tiny", "messages": ASK, **(params or {})},
        point_params=point or {},
        columns={"a": 12, "b": 30} | columns,
        seed=seed,
        created=CHRISTMAS,
        choices=choices or (choice(0),),
    )


def choice(index: int, *tokens: int, reason: str | None = None) -> ClaimedChoice:
    return ClaimedChoice(index, np.array(tokens, np.int32), reason)


def admit(given: Claimed, template: ChatTemplate = WORDING.template) -> Completion:
    return to_completion(given, replace(WORDING, template=template))


def refusal(given: Claimed, template: ChatTemplate = WORDING.template) -> RequestError:
    with pytest.raises(RequestError) as refused:
        admit(given, template)
    return refused.value


def test_the_prompt_is_the_templates_text_over_the_items_columns() -> None:
    completion = admit(claimed())
    assert completion.id == 1_000_000_007
    text = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert completion.prompt == tuple(TOKENIZER.encode(text))
    assert all(type(token) is int for token in completion.prompt)


def test_what_is_not_given_has_the_defaults_of_the_api() -> None:
    completion = admit(claimed())
    seed = prompt_seed(5, completion.prompt)
    assert completion.sampling == Sampling(temperature=1.0, top_p=1.0, seed=seed)
    assert (completion.max_tokens, completion.stops) == (None, ())


def test_every_parameter_reaches_the_sampler_and_the_point_goes_over_the_job() -> None:
    params = {
        "temperature": 0.2,
        "top_p": 0.9,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.5,
        "logit_bias": {"9": -100, "3": 1.5},
        "logprobs": True,
        "top_logprobs": 4,
        "max_tokens": 24,
        "stop": ["{{ a }}!", "end"],
    }
    completion = admit(claimed(params, {"temperature": 0, "max_tokens": 7}))
    assert completion.sampling == Sampling(
        temperature=0,
        top_p=0.9,
        frequency_penalty=-0.5,
        presence_penalty=1.5,
        logit_bias=((3, 1.5), (9, -100.0)),
        logprobs=True,
        top_logprobs=4,
        seed=prompt_seed(5, completion.prompt),
    )
    assert (completion.max_tokens, completion.stops) == (7, ("12!", "end"))


def test_a_stop_that_is_one_text() -> None:
    assert admit(claimed({"stop": "\n"})).stops == ("\n",)


def test_only_unfinished_choices_are_admitted_with_their_tokens() -> None:
    three = (choice(0, 1, 2, reason="stop"), choice(1, 70, 71), choice(2))
    completion = admit(claimed({"n": 3}, choices=three))
    assert completion.choices == (Choice(1, (70, 71)), Choice(2, ()))
    assert all(type(token) is int for token in completion.choices[0].tokens)
    over = admit(claimed(choices=(choice(0, 1, reason="length"),)))
    assert over.choices == ()


def test_the_day_in_a_prompt_is_the_requests_own_on_every_attempt(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(dated)
    template = ChatTemplate.load(tmp_path)
    first, second = (admit(claimed(), template).prompt for _ in range(2))
    assert first == second == tuple(TOKENIZER.encode("25 Dec 2025 00:00 What is 12 + 30?"))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (
            claimed({"logit_bias": {TOKENIZER.vocab_size: 1}}),
            "invalid_request",
            f"Invalid key in 'logit_bias': {TOKENIZER.vocab_size}. "
            f"Maximum value is {TOKENIZER.vocab_size - 1}.",
        ),
        (
            claimed({}, {"temperature": 2.5}),
            "decimal_above_max_value",
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got "
            "2.5 instead.",
        ),
        (
            claimed({}, {"wisdom": 3}),
            "unknown_parameter",
            "Unknown parameter: 'wisdom'.",
        ),
        (
            claimed({"messages": [{"role": "user", "content": "{{ c }}"}]}),
            "template_error",
            "messages[0].content: 'c' is undefined",
        ),
        (
            claimed({"messages": [{"role": "user", "content": "{{ a }}"}]}, a="\ud800"),
            "invalid_text",
            "the text is not valid Unicode: ",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_its_own_error(
    given: Claimed, code: str, message: str
) -> None:
    error = refusal(given)
    assert error.code == code
    assert error.message.startswith(message), error.message


def test_a_template_that_refuses_fails_the_request(tmp_path: Path) -> None:
    for name, source, said in (
        ("refuses", "{{ raise_exception('no') }}", "chat template: no"),
        ("breaks", "{{ messages[0].content / 2 }}", "chat template: unsupported operand"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(source)
        error = refusal(claimed(), ChatTemplate.load(tmp_path / name))
        assert error.code == "template_error"
        assert error.message.startswith(said)


# --- seeds ----------------------------------------------------------------------------------------

SEEDS = st.integers(-(2**63), 2**63 - 1)
PROMPTS = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@given(SEEDS, PROMPTS)
def test_the_same_request_draws_the_same_numbers(seed: int, prompt: list[int]) -> None:
    key = prompt_seed(seed, prompt)
    assert key == prompt_seed(seed, tuple(prompt))
    assert 0 <= key < 2**64


@given(SEEDS, PROMPTS, SEEDS, PROMPTS)
def test_another_seed_or_another_prompt_draws_others(
    seed: int, prompt: list[int], other_seed: int, other_prompt: list[int]
) -> None:
    same = (seed, prompt) == (other_seed, other_prompt)
    assert (prompt_seed(seed, prompt) == prompt_seed(other_seed, other_prompt)) == same


def test_a_seed_is_no_token_and_a_token_no_seed() -> None:
    assert prompt_seed(1, [2, 3]) != prompt_seed(2, [1, 3]) != prompt_seed(1, [3, 2])
    assert prompt_seed(0, []) != prompt_seed(0, [0]) != prompt_seed(0, [0, 0])


def test_the_key_never_changes() -> None:
    """Tokens of today are those of tomorrow: a changed key needs a new SAMPLER_VERSION."""
    assert prompt_seed(0, []) == GOLDEN[0]
    assert prompt_seed(-1, [1, 2, 3]) == prompt_seed(2**64 - 1, [1, 2, 3]) == GOLDEN[1]
    assert prompt_seed(2**63 - 1, [2**31 - 1]) == GOLDEN[2]


def test_the_points_of_a_sweep_share_an_items_numbers_and_items_do_not() -> None:
    cold, hot = (admit(claimed({}, {"temperature": t})) for t in (0, 1.5))
    assert cold.sampling.seed == hot.sampling.seed
    other = admit(claimed(a=13))
    assert other.sampling.seed != hot.sampling.seed
    draws = [[uniform(c.sampling.seed, 0, at) for at in range(50)] for c in (hot, other)]
    assert not set(draws[0]) & set(draws[1])


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_seeds_at_both_ends_are_admitted(seed: int) -> None:
    completion = admit(claimed(seed=seed))
    assert completion.sampling.seed == prompt_seed(seed, completion.prompt)
    assert 0 <= uniform(completion.sampling.seed, 127, 0) < 1


# --- what completions are held to -----------------------------------------------------------------

F = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
G = {"name": "g", "description": "d"}
TOOLS = [{"type": "function", "function": F}, {"type": "function", "function": G}]
CLOSED = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
TOOL_F = {"type": "function", "function": {"name": "f"}}


def schema(wanted: object, *, strict: bool = False) -> dict[str, Any]:
    named = {"name": "x", "schema": wanted, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def wishes(params: dict[str, Any]) -> Asked:
    return asked(parse_params({"model": "tiny", "messages": ASK, **params}))


def test_free_text_is_held_to_nothing() -> None:
    free = admit(claimed({"response_format": {"type": "text"}}))
    assert (free.grammar, free.calls, free.warnings) == (None, None, ())
    assert wishes({}) == Asked(Shape())


@pytest.mark.parametrize(
    "params, shape",
    [
        (schema(CLOSED, strict=True), Shape(schema=CLOSED, strict=True)),
        (schema({"enum": [1]}), Shape(schema={"enum": [1]})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            Shape(schema={"type": "object"}),
        ),
    ],
)
def test_a_response_format_is_a_shape(params: dict[str, Any], shape: Shape) -> None:
    assert wishes(params).shape == shape
    completion = admit(claimed(params))
    assert completion.grammar is not None and completion.calls is None


def test_json_object_is_any_object() -> None:
    ask = [{"role": "user", "content": "JSON"}]
    params = {"messages": ask, "response_format": {"type": "json_object"}}
    assert wishes(params).shape == Shape(schema={"type": "object"})


@pytest.mark.parametrize(
    "params, choice, names, parallel, reason",
    [
        ({}, "auto", "fg", True, "tool_calls"),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "auto", "fg", False, "tool_calls"),
        ({"tool_choice": "required"}, "required", "fg", True, "tool_calls"),
        ({"tool_choice": TOOL_F}, "named", "f", False, "stop"),
    ],
)
def test_tools_are_a_shape_and_shown(
    params: dict[str, Any], choice: str, names: str, parallel: bool, reason: str
) -> None:
    found = wishes({"tools": TOOLS, **params})
    assert found.shape.choice == choice and found.shape.parallel == parallel
    assert [function.name for function in found.shape.functions] == list(names)
    assert found.tools == TOOLS
    completion = admit(claimed({"tools": TOOLS, **params}))
    assert completion.calls is not None and completion.call_reason == reason
    shown = WORDING.template.render([{"role": "user", "content": "What is 12 + 30?"}], TOOLS)
    assert completion.prompt == tuple(TOKENIZER.encode(shown))


@pytest.mark.parametrize(
    "choice, kind, reason",
    [
        (None, "auto", "function_call"),
        ("auto", "auto", "function_call"),
        ({"name": "g"}, "named", "stop"),
    ],
)
def test_functions_are_tools_of_which_one_is_called(choice: Any, kind: str, reason: str) -> None:
    given = {"functions": [F, G]} | ({"function_call": choice} if choice else {})
    found = wishes(given)
    assert (found.shape.choice, found.shape.parallel) == (kind, False)
    assert (found.call_reason, found.tools) == (reason, TOOLS)
    assert admit(claimed(given)).prompt == admit(claimed({"tools": TOOLS})).prompt


@pytest.mark.parametrize(
    "params",
    [{"tools": TOOLS, "tool_choice": "none"}, {"functions": [F], "function_call": "none"}],
)
def test_tools_that_may_not_be_called_are_not_shown(params: dict[str, Any]) -> None:
    completion = admit(claimed(params))
    assert (completion.calls, completion.grammar) == (None, None)
    assert completion.prompt == admit(claimed()).prompt


def test_what_cannot_be_kept_to_is_said_or_refused() -> None:
    hard = {"type": "object", "not": {"required": ["a"]}}
    completion = admit(claimed(schema(hard)))
    assert completion.grammar is None and len(completion.warnings) == 1
    tools = [TOOLS[1], {"type": "function", "function": {"name": "h", "parameters": hard}}]
    assert len(admit(claimed({"tools": tools})).warnings) == 1


def test_tools_without_a_known_form_of_calls_fail_the_request() -> None:
    silent = replace(WORDING, calls=None)
    for params, name in (({"tools": TOOLS}, "tools"), ({"functions": [F]}, "functions")):
        with pytest.raises(RequestError, match=f"'{name}' cannot be used with this model"):
            to_completion(claimed(params), silent)
    free = claimed({"tools": TOOLS, "tool_choice": "none"})
    assert to_completion(free, silent).calls is None
