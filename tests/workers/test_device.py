"""A runner and a sampler on a device: the same numbers and tokens as on the host.

The device is one of parts: the model's session on the processor, and memory by address
(tests/host_room.py). So every address, pitch and binding is real; what is not is a GPU.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import WorkerError
from tests.host_room import HostRoom
from workers.drawing.device_sampler import DeviceSampler, sampler_of
from workers.drawing.sampler import HostSampler, Sampling
from workers.engine.engine import Choice, Completion, Engine, Tokens
from workers.folders.folder import TINY
from workers.folders.prepare import LAST, LENGTHS, POSITIONS, TOTAL
from workers.loading.wording import Wording
from workers.running import device as devices
from workers.running.device import Device, parse
from workers.running.device_feeds import DeviceFeeds
from workers.running.device_kv import DeviceMemory
from workers.running.device_room import DeviceLogits
from workers.running.host import open_session
from workers.running.runner import Runner

SEED = 20260902
SLOTS, LENGTH = 6, 128
PROMPTS = [[5, 9, 23, 40], [7, 7, 300], list(range(3, 90)), [11] * 33]

OnDevice = Callable[..., Runner]


@pytest.fixture
def room() -> HostRoom:
    return HostRoom()


@pytest.fixture
def on_device(room: HostRoom, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    def open_runner(deterministic: bool = False, **fields: Any) -> Runner:
        def parts(graph: bytes, *_: Any, weights: Path, **__: Any) -> Device:
            session = open_session(graph, threads=1, weights=weights)
            return Device(session, room, line="parts", graphs=False, deterministic=deterministic)

        with monkeypatch.context() as patch:
            patch.setattr(Device, "open", parts)
            sizes = {"slots": SLOTS, "max_length": LENGTH, "staging": 2} | fields
            return Runner(TINY, device="cuda", **sizes)

    return open_runner


@pytest.fixture(scope="module")
def host() -> Iterator[Runner]:
    runner = Runner(TINY, slots=SLOTS, max_length=LENGTH, staging=2, threads=1)
    yield runner
    runner.close()


def steps(runner: Runner, prompts: Sequence[Sequence[int]], count: int) -> list[Any]:
    """All logits of prefill and greedy decode steps of ragged rows."""
    logits = np.stack([runner.prefill(row, prompt) for row, prompt in enumerate(prompts)])
    lengths = [len(prompt) for prompt in prompts]
    seen = [logits]
    for _ in range(count):
        logits = np.array(runner.decode(logits.argmax(axis=1), lengths))
        lengths = [length + 1 for length in lengths]
        seen.append(logits)
    return seen


@pytest.mark.parametrize("deterministic", [False, True])
def test_logits_are_those_of_the_host(
    on_device: OnDevice, host: Runner, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "GRAIN", 16)
    runner = on_device(deterministic)
    assert runner.grain == (16 if deterministic else 1)
    for mine, theirs in zip(steps(runner, PROMPTS, 8), steps(host, PROMPTS, 8), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    together = runner.prefill_together(1, PROMPTS)
    np.testing.assert_array_equal(together, host.prefill_together(1, PROMPTS))
    runner.resize(2)
    for mine, theirs in zip(
        steps(runner, PROMPTS[:2], 3), steps(host, PROMPTS[:2], 3), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_calls_of_one_shape_keep_the_law_of_chunks(
    on_device: OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In grains, prompts cut anywhere between them and continued from a copy are the same."""
    monkeypatch.setattr(devices, "GRAIN", 16)
    runner, prompt = on_device(deterministic=True), list(range(3, 73))
    whole = runner.prefill(0, prompt)
    runner.extend(1, prompt[:32], 0)
    np.testing.assert_array_equal(runner.prefill(1, prompt[32:], 32), whole)
    runner.copy(1, 2, 48)
    np.testing.assert_array_equal(runner.prefill(2, prompt[48:], 48), whole)
    with pytest.raises(ValueError, match="multiples of 16"):
        runner.prefill(2, prompt[40:], 40)


