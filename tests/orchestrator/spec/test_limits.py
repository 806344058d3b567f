"""Limits: what is read, what is refused, and that those not given leave no trace."""

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job import JobSpec, parse_job
from orchestrator.spec.limits import Limits

TEXT = """\
name: a
model: tiny
params: {messages: [{role: user, content: Hello}], max_tokens: 3}
"""


def parsed(limits: str) -> JobSpec:
    text = TEXT + (f"limits: {limits}\n" if limits else "")
    return parse_job(text, file="a.yaml", root=Path.cwd())


@pytest.mark.parametrize(
    "limits, wanted",
    [
        ("", Limits()),
        ("{max_parallel: 4}", Limits(max_parallel=4)),
        ("{max_attempts: 1}", Limits(max_attempts=1)),
        ("{deadline: 45}", Limits(deadline=45.0)),
        ("{deadline: 0.5}", Limits(deadline=0.5)),
        ("{deadline: 45s}", Limits(deadline=45.0)),
        ("{deadline: 30m}", Limits(deadline=1800.0)),
        ("{deadline: 2h}", Limits(deadline=7200.0)),
        ("{deadline: 1.5h}", Limits(deadline=5400.0)),
        ("{deadline: 1d}", Limits(deadline=86400.0)),
        ("{deadline: 2030-01-31T18:00:00Z}", Limits(deadline_at="2030-01-31T18:00:00+00:00")),
        ('{deadline: "2030-01-31 18:00+02:00"}', Limits(deadline_at="2030-01-31T16:00:00+00:00")),
        ("{max_total_tokens: 9, max_parallel: 2}", Limits(9, 2)),
    ],
)
def test_limits_are_read(limits: str, wanted: Limits) -> None:
    assert parsed(limits).limits == wanted


@pytest.mark.parametrize(
    "deadline",
    ["0", "-1", "true", "soon", "2 h", "-2h", "0h", "1h30m", "2w", "11y", "4000d", "2030-01-31",
     "2030-01-31T18:00:00", "18:00Z", "[1]", "null", "0001-01-01T00:00:00+10:00", '"٣h"'],
)  # fmt: skip
def test_other_deadlines_are_refused(deadline: str) -> None:
    with pytest.raises(SpecError) as refused:
        parsed(f"{{deadline: {deadline}}}")
    assert refused.value.where == "a.yaml:4: limits.deadline"


@pytest.mark.parametrize("key", ["max_parallel", "max_attempts"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "'2'", "null", str(2**31)])
def test_other_numbers_are_refused(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"limits\.{key}: expected an integer from 1"):
        parsed(f"{{{key}: {value}}}")


def test_limits_not_given_leave_the_digest_as_it_was() -> None:
    """Jobs submitted before there were more limits are found again by `--resume`."""
    assert Limits().content() == {"max_total_tokens": None}
    assert Limits(7).content() == {"max_total_tokens": 7}
    given = Limits(7, max_parallel=2).content()
    assert given == {"max_total_tokens": 7, "max_parallel": 2}
    assert parsed("{max_parallel: 2}").digest != parsed("").digest


def test_what_is_stored_is_plain_json() -> None:
    stored = parsed("{deadline: 2h, max_parallel: 3}").to_json()["limits"]
    assert stored == {
        "max_total_tokens": None,
        "max_parallel": 3,
        "deadline": 7200.0,
        "deadline_at": None,
        "max_attempts": 5,
    }
