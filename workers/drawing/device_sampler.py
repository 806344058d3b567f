"""Samples logits where they lie: a step fetches a token a row, and what log-probabilities need.

The graphs of sampler_graph.py run on the model's device. A row for which a graph has no token (its
decision hangs on rounding, or on tokens beyond the list that the graph looks at) is fetched, and
the host samples it: the tokens are the host's in every case. Logits that are on the host already,
those of prompts, are the host's too. Knows rows and parameters, nothing of models or requests.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import RequestError
from workers.drawing.drawing_graph import PARAMS, scales
from workers.drawing.philox import uniform
from workers.drawing.sampler import (
    GREEDY_BELOW,
    LOWEST_LOGPROB,
    HostSampler,
    Sampled,
    SamplerRow,
    Sampling,
)
from workers.drawing.sampler_graph import FACTS, NONE, TOP, Variant, build, mask_bytes
from workers.running.device_room import DeviceLogits, Room
from workers.running.host import failure

Logits = NDArray[np.float32]
_scales = lru_cache(maxsize=4096)(scales)


class DeviceSampler:
    """Not for several threads at once: one engine's."""

    def __init__(self, open_session: Callable[[bytes], Any], room: Room, host: HostSampler) -> None:
        """`open_session` opens a graph on the device of `room` (Device.open_session)."""
        self._open, self._room, self._host = open_session, room, host
        self._sessions: dict[Variant, Any] = {}
        self._sound: tuple[DeviceLogits, NDArray[np.bool_]] | None = None
        self.sampled = self.fallen_back = 0  # rows; and those of them that the host sampled

    def sample(
        self, logits: DeviceLogits | Logits, indices: Sequence[int], rows: Sequence[SamplerRow]
    ) -> list[Sampled | RequestError]:
        """One token for each of `rows`; `rows[k]` goes with row `indices[k]` of `logits`.

        As HostSampler.sample, and the same tokens.
        """
        if isinstance(logits, np.ndarray):
            return self._host.sample(logits, indices, rows)
        if not rows:
            return []
        variant = self._variant(logits, rows)
        seats = dict(zip(indices, rows, strict=True))
        out = self._run(variant, logits, _inputs(variant, logits.rows, seats))
        left = [i for i in indices if out[i, 0] == NONE]
        asked = logits.fetch(left), range(len(left)), [seats[i] for i in left]
        fallen = dict(zip(left, self._host.sample(*asked), strict=True))
        self.sampled += len(rows)
        self.fallen_back += len(left)
        return [self._outcome(logits, i, seats[i], out[i], fallen.get(i)) for i in indices]

    def score(
        self, logits: DeviceLogits | Logits, index: int, row: SamplerRow, token: int
    ) -> Sampled | RequestError:
        """`token` as `sample` would have reported it: for a choice that replays its tokens."""
        if isinstance(logits, np.ndarray):
            return self._host.score(logits, index, row, token)
        if not self._is_sound(logits)[index]:
            return self._host.score(logits.fetch([index]), 0, row, token)
        if not row.sampling.logprobs:
            return Sampled(token)
        width, vocab = logits.width, self._host.vocab_size
        variant = Variant(logits.kind, width, vocab, "given", logprobs=True)
        one = DeviceLogits(self._room, logits.address_of(index), logits.kind, 1, width)
        facts = self._run(variant, one, {"wanted": np.array([[token]], np.int64)})[0]
        return self._with_logprobs(logits, index, row.sampling, token, facts)

    def _is_sound(self, logits: DeviceLogits) -> NDArray[np.bool_]:
        """Which rows have a finite largest logit and no NaN; looked up once a step."""
        if self._sound is None or self._sound[0] is not logits:
            variant = Variant(logits.kind, logits.width, self._host.vocab_size, "given")
            wanted = {"wanted": np.zeros((logits.rows, 1), np.int64)}
            self._sound = logits, self._run(variant, logits, wanted)[:, 0] != NONE
        return self._sound[1]

    def _variant(self, logits: DeviceLogits, rows: Sequence[SamplerRow]) -> Variant:
        return Variant(
            logits.kind,
            logits.width,
            self._host.vocab_size,
            "greedy" if all(_is_greedy(row.sampling) for row in rows) else "drawn",
            adjusted=any(_is_edited(row) for row in rows),
            masked=any(row.mask is not None for row in rows),
            logprobs=any(row.sampling.logprobs for row in rows),
        )

    def _run(
        self, variant: Variant, logits: DeviceLogits, inputs: dict[str, NDArray[Any]]
    ) -> NDArray[np.float64]:
        if variant not in self._sessions:
            self._sessions[variant] = self._open(build(variant))
        session = self._sessions[variant]
        columns = FACTS + 2 * TOP if variant.logprobs else 1
        out = np.empty((logits.rows, columns), np.float64)
        binding = session.io_binding()
        room = self._room
        binding.bind_input(
            "logits", room.type, room.index, logits.kind, logits.shape, logits.address
        )
        for name, values in inputs.items():
            binding.bind_cpu_input(name, values)
        binding.bind_output("out", "cpu", 0, np.float64, out.shape, out.ctypes.data)
        binding.synchronize_inputs()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own C++ classes, one for each status
            raise failure(error) from error
        return out

    def _outcome(
        self,
        logits: DeviceLogits,
        index: int,
        row: SamplerRow,
        facts: NDArray[np.float64],
        fallen: Sampled | RequestError | None,
    ) -> Sampled | RequestError:
        """`fallen`: what the host made of a row for which the graph had no token."""
        if isinstance(fallen, RequestError):
            return fallen
        token = int(facts[0]) if fallen is None else fallen.token
        if not row.sampling.logprobs:
            return Sampled(token)
        return self._with_logprobs(logits, index, row.sampling, token, facts)

    def _with_logprobs(
        self,
        logits: DeviceLogits,
        index: int,
        sampling: Sampling,
        token: int,
        facts: NDArray[np.float64],
    ) -> Sampled:
        """The token's log-probability and the most probable ones from a row of the output.

        They follow from the same sum whoever chose the token, so a replay reports them again.
        """
        peak, at = float(facts[2]), float(facts[3])
        log_total = math.log(facts[1])

        def logprob(x: float) -> float:
            return max((x - peak) - log_total, LOWEST_LOGPROB)

        top = self._top(facts, sampling.top_logprobs, logits.width)
        if top is None or int(facts[0]) == NONE:
            fetched = logits.fetch([index])
            at = float(fetched[0, token])
            scored = self._host.score(fetched, 0, SamplerRow(sampling), token)
            assert isinstance(scored, Sampled)  # noqa: S101  only rows of finite logits come here
            top = [(id, float(fetched[0, id])) for id, _ in scored.top]
        return Sampled(token, logprob(at), tuple((id, logprob(x)) for id, x in top))

    def _top(
        self, facts: NDArray[np.float64], n: int, width: int
    ) -> list[tuple[int, float]] | None:
        """The n most probable by (logit descending, id), and their logits; None: not all are there.

        Of tokens as large as the cover, or as the last one reported, some may be missing.
        """
        cover, values = float(facts[4]), facts[FACTS : FACTS + TOP].tolist()
        ids = facts[FACTS + TOP :].astype(np.int64).tolist()
        known = [(x, id) for x, id in zip(values, ids, strict=True) if 0 <= id < self._vocab]
        found = [(id, x) for x, id in sorted(known, key=lambda pair: (-pair[0], pair[1]))[:n]]
        if width <= TOP or n == 0 or (len(found) == n and found[-1][1] > cover):
            return found
        return None

    @property
    def _vocab(self) -> int:
        return self._host.vocab_size


