"""The device's sampler beside the host's: tokens, errors, log-probabilities, over random batches.

Logits lie in memory that is read by address (tests/host_room.py), in each of the types that models
have on GPUs.
"""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from orchestrator.errors import RequestError, WorkerError
from tests.host_room import HostRoom, open_session
from tests.sampling_law import bits
from workers.drawing.device_sampler import DeviceSampler
from workers.drawing.sampler import HostSampler, Sampled, SamplerRow, Sampling
from workers.drawing.sampler_graph import Variant, build
from workers.running.device_room import DeviceLogits, as_float32

SEED = 20260903
VOCAB, WIDTH = 290, 320
LONG = 9000


def put(room: HostRoom, x: NDArray[Any], kind: int) -> tuple[DeviceLogits, NDArray[np.float32]]:
    """Logits on the device in a type, and what they are there in float32."""
    if kind == TensorProto.BFLOAT16:
        raw = (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        raw = x.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32)
    logits = DeviceLogits(room, room.put(raw), kind, *x.shape)
    return logits, as_float32(raw.view(np.uint8), kind)


def sampler(vocab: int) -> tuple[DeviceSampler, HostRoom, HostSampler]:
    room, host = HostRoom(), HostSampler(vocab)
    return DeviceSampler(open_session, room, host), room, host


def random_row(rng: np.random.Generator, vocab: int, kind: str) -> SamplerRow:
    """`kind`: what the rows of the batch may have."""
    edited, masked, logged = (word in kind for word in ("edited", "masked", "logged"))
    sampling = Sampling(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.9])) if "drawn" in kind else 0.0,
        top_p=float(rng.choice([0.0, 0.4, 0.95, 1.0])),
        frequency_penalty=float(rng.choice([0.0, 0.7, -1.3])) if edited else 0.0,
        presence_penalty=float(rng.choice([0.0, 0.1])) if edited else 0.0,
        logit_bias=((3, 4.7), (vocab - 1, -100.0), (7, 0.1))
        if edited and rng.random() < 0.5
        else (),
        logprobs=bool(logged and rng.random() < 0.7),
        top_logprobs=int(rng.integers(0, 21)),
        seed=int(rng.integers(2**62)),
    )
    row = SamplerRow.resumed(sampling, 1, rng.integers(0, vocab, int(rng.integers(9))).tolist())
    if masked and rng.random() < 0.7:
        row.mask = bits(rng.choice(vocab, int(rng.choice([0, 1, 20])), replace=False), vocab)
    return row


def agree(mine: Sampled | RequestError, theirs: Sampled | RequestError) -> None:
    """The same token or error; log-probabilities within what a rough total is off."""
    if isinstance(theirs, RequestError):
        assert isinstance(mine, RequestError) and mine.code == theirs.code
        return
    assert isinstance(mine, Sampled) and mine.token == theirs.token
    assert [id for id, _ in mine.top] == [id for id, _ in theirs.top]
    if theirs.logprob is None:
        assert mine.logprob is None
        return
    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-6)
    assert [p for _, p in mine.top] == pytest.approx([p for _, p in theirs.top], abs=1e-6)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize(
    "what", ["greedy", "greedy logged", "greedy edited", "drawn", "drawn edited masked logged"]
)
def test_outcomes_are_those_of_the_host(kind: int, what: str) -> None:
    rng = np.random.default_rng(SEED)
    mine, room, host = sampler(VOCAB)
    for _ in range(8):
        x = rng.standard_normal((24, WIDTH)).astype(np.float32) * rng.choice([0.2, 3.0], (24, 1))
        x[rng.random(24) < 0.05] = np.nan
        x[:, VOCAB:] = np.nan
        logits, wide = put(room, x, kind)
        np.testing.assert_array_equal(np.asarray(logits), wide)
        indices = np.flatnonzero(rng.random(24) < 0.7).tolist()
        rows = [random_row(rng, VOCAB, what) for _ in indices]
        outcomes = mine.sample(logits, indices, rows)
        for one, other in zip(outcomes, host.sample(wide, indices, rows), strict=True):
            agree(one, other)
    assert mine.fallen_back < mine.sampled / 3, f"seed {SEED}"


def test_the_list_of_a_long_row_is_enough_or_the_host_is_asked() -> None:
    rng = np.random.default_rng(SEED)
    mine, room, host = sampler(LONG)
    for scale in (0.1, 3.4):
        x = rng.standard_normal((24, LONG)) * scale
        logits, wide = put(room, x, TensorProto.BFLOAT16)
        rows = [random_row(rng, LONG, "drawn edited masked logged") for _ in range(24)]
        before = mine.fallen_back
        outcomes = mine.sample(logits, range(24), rows)
        for one, other in zip(outcomes, host.sample(wide, list(range(24)), rows), strict=True):
            agree(one, other)
        fallen = mine.fallen_back - before
        assert (fallen > 2) if scale == 0.1 else (fallen < 12), f"{scale}: {fallen}, seed {SEED}"


