"""A claimed request -> what the engine admits: parameters resolved, template rendered, tokens made.

Knows the seam between what was asked (orchestrator.spec) and what is computed; nothing of SQL
connections, slots or devices.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from orchestrator.db.store import Claimed
from orchestrator.errors import ParameterError, RequestError
from orchestrator.spec.params import ChatParams
from orchestrator.spec.plan import resolve
from workers.drawing.sampler import Sampling
from workers.engine.events import Choice, Completion
from workers.loading.wording import Wording
from workers.shapes import Asked, Form, asked, form


def to_completion(claimed: Claimed, wording: Wording) -> Completion:
    """The completion of a claim; raises RequestError where its parameters or prompt are wrong."""
    tokenizer = wording.tokenizer
    params = _resolve(claimed, tokenizer.vocab_size)
    wishes = asked(params)
    held_to = _form(wishes, wording)
    # The request's own time, not the clock's: a template that writes the date renders the same
    # prompt on every attempt.
    created = datetime.fromtimestamp(claimed.created, UTC)
    text = wording.template.render(list(params.messages), wishes.tools, now=created)
    prompt = tokenizer.encode(text)
    return Completion(
        id=claimed.request_id,
        prompt=tuple(prompt),
        sampling=_sampling(params, prompt_seed(claimed.seed, prompt)),
        choices=tuple(
            Choice(c.choice, tuple(c.token_ids.tolist()))
            for c in claimed.choices
            if c.finish_reason is None
        ),
        max_tokens=params.max_tokens,
        stops=params.stop or (),
        grammar=held_to.grammar,
        calls=held_to.calls,
        call_reason=wishes.call_reason,
        warnings=held_to.warnings,
        urgent=claimed.urgent,
    )


def prompt_seed(seed: int, prompt: Sequence[int]) -> int:
    """The sampler's key for a request's seed: 64 bits of a hash of the seed and the prompt's ids.

    The same request with the same seed draws the same numbers, at every point of a sweep too; two
    items with the same seed draw numbers of their own. Keyed by the bare seed, all items of a
    swept seed would share each position's random number, and their errors would not be
    independent (docs/decisions/0007-seeds.md).
    """
    key = np.asarray([seed % 2**64, *prompt], dtype="<u8").tobytes()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _resolve(claimed: Claimed, vocab_size: int) -> ChatParams:
    try:
        return resolve(
            claimed.params,
            claimed.point_params,
            claimed.columns,
            claimed.seed,
            verbatim=claimed.verbatim,
            vocab_size=vocab_size,
        )
    except ParameterError as error:
        raise _refused(error) from error


def _form(wishes: Asked, wording: Wording) -> Form:
    try:
        return form(wishes, wording)
    except ParameterError as error:
        raise _refused(error) from error


def _refused(error: ParameterError) -> RequestError:
    return RequestError(error.code or "invalid_request", error.message)


def _sampling(params: ChatParams, seed: int) -> Sampling:
    bias = params.logit_bias or {}
    return Sampling(
        temperature=1.0 if params.temperature is None else params.temperature,
        top_p=1.0 if params.top_p is None else params.top_p,
        frequency_penalty=params.frequency_penalty or 0.0,
        presence_penalty=params.presence_penalty or 0.0,
        logit_bias=tuple(sorted((int(token), float(value)) for token, value in bias.items())),
        logprobs=bool(params.logprobs),
        top_logprobs=params.top_logprobs or 0,
        seed=seed,
    )