class Bound:
    """A binding that keeps what it is given."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def bind_cpu_input(self, name: str, values: Any) -> None:
        self.values[name] = values

    def bind_input(self, name: str, *_: Any) -> None:
        self.values[name] = None

    bind_output = bind_input


@pytest.mark.parametrize("grain", [1, 16])
def test_prompts_of_a_device_that_keeps_the_law_have_one_shape(room: HostRoom, grain: int) -> None:
    feeds = DeviceFeeds(room, 4, 64, 300, "tensor(float16)", positions=True, grain=grain)
    width = 16 if grain > 1 else 3
    for start, head in ((0, False), (32, True)):
        binding = Bound()
        feeds.bind_prompt(binding, [[4, 5, 6]], start, head)
        given = binding.values
        assert given["input_ids"].tolist() == [[4, 5, 6] + [0] * (width - 3)]
        assert given[LENGTHS].tolist() == [start + width - 1]
        assert int(given[TOTAL]) == start + width and given[LAST].tolist() == [[2]]
        assert given[POSITIONS].tolist() == [list(range(start, start + width))]
        assert ("logits" in given) == head
    feeds.close()
    assert not room.held


def test_rows_behind_those_that_decode_write_where_nobody_reads(room: HostRoom) -> None:
    feeds = DeviceFeeds(room, 4, 64, 300, "tensor(float)", positions=True, grain=1)
    address = next(iter(room.held))
    block = np.empty(4 * (8 + 8 + 4), np.uint8)
    for tokens, lengths in (([7, 8, 9], [30, 20, 10]), ([5], [31])):
        feeds.step(tokens, lengths)
        room.download(block, address)
        behind = [0] * (4 - len(tokens))
        assert block[:32].view(np.int64).tolist() == tokens + behind
        assert block[32:64].view(np.int64).tolist() == lengths + behind
        assert block[64:].view(np.int32).tolist() == lengths + behind


def test_rows_are_copied_read_and_written_in_place(room: HostRoom) -> None:
    """Random copies, blocks and their writing back, beside the same on arrays."""
    rng = np.random.default_rng(SEED)
    kinds = {"key": "tensor(float)", "value": "tensor(float16)", "wide": "tensor(bfloat16)"}
    present = {name: f"present.{name}" for name in kinds}
    rows, heads, length, size = 5, 3, 40, 8
    memory = DeviceMemory(room, kinds, present, rows, heads, length, size)
    dtypes = {"key": np.float32, "value": np.float16, "wide": np.uint16}
    model = {}
    for (name, dtype), address in zip(dtypes.items(), list(room.held), strict=True):
        fresh = np.empty((rows, heads, length, size), dtype)
        room.download(fresh, address)
        assert not fresh.any()
        model[name] = rng.integers(1, 9999, fresh.shape).astype(dtype)
        room.upload(address, model[name])
    assert memory.bytes_per_token == heads * size * (4 + 2 + 2)
    assert memory.nbytes == sum(array.nbytes for array in model.values())
    held = list(room.held)
    blocks: list[tuple[Any, int, dict[str, Any]]] = []
    for _ in range(200):
        row, other = (int(i) for i in rng.integers(rows, size=2))
        start, end = sorted(int(i) for i in rng.choice(length + 1, 2, replace=False))
        match int(rng.integers(3)):
            case 0 if row != other:
                memory.copy(row, other, end)
                for array in model.values():
                    array[other, :, :end] = array[row, :, :end]
            case 1:
                block = memory.read(row, start, end)
                assert (block.length, block.nbytes) == (
                    end - start,
                    (end - start) * memory.bytes_per_token,
                )
                copies = {name: array[row, :, start:end].copy() for name, array in model.items()}
                blocks = [*blocks[-3:], (block, start, copies)]
            case _ if blocks:
                block, at, copies = blocks[int(rng.integers(len(blocks)))]
                memory.write(other, at, block)
                for name, array in model.items():
                    array[other, :, at : at + block.length] = copies[name]
    for name, address in zip(model, held, strict=True):
        now = np.empty_like(model[name])
        room.download(now, address)
        np.testing.assert_array_equal(now, model[name], err_msg=f"seed {SEED}, {name}")
    del blocks, block
    gc.collect()
    assert list(room.held) == held, "a block's memory outlived it"
    memory.close()
    assert not room.held


def test_memory_that_cannot_be_had_leaves_nothing_behind(room: HostRoom) -> None:
    kinds = {f"past.{i}": "tensor(float16)" for i in range(4)}
    present = {name: f"now.{name}" for name in kinds}
    real, asked = room.allocate, []

    def allocate(size: int) -> int:
        asked.append(size)
        if len(asked) == 3:
            raise WorkerError("memory", "cudaMalloc: out of memory")
        return real(size)

    room.allocate = allocate  # type: ignore[method-assign]
    with pytest.raises(WorkerError, match=r"no memory for 2 rows of 2097152 tokens, \d+ MiB") as e:
        DeviceMemory(room, kinds, present, 2, 1, 2**21, 2)
    assert e.value.code == "memory" and not room.held and len(asked) == 3
    with pytest.raises(WorkerError, match="of type tensor\\(int8\\)"):
        DeviceMemory(room, {"past": "tensor(int8)"}, {"past": "now"}, 1, 1, 1, 1)


def test_an_engine_on_a_device_makes_the_same_tokens(on_device: OnDevice, host: Runner) -> None:
    """Penalties, bias, log-probabilities, several choices, prompts that share a beginning."""
    wording = Wording.load(TINY)
    vocab = wording.tokenizer.vocab_size
    rng = np.random.default_rng(SEED)
    common = rng.integers(3, vocab, 40).tolist()
    completions = []
    for id in range(14):
        sampling = Sampling(
            temperature=float(rng.choice([0.0, 0.7, 1.0, 1.8])),
            top_p=float(rng.choice([0.3, 0.95, 1.0])),
            frequency_penalty=float(rng.choice([0.0, 0.5])),
            presence_penalty=float(rng.choice([0.0, -0.3])),
            logit_bias=((5, 3.0), (9, -100.0)) if id % 4 == 0 else (),
            logprobs=id % 3 == 0,
            top_logprobs=5 if id % 3 == 0 else 0,
            seed=id,
        )
        begun = tuple(rng.integers(3, vocab, 4).tolist()) if id % 5 == 0 else ()
        choices = (Choice(0, begun), Choice(1))
        prompt = (*common[: 10 + 2 * id], id + 3)
        completions.append(Completion(id, prompt, sampling, choices, 12))

    def tokens_of(runner: Runner, sampler: Any) -> dict[tuple[int, int], list[Any]]:
        engine = Engine(runner, wording.tokenizer, wording.eos, sampler)
        for completion in completions:
            engine.admit(completion)
        found: dict[tuple[int, int], list[Any]] = {}
        while not engine.idle:
            for event in engine.step():
                if isinstance(event, Tokens):
                    found.setdefault((event.id, event.choice), []).extend(event.tokens)
        return found

    runner = on_device()
    sampler = sampler_of(runner, vocab)
    assert isinstance(sampler, DeviceSampler) and isinstance(sampler_of(host, vocab), HostSampler)
    mine, theirs = tokens_of(runner, sampler), tokens_of(host, sampler_of(host, vocab))
    assert mine == theirs, f"seed {SEED}"
    assert sampler.sampled > 100 and sampler.fallen_back < sampler.sampled / 4
    assert isinstance(runner.decode([3], [1]), DeviceLogits)


def test_decode_calls_are_captured_by_their_size_and_memory(room: HostRoom) -> None:
    ids: list[str] = []

    class Session:
        def run_with_iobinding(self, _: object, options: Any) -> None:
            ids.append(options.get_run_config_entry("gpu_graph_id"))

    class Binding:
        def synchronize_inputs(self) -> None: ...

    device = Device(Session(), room, line="", graphs=True, deterministic=False)
    assert [device.padded(n, 20) for n in (1, 2, 3, 5, 8, 9, 16, 17, 20)] == [
        *(1, 2, 4, 8, 8),
        *(16, 16, 20, 20),
    ]
    cache = {}, {}, 1, 1, 1, 1, None
    for _ in range(2):
        device.memory(*cache)
        device.run(Binding(), 4)
        device.run(Binding(), 8)
    device.run(Binding(), None)
    device.run_part(Binding())
    assert len(set(ids[:4])) == 4 and ids[4:] == ["-1", "-1"]
    still = Device(Session(), room, line="", graphs=True, deterministic=True)
    assert [still.padded(n, 20) for n in (1, 20)] == [20, 20] and still.invariant
    plain = Device(Session(), room, line="", graphs=False, deterministic=False)
    assert plain.padded(5, 20) == 5 and not plain.invariant


def test_what_a_device_may_be_called() -> None:
    assert [parse(d) for d in ("cpu", "cuda", "cuda:0", "cuda:12")] == [
        *(("cpu", 0), ("cuda", 0)),
        *(("cuda", 0), ("cuda", 12)),
    ]
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:²", ""):
        with pytest.raises(WorkerError, match="expected cpu, cuda, or cuda:0") as caught:
            parse(wrong)
        assert caught.value.code == "device"
