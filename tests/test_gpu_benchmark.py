"""The benchmark for GPUs runs as it will there, on the processor and tiny; its model is a Llama.

Nothing here looks at a speed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.host_room import HostRoom
from workers.running.device import Device
from workers.running.device_room import DeviceLogits
from workers.running.host import open_session
from workers.running.runner import Runner

ROOT = Path(__file__).parents[1]


def test_the_one_command_prints_every_table(tmp_path: Path) -> None:
    script, file = str(ROOT / "benchmarks" / "gpu.py"), tmp_path / "tables.json"
    words = ("--quick", "--models", str(tmp_path), "--json", str(file))
    done = subprocess.run(
        [sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tables: dict[str, Any] = json.loads(file.read_text())
    assert [row[0] for row in tables["decode"]] == ["1", "2", "4"]
    assert all(float(row[-1]) > 0 for row in tables["decode"])
    for name in ("invariance", "deterministic"):
        assert [row[1:] for row in tables[name]] == [
            ["0 of 0", "0"],
            ["1 of 1", "0"],
            ["2 of 2", "0"],
        ]
    assert [row[0] for row in tables["loads"]] == ["mixed", "sweep"]
    assert len(tables["price"]) == 3
    for title in ("Decode, prompt 12", "A row in other batches", "Whole loads", "Its price"):
        assert title in done.stdout


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_in_half_precision_computes_the_same_on_a_device_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_model

    gpu_model.make(tmp_path, gpu_model.SHAPES["smoke"], precision)
    room = HostRoom()

    def parts(graph: bytes, *_: Any, weights: Path, **__: Any) -> Device:
        session = open_session(graph, threads=1, weights=weights)
        return Device(session, room, line="parts", graphs=False, deterministic=False)

    monkeypatch.setattr(Device, "open", parts)
    prompts = [[300, 301, 302], [5] * 20, [1000, 7]]
    seen = []
    for device in ("cpu", "cuda"):
        runner = Runner(tmp_path, slots=4, max_length=64, threads=1, device=device)
        logits = [runner.prefill(row, prompt) for row, prompt in enumerate(prompts)]
        block = runner.read(1, 0, 20)
        runner.write(3, 0, block)
        tokens, lengths = [9, 8, 7, 8], [3, 20, 2, 20]
        for _ in range(3):
            step = runner.decode(tokens, lengths)
            assert isinstance(step, DeviceLogits) == (device == "cuda")
            logits += list(np.array(step))
            np.testing.assert_array_equal(logits[-1], logits[-3])  # the copied row is its source
            lengths = [length + 1 for length in lengths]
        seen.append(np.stack(logits))
        runner.close()
    np.testing.assert_array_equal(*seen)
    assert 3 < seen[0].std() < 6  # as peaked as a trained model's
