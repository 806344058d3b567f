"""An import is whole or nothing, whatever ends it; the builder is a stand-in (see there)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from orchestrator.errors import Conflict, NotFound, PenstockError, SpecError, WorkerError
from tests.workers.builder_stand_in import environment, source, write
from workers.building import importing
from workers.building.importing import RECORD, Import, import_model
from workers.folders.folder import ModelFolder, list_models
from workers.folders.prepare import prepare
from workers.running.runner import Runner

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("environment") / "venv")


class Place:
    """A folder with a source in it, and imports from there to `models/llama`."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.python, self.told = root, python, list[str]()
        self.source, self.models = source(root / "hf"), root / "models"
        self.output = self.models / "llama"

    def asked(self, **changes: object) -> Import:
        given = {"source": str(self.source), "precision": "int4", "device": "cpu"}
        words = {**given, "output": self.output, "builder_python": self.python, **changes}
        return Import(**words)  # type: ignore[arg-type]

    def run(self, **changes: object) -> ModelFolder:
        return import_model(self.asked(**changes), self.root / "cache", self.told.append)

    def left(self) -> list[str]:
        """Everything beside the models, hidden folders too."""
        return sorted(os.listdir(self.models)) if self.models.is_dir() else []

    def command(self) -> list[str]:
        words = ["models", "import", str(self.source), "--precision", "int4", "-o"]
        end = [str(self.output), "--builder-python", str(self.python)]
        return [sys.executable, "-m", "orchestrator.cli", *words, *end]

    def start(self) -> subprocess.Popen[str]:
        """The command, its builder waiting."""
        write(self.source / "stand_in.json", {"wait": True})
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        process = subprocess.Popen(
            self.command(),
            env=kept
            | {"PENSTOCK_CACHE_DIR": str(self.root / "cache"), "PYTHONPATH": str(CHECKOUT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.waiting = until(lambda: (self.source / "waiting").exists() and self._pid())
        return process

    def _pid(self) -> int:
        return int((self.source / "waiting").read_text() or 0)


def until(found: Callable[[], int], seconds: float = 30) -> int:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@pytest.fixture
def place(tmp_path: Path, python: Path) -> Place:
    return Place(tmp_path, python)


def test_a_model_is_built_prepared_and_has_its_words_with_it(place: Place) -> None:
    made = place.run(extras=("block_size=64",))
    assert made == ModelFolder.load(place.output) and place.left() == ["llama"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (place.output / name).read_bytes() == (place.source / name).read_bytes()
    prepared = list(place.output.glob("*.penstock-*.onnx"))
    assert [prepare(place.output)] == prepared
    record = json.loads((place.output / RECORD).read_text())
    assert record["precision"] == "int4" and record["options"]["block_size"] == "64"
    given = json.loads((place.source / "given.json").read_text())
    assert given[given.index("-i") + 1] == str(place.source)
    assert {"block_size=64", "accuracy_level=4", "windowed_kv_cache=false"} <= set(given)
    assert "builder: Reading layer 0" in place.told
    assert not any("%|" in line for line in place.told)


def test_w8a8_is_made_of_what_the_builder_made_in_fp32(place: Place) -> None:
    made = place.run(precision="w8a8")
    assert place.left() == ["llama"] and not (place.output / "fp32").exists()
    given = json.loads((place.source / "given.json").read_text())
    assert given[given.index("-p") + 1] == "fp32"
    record = json.loads((place.output / RECORD).read_text())
    assert record["precision"] == "w8a8"
    kinds = {node.op_type for node in onnx.load(made.graph, load_external_data=False).graph.node}
    assert "MatMulIntegerToFloat" in kinds
    assert any(line.startswith("quantized ") for line in place.told)
    runner = Runner(made.path, slots=1, max_length=32, threads=1)
    assert np.isfinite(runner.prefill(0, [1, 2, 3])).all()
    runner.close()


def test_what_a_model_says_of_its_kind_is_not_lost_with_a_relative_output(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    assert place.run(output=Path("here")).path == place.root / "here"


def test_a_failing_builder_leaves_nothing_and_its_words_are_told(place: Place) -> None:
    write(place.source / "stand_in.json", {"fail": "no such rope"})
    with pytest.raises(WorkerError, match="exit code 1: ValueError: no such rope"):
        place.run()
    assert place.left() == [] and "  ValueError: no such rope" in place.told


def test_a_graph_that_cannot_be_prepared_leaves_nothing(place: Place) -> None:
    graph = place.source / "built/model.onnx"
    graph.write_bytes(graph.read_bytes()[:100])
    with pytest.raises(WorkerError, match="not a whole ONNX file"):
        place.run()
    assert place.left() == []


def test_a_model_that_is_there_is_replaced_only_when_told_so(place: Place) -> None:
    place.run()
    (place.output / "mine.txt").write_text("old")
    with pytest.raises(Conflict, match="--force replaces it"):
        place.run()
    assert (place.output / "mine.txt").exists()
    place.run(force=True)
    assert not (place.output / "mine.txt").exists() and place.left() == ["llama"]


def test_a_failed_replacement_leaves_the_old_model(place: Place) -> None:
    place.run()
    before = ModelFolder.load(place.output).digest()
    write(place.source / "stand_in.json", {"fail": "full"})
    with pytest.raises(WorkerError):
        place.run(force=True)
    assert ModelFolder.load(place.output).digest() == before and place.left() == ["llama"]


def test_no_folder_that_is_no_model_is_ever_replaced(place: Place) -> None:
    place.output.mkdir(parents=True)
    (place.output / "letter.txt").write_text("dear")
    with pytest.raises(Conflict, match="no model"):
        place.run(force=True)
    assert os.listdir(place.output) == ["letter.txt"]


def test_an_empty_folder_is_taken(place: Place) -> None:
    place.output.mkdir(parents=True)
    assert place.run().path == place.output


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_import_leaves_nothing_and_says_how_to_begin_again(
    place: Place, stop: signal.Signals
) -> None:
    process = place.start()
    process.send_signal(stop)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "begin again with: penstock models import" in err and "Traceback" not in err
    assert place.left() == [] and gone(place.waiting)


def test_a_killed_import_leaves_no_model_and_the_next_one_clears_up(place: Place) -> None:
    process = place.start()
    process.kill()
    process.communicate(timeout=30)
    until(lambda: gone(place.waiting))
    assert place.left() == [".llama.importing"]
    assert [each.name for each in list_models(place.models)] == ["tiny"]
    write(place.source / "stand_in.json", {})
    place.run()
    assert place.left() == ["llama"]


def test_a_model_that_a_killed_import_had_moved_aside_comes_back(place: Place) -> None:
    place.run()
    work = place.models / ".llama.importing"
    work.mkdir()
    place.output.rename(work / "old")
    write(place.source / "stand_in.json", {"fail": "again"})
    with pytest.raises(WorkerError):
        place.run()
    assert place.left() == ["llama"]


def test_two_imports_into_one_folder_do_not_mix(place: Place) -> None:
    process = place.start()
    with pytest.raises(Conflict, match="another import is making it"):
        place.run()
    assert not gone(place.waiting)
    process.terminate()
    process.communicate(timeout=30)
    assert place.left() == []


def refused(place: Place, kind: type[PenstockError], **changes: object) -> str:
    with pytest.raises(kind) as error:
        place.run(**changes)
    assert place.left() == [] and not (place.root / "cache").exists()
    assert not (place.source / "given.json").exists()
    return str(error.value)


def test_nothing_is_built_of_what_is_refused(place: Place) -> None:
    write(place.source / "config.json", {"architectures": ["MambaForCausalLM"]})
    assert "MambaForCausalLM" in refused(place, SpecError)
    assert "bf16" in refused(place, SpecError, precision="bf16")
    assert "hf_remote" in refused(place, SpecError, extras=("hf_remote=true",))
    assert "interpreter" in refused(place, SpecError, builder_python=place.source)
    assert "does not exist" in refused(place, NotFound, source="./nowhere")
    assert "a file (.gguf)" in refused(place, SpecError, source=gguf(place))
    shutil.rmtree(place.source / "built")
    (place.source / "config.json").unlink()
    assert "config.json" in refused(place, SpecError)


def gguf(place: Place) -> str:
    file = place.root / "m.gguf"
    file.write_bytes(b"GGUF")
    return str(file)


def test_no_room_is_told_before_the_build(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing.Source, "bytes_needed", lambda self, precision: 2**62)
    with pytest.raises(WorkerError, match="make room"):
        place.run()
    assert place.left() == [] and not (place.source / "given.json").exists()


def test_a_hub_that_is_away_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WorkerError) as error:
        place.run(source="someone/llama")
    assert "the hub cannot be reached" in str(error.value) and "on disk" in str(error.value)
    assert place.left() == []


def hub_copy(place: Place) -> Path:
    """The hub's library finds there what it fetched before, as it laid it out."""
    model = place.root / "cache/hub/models--someone--llama"
    revision = "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(revision)
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(place.source / name, snapshot / name)
    return snapshot


def test_a_name_on_a_hub_goes_to_the_builder_after_its_config_was_judged(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("STAND_IN_SOURCE", str(place.source))
    snapshot = hub_copy(place)
    assert place.run(source="someone/llama").path == place.output
    given = json.loads((place.source / "given.json").read_text())
    assert given[given.index("-m") + 1] == "someone/llama"
    assert given[given.index("-c") + 1] == str(place.root / "cache/hub")
    (place.source / "given.json").unlink()
    write(snapshot / "config.json", {"architectures": ["MixtralForCausalLM"]})
    with pytest.raises(SpecError, match="MixtralForCausalLM"):
        place.run(source="someone/llama", force=True)
    assert not (place.source / "given.json").exists()