def sampler_of(runner: Any, vocab_size: int) -> HostSampler | DeviceSampler:
    """The sampler that goes with a runner: where its logits lie."""
    host = HostSampler(vocab_size, getattr(runner, "threads", 1))
    place: Any = getattr(runner, "place", None)
    room = getattr(place, "room", None)
    return host if room is None else DeviceSampler(place.open_session, room, host)


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < GREEDY_BELOW or sampling.top_p <= 0


def _is_edited(row: SamplerRow) -> bool:
    sampling = row.sampling
    penalised = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return bool(sampling.logit_bias or (penalised and row.counts))


def _inputs(variant: Variant, batch: int, rows: dict[int, SamplerRow]) -> dict[str, NDArray[Any]]:
    """What the graph wants beside the logits; rows nobody asked for are sampled greedily."""
    inputs: dict[str, NDArray[Any]] = {}
    if variant.choose == "drawn":
        params = np.zeros((batch, PARAMS), np.float64)
        params[:] = _GREEDY
        for i, row in rows.items():
            params[i] = _params(row)
        inputs["params"] = params
    if variant.adjusted:
        inputs["ids"], inputs["edits"] = _edits(batch, rows)
    if variant.masked:
        mask = np.full((batch, mask_bytes(variant.vocab)), 0xFF, np.uint8)
        for i, row in rows.items():
            if row.mask is not None:
                mask[i] = row.mask.view(np.uint8)[: mask.shape[1]]
        inputs["mask"] = mask
    return inputs


_GREEDY = (1.0, 0.0, 0.0, *scales(1.0))


def _params(row: SamplerRow) -> tuple[float, ...]:
    sampling = row.sampling
    if _is_greedy(sampling):
        return _GREEDY
    u = uniform(sampling.seed, row.choice, row.position)
    return sampling.temperature, sampling.top_p, u, *_scales(sampling.temperature)


def _edits(
    batch: int, rows: dict[int, SamplerRow]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids [batch, K] and what is done to their logits [batch, K, 2]: minus, plus."""
    edited = {i: edits for i, row in rows.items() if (edits := _edits_of(row))}
    most = max(map(len, edited.values()), default=1)
    wide = 1 << (most - 1).bit_length()  # few shapes, so that the device's memory is reused
    ids, numbers = np.zeros((batch, wide), np.int64), np.zeros((batch, wide, 2), np.float64)
    for i, each in edited.items():
        ids[i, : len(each)] = list(each)
        numbers[i, : len(each)] = list(each.values())
        ids[i, len(each) :], numbers[i, len(each) :] = ids[i, 0], numbers[i, 0]
    return ids, numbers


def _edits_of(row: SamplerRow) -> dict[int, tuple[float, float]]:
    sampling = row.sampling
    edits: dict[int, tuple[float, float]] = {}
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token, count in row.counts.items():
            edits[token] = count * sampling.frequency_penalty + sampling.presence_penalty, 0.0
    for token, bias in sampling.logit_bias:
        edits[token] = edits.get(token, (0.0, 0.0))[0], bias
    return edits
