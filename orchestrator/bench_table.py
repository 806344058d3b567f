"""The tables of `penstock bench`: facts, decoding by rows, prompts by length.

Knows the shape of what `benching.py` measured, which is what `--json` prints; measures nothing.
"""

from collections.abc import Mapping
from typing import Any

from orchestrator import terminal
from orchestrator.terminal import say

_DECODE = (
    *("rows", "tokens/s", "least", "most", "ms between tokens", "p99"),
    *("bare tokens/s", "overhead", "limit", "of it"),
)
_PREFILL = (
    *("prompt", "tokens/s", "least", "most", "first token ms", "most"),
    *("limit", "of it"),
)


def print_bench(shown: Mapping[str, Any]) -> None:
    """The same figures: facts, then decode, then prompts."""
    terminal.print_table(("fact", "value"), _fact_rows(shown), left=2)
    say("")
    terminal.print_table(_DECODE, [_decode_row(each) for each in shown["decode"]], left=0)
    say("")
    terminal.print_table(_PREFILL, [_prefill_row(each) for each in shown["prefill"]], left=0)


def _fact_rows(shown: Mapping[str, Any]) -> list[list[str]]:
    machine, memory, chosen = shown["machine"], shown["memory"], shown["calibration"]
    spinning = "spinning" if chosen["spinning"] else "not spinning"
    rows = [
        ["model", shown["model"]],
        ["measured", f"{shown['at']}, " + ", ".join(map(" ".join, shown["versions"].items()))],
        ["machine", f"{machine['cpu']}, {machine['cores']} processors to use"],
        ["device", shown["device"]],
        [
            "calibration",
            f"{chosen['source']}: threads {chosen['threads']}, {spinning}, "
            f"slots {chosen['slots']}, chunk {chosen['chunk']}",
        ],
        [
            "memory",
            f"{memory['resident_bytes'] / 1e6:,.0f} MB resident; KV "
            f"{memory['kv_bytes_per_token']:,} bytes a token, "
            f"{memory['kv_bytes_per_slot'] / 1e6:,.1f} MB a slot of "
            f"{memory['context_length']} tokens; {memory['slots']} slots",
        ],
    ]
    if (found := shown["ceilings"]) is not None:
        rows.append(
            [
                "ceilings",
                f"reads {found['read_bandwidth'] / 1e9:.1f} GB/s; multiplies fp32 "
                f"{found['fp32_rate'] / 1e9:.0f}, int4 {found['int4_rate'] / 1e9:.0f} GFLOP/s",
            ]
        )
    others = f"took {shown['others_share']:.0%} of the processors while this was measured"
    return [*rows, ["other processes", others]]


def _decode_row(each: Mapping[str, Any]) -> list[str]:
    return [
        str(each["rows"]),
        *(_speed(each["tokens_per_second"][key]) for key in ("median", "least", "most")),
        f"{each['gap_p50_ms']:.2f}",
        f"{each['gap_p99_ms']:.2f}",
        _speed(each["bare_tokens_per_second"]["median"]),
        f"{each['overhead']:+.1%}",
        *_limit(each),
    ]


def _prefill_row(each: Mapping[str, Any]) -> list[str]:
    return [
        str(each["tokens"]),
        *(_speed(each["tokens_per_second"][key]) for key in ("median", "least", "most")),
        f"{each['first_token_ms']['median']:.1f}",
        f"{each['first_token_ms']['most']:.1f}",
        *_limit(each),
    ]


def _limit(each: Mapping[str, Any]) -> tuple[str, str]:
    return (each["limit"], f"{each['fraction']:.0%}") if each["limit"] else ("not known", "")


def _speed(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
