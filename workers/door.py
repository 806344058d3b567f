"""What only the model's files can tell of a plan: token ids in range, prompts that fit.

Refuses at the door what `admission` would let fail request by request. Needs the model's
tokenizer and chat template; knows nothing of sessions, devices or SQL.
"""

from orchestrator.errors import ParameterError, RequestError, SpecError
from orchestrator.spec.plan import Item, Plan, resolve
from workers.chat import ChatTemplate
from workers.tokenizer import Tokenizer


def check_plan(plan: Plan, template: ChatTemplate, tokenizer: Tokenizer, *, context: int) -> None:
    """Raises SpecError for a `logit_bias` beyond the vocabulary, or a prompt beyond `context`.

    `context` counts tokens of prompt and completion together. Messages are no sweep's parameter:
    each item is rendered and encoded once, against the largest `max_tokens` of all points.
    """
    most = _most_tokens(plan)
    for item in plan.items():
        if item.position == 0:
            _check_bias(plan, item, tokenizer.vocab_size)
        _check_length(plan, item, _length(plan, item, template, tokenizer), most, context)


def _most_tokens(plan: Plan) -> int:
    """The largest `max_tokens` of any point; 0 if none has one."""
    given = [{**plan.spec.params, **point.params}.get("max_tokens") for point in plan.points]
    return max((n for n in given if isinstance(n, int)), default=0)


def _check_bias(plan: Plan, item: Item, vocab_size: int) -> None:
    for point in plan.points:
        bias = resolve(plan.spec.params, point.params, item.columns, 0).logit_bias
        if bias and (largest := max(bias)) >= vocab_size:
            path = ("sweep",) if "logit_bias" in point.params else ("params", "logit_bias")
            raise ParameterError(
                f"Invalid key in 'logit_bias': {largest}. Maximum value is {vocab_size - 1}.",
                "logit_bias",
            ).at(plan.spec.document.where(*path))


def _length(plan: Plan, item: Item, template: ChatTemplate, tokenizer: Tokenizer) -> int:
    params = resolve(plan.spec.params, plan.points[0].params, item.columns, 0)
    try:
        return len(tokenizer.encode(template.render(list(params.messages))))
    except RequestError as error:
        expected = "messages that the model's chat template takes"
        raise SpecError(_where(plan, item), expected, str(error)) from error


def _check_length(plan: Plan, item: Item, length: int, asked: int, context: int) -> None:
    if length + max(asked, 1) > context:
        raise ParameterError(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{length + asked} tokens ({length} in the messages, {asked} in the completion). "
            "Please reduce the length of the messages or completion.",
            "messages",
            "context_length_exceeded",
        ).at(_where(plan, item))


def _where(plan: Plan, item: Item) -> str:
    place = plan.spec.document.where("params", "messages")
    return f"{place}: item {item.position} (custom_id {item.custom_id!r})"
