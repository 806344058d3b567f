"""The CUDA runtime by ctypes: one device's memory, copies and stream, and why there is none.

A session and its memory share the stream made here (provider option `user_compute_stream`), so a
copy needs no waiting: what is asked for later happens later. Libraries that are loaded already, as
onnxruntime loads them from the wheels of the `cuda` extra, are found by name. Knows nothing of
onnxruntime, tensors or models.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import WorkerError

Load = Callable[[str], Any]

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_TO_DEVICE, _TO_HOST, _WITHIN = 1, 2, 3  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version; NVIDIA's table of compatibility

# As the headers declare them; each returns a cudaError_t.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (c_int,),
    "cudaGetLastError": (),
    "cudaMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaMallocHost": (POINTER(c_void_p), c_size_t),
    "cudaFreeHost": (c_void_p,),
    "cudaMemsetAsync": (c_void_p, c_int, c_size_t, c_void_p),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaMemcpy2DAsync": (
        *(c_void_p, c_size_t, c_void_p, c_size_t),
        *(c_size_t, c_size_t, c_int, c_void_p),
    ),
    "cudaStreamCreateWithFlags": (POINTER(c_void_p), c_uint),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamDestroy": (c_void_p,),
}


class Cuda:
    """One GPU: a Room (device_room.py) and its stream. Calls may come from any one thread."""

    type = "cuda"

    def __init__(self, index: int, major: int, load: Load = ctypes.CDLL) -> None:
        """`major`: CUDA's version that the libraries are of. Raises WorkerError "device"."""
        self.index = index
        self.name = check_driver(index, major, load)
        self._library = load(library("cudart", major))
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        self._library.cudaGetErrorString.argtypes = (c_int,)
        self._library.cudaGetErrorString.restype = c_char_p
        self._staged: list[int] = []
        stream = c_void_p()
        self._call("cudaStreamCreateWithFlags", byref(stream), _NON_BLOCKING)
        self.stream = int(stream.value or 0)

    def allocate(self, size: int) -> int:
        address = c_void_p()
        self._call("cudaMalloc", byref(address), size)
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def clear(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def copy(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
    ) -> None:
        pitched = target, target_pitch, source, source_pitch, width, height
        self._call("cudaMemcpy2DAsync", *pitched, _WITHIN, self.stream)

    def upload(self, target: int, values: NDArray[Any]) -> None:
        source = values.ctypes.data
        self._call("cudaMemcpyAsync", target, source, values.nbytes, _TO_DEVICE, self.stream)

    def download(self, values: NDArray[Any], source: int) -> None:
        target = values.ctypes.data
        self._call("cudaMemcpyAsync", target, source, values.nbytes, _TO_HOST, self.stream)
        self._call("cudaStreamSynchronize", self.stream)

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Pinned memory, filled with zeros."""
        address = c_void_p()
        self._call("cudaMallocHost", byref(address), size)
        self._staged.append(int(address.value or 0))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._staged[-1]))
        memory[:] = 0
        return memory

    def free_bytes(self) -> int:
        free, whole = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", byref(free), byref(whole))
        return free.value

    def close(self) -> None:
        """Give the stream and the staging back; no session may use them any more."""
        self._call("cudaStreamSynchronize", self.stream)
        for address in self._staged:
            self._call("cudaFreeHost", address)
        self._staged.clear()
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        # The device is the thread's, and a thread that comes later has another one.
        for each, given in (("cudaSetDevice", (self.index,)), (name, arguments)):
            if failed := getattr(self._library, each)(*given):
                said = self._library.cudaGetErrorString(failed).decode()
                self._library.cudaGetLastError()  # else the next call of onnxruntime reports it
                code = "memory" if failed == _OUT_OF_MEMORY else "runtime"
                raise WorkerError(code, f"cuda:{self.index}: {each}: {said}")


def library(name: str, major: int) -> str:
    """A library of CUDA as the loader knows it, on Linux and Windows."""
    if sys.platform == "win32":
        return f"{name}64_{major}.dll"
    return f"lib{name}.so.{major}"


def check_driver(index: int, major: int, load: Load = ctypes.CDLL) -> str:
    """The name of GPU `index`; raises WorkerError "device" with what to do where there is none."""
    wanted = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = load(wanted)
    except OSError as error:
        raise _no_device(index, f"no NVIDIA driver ({error}): install one") from error
    if failed := driver.cuInit(0):
        raise _no_device(index, _driver_fault(failed))
    version, count, device = c_int(), c_int(), c_int()
    driver.cuDriverGetVersion(byref(version))
    if version.value < 1000 * major:
        known = f"{version.value // 1000}.{version.value % 1000 // 10}"
        needed = f"CUDA {major}, driver {_OLDEST_DRIVER.get(major, 'a newer one')} or newer"
        raise _no_device(
            index, f"the NVIDIA driver is too old: made for CUDA {known}, needed is {needed}"
        )
    driver.cuDeviceGetCount(byref(count))
    if index >= count.value:
        found = "one GPU" if count.value == 1 else f"{count.value} GPUs"
        raise _no_device(index, f"there is no such GPU, only {found}, counted from cuda:0")
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode()


def check_libraries(index: int, major: int, load: Load = ctypes.CDLL) -> None:
    """Raises WorkerError "device" naming the first library of CUDA that cannot be loaded."""
    cuda = [library(name, major) for name in ("cudart", "cublasLt", "cublas")]
    for name in (*cuda, library("curand", 10), library("cudnn", 9)):
        try:
            load(name)
        except OSError as error:
            said = str(error)
            why = "" if "cannot open shared object" in said else f" ({said})"
            install = "pip install 'penstock[cuda]'"
            raise _no_device(index, f"{name} cannot be loaded{why}: {install}") from error


def _driver_fault(code: int) -> str:
    """As cuda.h numbers them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if code == 100:  # CUDA_ERROR_NO_DEVICE
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return f"the NVIDIA driver sees no GPU{hidden}"
    if code in (803, 804):  # SYSTEM_DRIVER_MISMATCH, COMPAT_NOT_SUPPORTED_ON_DEVICE
        return "the NVIDIA driver and its library are of different versions: restart the machine"
    return f"the NVIDIA driver does not start: CUDA error {code}"


def _no_device(index: int, why: str) -> WorkerError:
    return WorkerError("device", f"device cuda:{index}: {why}; or use --device cpu")
