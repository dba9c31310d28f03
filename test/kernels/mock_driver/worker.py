"""Runs the compiled library on a mock driver, in a process of its own: one request a line in, one answer a line out.

    worker.py LIBRARY [DRIVER]

Without a driver none is loaded here; with one, its functions `mock_*` answer requests too. Torch must not be needed.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from typing import Any

sys.modules["torch"] = None  # type: ignore[assignment]
import tvm_ffi  # noqa: E402 - after torch has been hidden

LONG = ctypes.c_int64


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(LONG)),
        ("strides", ctypes.POINTER(LONG)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class FakeTensor:
    """A tensor of DLPack on a GPU that is not there, at any address: nothing is read from it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        ndim = len(spec["shape"])
        self.shape, self.strides = (LONG * ndim)(*spec["shape"]), (LONG * ndim)(*spec["strides"])
        tensor = DLTensor(spec["address"], *spec["device"], ndim, *spec["dtype"], 1, self.shape, self.strides, 0)
        self.managed = DLManagedTensor(tensor, None, None)

    def __dlpack__(self, **_: object) -> Any:
        return _new_capsule(ctypes.addressof(self.managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.managed.tensor.device_type, self.managed.tensor.device_id


class Server:
    def __init__(self, library: str, driver: str | None) -> None:
        self.module = tvm_ffi.load_module(library)
        self.driver = ctypes.CDLL(driver) if driver else None
        self.kept: list[FakeTensor] = []

    def decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "words" in value:
            return tvm_ffi.Shape(value["words"])
        tensor = FakeTensor(value)
        self.kept.append(tensor)
        return tvm_ffi.from_dlpack(tensor)

    def call(self, name: str, args: list[Any]) -> Any:
        result = getattr(self.module, name)(*map(self.decode, args))
        return list(result) if isinstance(result, tvm_ffi.Array) else result

    def on_stream(self, device: list[int], stream: int, name: str, args: list[Any]) -> Any:
        """A call while `stream` is the current one of a device."""
        kind = {2: "cuda", 10: "rocm"}[device[0]]
        with tvm_ffi.use_raw_stream(tvm_ffi.device(f"{kind}:{device[1]}"), stream):
            return self.call(name, args)

    def mock(self, name: str, args: list[Any]) -> Any:
        function = getattr(self.driver, f"mock_{name}")
        if name == "log":
            function.restype = ctypes.c_char_p
            return function().decode()
        if name == "image":
            with open(args[1], "rb") as file:
                data = file.read()
            return function(args[0].encode(), data, ctypes.c_size_t(len(data)))
        return function(*(arg.encode() if isinstance(arg, str) else arg for arg in args))

    def threads(self, count: int, device_of_thread: list[int], calls: list[Any]) -> list[str]:
        """Each of `count` threads makes every call, all starting at once; the errors."""
        errors: list[str] = []
        ready = threading.Barrier(count)

        def work(index: int) -> None:
            if self.driver:
                self.driver.mock_make_current(device_of_thread[index % len(device_of_thread)])
            ready.wait()
            for name, args in calls:
                try:
                    self.call(name, args)
                except Exception as error:
                    errors.append(str(error))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors


def main() -> None:
    """Serve until the input ends."""
    server = Server(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    for line in sys.stdin:
        method, *args = json.loads(line)
        try:
            answer = {"result": getattr(server, method)(*args)}
        except Exception as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
