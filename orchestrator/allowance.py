"""How much one submission over HTTP may ask for: `n`, requests, completion tokens.

What the machine's own files may ask for stands in `spec.plan`. Knows nothing of who asks or how.
"""

from typing import Any

from orchestrator.errors import ParameterError
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan


def check(plan: Plan, settings: Settings) -> None:
    """Refuse what is larger than the settings let in. Raises SpecError, ParameterError.

    Lines of a batch and chats were asked for their `n` one by one.
    """
    if not plan.verbatim:
        _check_choices(plan, settings.max_choices)
    if plan.n_requests > settings.max_requests:
        expected = f"at most {settings.max_requests} requests"
        raise plan.spec.document.refusal((), expected, str(plan.n_requests))
    if settings.max_total_tokens:
        _check_tokens(plan, settings.max_total_tokens, settings.max_context)


def _check_choices(plan: Plan, most: int) -> None:
    common: Any = plan.spec.params.get("n")
    for point in plan.points:
        n = point.params.get("n", common)
        if isinstance(n, int) and n > most:
            raise ParameterError(
                f"Invalid 'n': integer above maximum value. Expected a value <= {most}, "
                f"but got {n} instead.",
                "n",
                "integer_above_max_value",
            )


def _check_tokens(plan: Plan, most: int, context: int) -> None:
    """Where one completion has no `max_tokens`, all count as long as the context is."""
    total, hint = plan.max_total_tokens, ""
    if total is None:
        total = plan.n_choices * context
        hint = f"; without 'max_tokens' a completion counts as {context}"
    if total > most:
        raise ParameterError(
            f"Invalid 'max_tokens': expected at most {most} completion tokens in all, but got up "
            f"to {total} in {plan.n_choices} completions{hint}.",
            "max_tokens",
            "integer_above_max_value",
        )