def test_ties_among_the_most_probable_are_broken_by_id() -> None:
    """Some ties end where the reported tokens end, and then the host is asked."""
    rng = np.random.default_rng(SEED)
    for vocab in (VOCAB, LONG):
        mine, room, host = sampler(vocab)
        x = rng.integers(0, 5, (8, vocab)) + rng.random((8, 1))
        x[:4, rng.choice(vocab, 12, replace=False)] += 6
        logits, wide = put(room, x, TensorProto.FLOAT)
        sampling = Sampling(0.0, logprobs=True, top_logprobs=20)
        rows = [SamplerRow(sampling) for _ in range(8)]
        outcomes = mine.sample(logits, range(8), rows)
        for one, other in zip(outcomes, host.sample(wide, list(range(8)), rows), strict=True):
            agree(one, other)


def test_a_replay_reports_the_same_numbers_again() -> None:
    """Bitwise, whoever chose the token at first: also where that was the host."""
    rng = np.random.default_rng(SEED)
    mine, room, host = sampler(LONG)
    x = rng.standard_normal((16, LONG)) * rng.choice([0.1, 3.0], (16, 1))
    x[3, 70] = np.nan
    logits, wide = put(room, x, TensorProto.FLOAT16)
    rows = [
        SamplerRow(Sampling(1.3, 0.9, logprobs=i % 2 == 0, top_logprobs=i, seed=i))
        for i in range(16)
    ]
    drawn = mine.sample(logits, range(16), rows)
    again, _ = put(room, x, TensorProto.FLOAT16)  # the next step's object
    for i, (row, outcome) in enumerate(zip(rows, drawn, strict=True)):
        token = outcome.token if isinstance(outcome, Sampled) else 5
        scored = mine.score(again, i, row, token)
        if i == 3:
            assert isinstance(outcome, RequestError) and isinstance(scored, RequestError)
            assert outcome.code == scored.code == "nan_logits"
            continue
        assert scored == outcome
        agree(scored, host.score(wide, i, row, token))
    assert mine.fallen_back > 2


def test_logits_of_prompts_are_the_hosts() -> None:
    mine, _, host = sampler(VOCAB)
    x = np.random.default_rng(SEED).standard_normal((3, WIDTH)).astype(np.float32)
    rows = [SamplerRow(Sampling(seed=i, logprobs=True, top_logprobs=3)) for i in range(3)]
    assert mine.sample(x, [0, 1, 2], rows) == host.sample(x, [0, 1, 2], rows)
    assert mine.score(x, 1, rows[1], 9) == host.score(x, 1, rows[1], 9)
    assert mine.sampled == 0
    assert mine.sample(DeviceLogits(HostRoom(), 0, 1, 3, WIDTH), [], []) == []


def test_a_device_that_fails_is_the_machines_fault() -> None:
    class Session:
        def io_binding(self) -> Any:
            return open_session(build(Variant(1, WIDTH, VOCAB, "greedy"))).io_binding()

        def run_with_iobinding(self, _: object) -> None:
            raise RuntimeError("CUDA failure 2: out of memory")

    room = HostRoom()
    mine = DeviceSampler(lambda _: Session(), room, HostSampler(VOCAB))
    logits, _ = put(room, np.zeros((1, WIDTH)), TensorProto.FLOAT)
    with pytest.raises(WorkerError, match="out of memory") as caught:
        mine.sample(logits, [0], [SamplerRow(Sampling(0.0))])
    assert caught.value.code == "memory"


def test_logits_know_their_rows() -> None:
    room = HostRoom()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    logits, _ = put(room, x, TensorProto.FLOAT)
    assert logits.shape == (3, 4) and len(logits) == 3
    np.testing.assert_array_equal(logits.fetch([2, 0]), x[[2, 0]])
    assert np.asarray(logits, np.float64).dtype == np.float64
    for outside in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            logits.address_of(outside)
    with pytest.raises(ValueError, match="have to be copied"):
        np.array(logits, copy=False)


def test_a_token_of_no_mass_has_the_lowest_logprob() -> None:
    mine, room, _ = sampler(VOCAB)
    x = np.full((1, WIDTH), -1e6)
    x[0, 4] = 0.0
    logits, _ = put(room, x, TensorProto.FLOAT)
    row = SamplerRow(Sampling(0.0, logprobs=True, top_logprobs=2))
    scored = mine.score(logits, 0, row, 9)
    assert isinstance(scored, Sampled) and scored.logprob == -9999.0
    assert scored.top == ((4, 0.0), (0, -9999.0)) and not math.copysign(1, scored.top[0][1]) < 0
