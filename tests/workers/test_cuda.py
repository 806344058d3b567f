"""What is missing is said in one line; and the CUDA runtime is called as its headers declare it.

Where there is no GPU the second is shown with functions of the declared types, in the place of the
library: ctypes then converts what our calls pass as it would for the real one. The first is shown
with what this machine lacks, and with the texts and codes of drivers and loaders.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from orchestrator.errors import WorkerError
from workers.folders.folder import TINY
from workers.running import device as devices
from workers.running.cuda import Cuda, check_driver, check_libraries
from workers.running.runner import Runner

GPUS = 2
has_gpu = sys.platform == "linux" and "cuda" in str(ort.get_ep_devices()).lower()

_NAMED = CFUNCTYPE(c_int, c_void_p, c_int, c_int)
_COUNTED = CFUNCTYPE(c_int, POINTER(c_int))


def driver(code: int = 0, version: int = 13020, count: int = GPUS) -> Any:
    """libcuda.so.1 with these answers."""

    def tell(value: int) -> Any:
        def function(place: Any) -> int:
            place[0] = value
            return 0

        return _COUNTED(function)

    def name(place: int, size: int, device: int) -> int:
        ctypes.memmove(place, f"Tesla {device}".encode() + b"\0", 8)
        return 0

    def device(place: Any, index: int) -> int:
        place[0] = index
        return 0

    class Driver:
        cuInit = CFUNCTYPE(c_int, c_uint)(lambda flags: code)
        cuDriverGetVersion = tell(version)
        cuDeviceGetCount = tell(count)
        cuDeviceGet = CFUNCTYPE(c_int, POINTER(c_int), c_int)(device)
        cuDeviceGetName = _NAMED(name)

    return Driver


class Runtime:
    """libcudart with memory of the host; `calls` are those made, by name."""

    def __init__(self, room: int = 2**20) -> None:
        self.calls: list[str] = []
        self.held: dict[int, Any] = {}
        self.room, self.pending = room, 0
        declared: dict[str, tuple[Callable[..., int], list[Any]]] = {
            "cudaSetDevice": (lambda index: self.fail(101 if index >= GPUS else 0), [c_int]),
            "cudaGetLastError": (self.last, []),
            "cudaMemGetInfo": (self.info, [POINTER(c_size_t)] * 2),
            "cudaMalloc": (self.allocate, [POINTER(c_void_p), c_size_t]),
            "cudaFree": (self.free, [c_void_p]),
            "cudaMallocHost": (self.allocate, [POINTER(c_void_p), c_size_t]),
            "cudaFreeHost": (self.free, [c_void_p]),
            "cudaMemsetAsync": (self.fill, [c_void_p, c_int, c_size_t, c_void_p]),
            "cudaMemcpyAsync": (self.move, [c_void_p, c_void_p, c_size_t, c_int, c_void_p]),
            "cudaMemcpy2DAsync": (
                self.move_runs,
                [c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t, c_int, c_void_p],
            ),
            "cudaStreamCreateWithFlags": (self.stream, [POINTER(c_void_p), c_uint]),
            "cudaStreamSynchronize": (lambda stream: int(stream != 77), [c_void_p]),
            "cudaStreamDestroy": (lambda stream: int(stream != 77), [c_void_p]),
        }
        for name, (function, types) in declared.items():
            setattr(self, name, self._declared(name, function, types))
        said = ctypes.create_string_buffer(b"out of memory")
        self.cudaGetErrorString = CFUNCTYPE(c_void_p, c_int)(lambda _: ctypes.addressof(said))

    def _declared(self, name: str, function: Callable[..., int], types: list[Any]) -> Any:
        def called(*arguments: Any) -> int:
            self.calls.append(name)
            return function(*arguments)

        return CFUNCTYPE(c_int, *types)(called)

    def fail(self, code: int) -> int:
        self.pending = code
        return code

    def last(self) -> int:
        code, self.pending = self.pending, 0
        return code

    def info(self, free: Any, whole: Any) -> int:
        free[0], whole[0] = self.room, 2**36
        return 0

    def allocate(self, place: Any, size: int) -> int:
        if size > self.room:
            return self.fail(2)
        memory = (ctypes.c_uint8 * size)(*([0xA5] * size))
        place[0] = ctypes.addressof(memory)
        self.held[ctypes.addressof(memory)] = memory
        return 0

    def free(self, address: int) -> int:
        del self.held[address]
        return 0

    def fill(self, address: int, value: int, size: int, stream: int) -> int:
        ctypes.memset(address, value, size)
        return int(stream != 77)

    def move(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        ctypes.memmove(target, source, size)
        return int(stream != 77 or kind not in (1, 2))

    def move_runs(
        self, target: int, pitch: int, source: int, other: int, width: int, height: int, *rest: int
    ) -> int:
        for i in range(height):
            ctypes.memmove(target + i * pitch, source + i * other, width)
        return int(rest != (3, 77))

    def stream(self, place: Any, flags: int) -> int:
        place[0] = 77
        return int(flags != 1)


def loader(libraries: dict[str, Any] | None = None) -> Callable[[str], Any]:
    """What `ctypes.CDLL` gives for the names that begin so, and its words for the others."""

    def load(name: str) -> Any:
        for key, library in (libraries or {}).items():
            if name.startswith(key):
                if isinstance(library, Exception):
                    raise library
                return library
        text = f"{name}: cannot open shared object file: No such file or directory"
        raise OSError(text)

    return load


def opened(runtime: Runtime, index: int = 1) -> Cuda:
    return Cuda(index, 13, loader({"libcuda.": driver(), "libcudart.": runtime}))


def test_memory_of_a_device_is_taken_copied_and_given_back() -> None:
    runtime = Runtime()
    cuda = opened(runtime)
    assert (cuda.name, cuda.index, cuda.stream, cuda.free_bytes()) == ("Tesla 1", 1, 77, 2**20)
    staged = cuda.staging(24)
    assert staged.tolist() == [0] * 24
    staged[:] = range(24)
    ours, other = cuda.allocate(48), cuda.allocate(24)
    cuda.clear(ours, 48)
    cuda.upload(other, staged)
    cuda.copy(ours + 4, 12, other, 6, 5, 4)  # four runs of five bytes
    seen = np.empty(48, np.uint8)
    cuda.download(seen, ours)
    expected = np.zeros(48, np.uint8)
    for i in range(4):
        expected[4 + 12 * i : 9 + 12 * i] = range(6 * i, 6 * i + 5)
    assert seen.tolist() == expected.tolist()
    cuda.free(ours)
    cuda.free(other)
    cuda.close()
    assert not runtime.held and runtime.calls[-1] == "cudaStreamDestroy"
    # A thread that was not here before has another device: it is set before each call.
    assert runtime.calls[1::2] == [name for name in runtime.calls if name != "cudaSetDevice"]


def test_memory_that_is_not_there_is_the_machines_fault_and_leaves_no_error_behind() -> None:
    runtime = Runtime()
    cuda = opened(runtime)
    with pytest.raises(WorkerError, match="cuda:1: cudaMalloc: out of memory") as caught:
        cuda.allocate(2**21)
    assert caught.value.code == "memory"
    assert runtime.pending == 0, "onnxruntime's next call would report it"
    cuda.stream = 5
    with pytest.raises(WorkerError) as caught:
        cuda.clear(cuda.allocate(8), 8)
    assert caught.value.code == "runtime"


LOADER_ERRORS = {
    "no driver": (
        loader(),
        "no NVIDIA driver (libcuda.so.1: cannot open shared object file: No such file or "
        "directory): install one",
    ),
    "no GPU": (loader({"libcuda.": driver(100)}), "the NVIDIA driver sees no GPU"),
    "half an update": (
        loader({"libcuda.": driver(803)}),
        "the NVIDIA driver and its library are of different versions: restart the machine",
    ),
    "anything else": (
        loader({"libcuda.": driver(999)}),
        "the NVIDIA driver does not start: CUDA error 999",
    ),
    "an old driver": (
        loader({"libcuda.": driver(version=12040)}),
        "the NVIDIA driver is too old: made for CUDA 12.4, needed is CUDA 13, driver 580 or newer",
    ),
    "one GPU": (
        loader({"libcuda.": driver(count=1)}),
        "there is no such GPU, only one GPU, counted from cuda:0",
    ),
    "few GPUs": (
        loader({"libcuda.": driver(count=3)}),
        "there is no such GPU, only 3 GPUs, counted from cuda:0",
    ),
}


@pytest.mark.parametrize("case", LOADER_ERRORS)
@pytest.mark.skipif(sys.platform != "linux", reason="the names of the libraries are Linux's")
def test_what_a_driver_lacks_is_said(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    load, why = LOADER_ERRORS[case]
    with pytest.raises(WorkerError) as caught:
        check_driver(5, 13, load)
    assert caught.value.code == "device"
    assert caught.value.message == f"device cuda:5: {why}; or use --device cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="the names of the libraries are Linux's")
def test_a_gpu_that_was_hidden_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(WorkerError, match=r"sees no GPU \(CUDA_VISIBLE_DEVICES is '7'\)"):
        check_driver(0, 13, loader({"libcuda.": driver(100)}))


@pytest.mark.skipif(sys.platform != "linux", reason="the names of the libraries are Linux's")
def test_the_first_library_that_is_missing_is_named() -> None:
    whole = dict.fromkeys(("libcudart", "libcublasLt", "libcublas.", "libcurand", "libcudnn"))
    check_libraries(0, 13, loader(whole))
    for name, file in (("libcublas.", "libcublas.so.13"), ("libcudnn", "libcudnn.so.9")):
        there = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(WorkerError) as caught:
            check_libraries(0, 13, loader(there))
        assert caught.value.message == (
            f"device cuda:0: {file} cannot be loaded: pip install 'penstock[cuda]'; "
            "or use --device cpu"
        )
    old = OSError("/lib/libm.so.6: version `GLIBC_2.38' not found")
    with pytest.raises(WorkerError, match=r"libcurand.so.10 cannot be loaded \(.*GLIBC_2.38"):
        check_libraries(0, 13, loader(whole | {"libcurand": old}))


def test_an_onnxruntime_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(WorkerError, match="is here without CUDA: pip install 'penstock\\[cuda\\]'"):
        devices.open_room("cuda")


def test_libraries_that_are_missing_are_named_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime's own search runs for real; then a session that fell back is refused."""
    monkeypatch.setattr(devices, "check_driver", lambda index, major: "a GPU")
    try:
        ctypes.CDLL("libcublasLt.so.13")
    except OSError:
        with pytest.raises(WorkerError, match="cannot be loaded") as caught:
            devices.open_room("cuda:0")
        assert caught.value.code == "device"
        monkeypatch.setattr(devices, "Cuda", lambda index, major: opened(Runtime(), 0))
        monkeypatch.setattr(devices, "check_libraries", lambda index, major: None)
        with pytest.raises(WorkerError, match="cannot use it and does not say why") as caught:
            Runner(TINY, slots=1, max_length=32, device="cuda", threads=1)
        assert caught.value.code == "device"
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.skipif(has_gpu, reason="this machine has what is said to be missing")
def test_a_worker_without_a_gpu_says_so_in_one_line() -> None:
    program = (
        "from pathlib import Path\n"
        "from orchestrator.errors import WorkerError\n"
        "from workers.running.runner import Runner\n"
        "try:\n"
        f"    Runner(Path({str(TINY)!r}), slots=1, max_length=32, device='cuda:0')\n"
        "except WorkerError as error:\n"
        "    print(error.code, error, sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    code, _, said = done.stdout.partition("|")
    assert (code, done.stderr) == ("device", "")
    assert said.startswith("device cuda:0: ") and said.count("\n") == 1
