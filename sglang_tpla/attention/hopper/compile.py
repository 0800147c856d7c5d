"""Compile CUDA source for Hopper with NVRTC, cache the binaries on disk, and load and launch their kernels.

NVRTC and the driver bindings (``cuda.bindings``) come with SGLang; compiling needs no nvcc, host compiler or GPU.
Binaries are cached under ``$SGLANG_TPLA_CACHE`` (default ``~/.cache/sglang_tpla``) by the hash of the source, the
options and the compiler's version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sglang_tpla.errors import SglangTplaError

ARCHITECTURE = "sm_90a"
CUDA = Path(__file__).parent / "cuda"


class KernelCompileError(SglangTplaError, RuntimeError):
    """NVRTC or the driver refused a kernel; the message carries the log."""


def joined(names: Iterable[str]) -> str:
    """Return the named files of ``cuda/`` as one text."""
    return "\n".join((CUDA / name).read_text() for name in names)


def cache_folder() -> Path:
    return Path(os.environ.get("SGLANG_TPLA_CACHE") or "~/.cache/sglang_tpla").expanduser() / "cubin"


def _checked(who: str, result: tuple[Any, ...], what: str) -> Any:
    """Return a call's result without its status, and raise if the status is an error."""
    if int(result[0]) != 0:
        raise KernelCompileError(f"{who} failed in {what}: {result[0]!r}")
    return result[1] if len(result) > 1 else None


_nvrtc, _driver = partial(_checked, "NVRTC"), partial(_checked, "the CUDA driver")


def compile_cubin(source: str, defines: dict[str, int], name: str) -> tuple[bytes, str]:
    """Compile ``source`` with ``-D`` ``defines``, and return the binary and the compiler's log (registers, spills).

    Raises:
        KernelCompileError: the source does not compile; the message carries the compiler's log.
    """
    from cuda.bindings import nvrtc  # type: ignore[import-untyped]

    options = [
        f"--gpu-architecture={ARCHITECTURE}",
        "--std=c++17",
        "-lineinfo",
        "--ptxas-options=-v",
        "-default-device",
    ]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    program = _nvrtc(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []), "nvrtcCreateProgram")
    outcome = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    log = b" " * _nvrtc(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
    _nvrtc(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
    text = log.decode(errors="replace").replace("\0", "").strip()
    if int(outcome) != 0:
        raise KernelCompileError(f"{name} with {defines} does not compile:\n{text}")
    cubin = b" " * _nvrtc(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    _nvrtc(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    return cubin, text


def cached_cubin(source: str, defines: dict[str, int], name: str) -> bytes:
    """Read the binary from disk, or compile and cache it; several processes may do so at once."""
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    digest = hashlib.sha256(repr((source, sorted(defines.items()), ARCHITECTURE, version)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{digest}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin, _ = compile_cubin(source, defines, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)  # atomic, so that another process sees the whole file or none
    return cubin


class KernelModule:
    """A loaded binary, which the current CUDA context (PyTorch's) owns; keep the object while its kernels run."""

    def __init__(self, cubin: bytes) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._module = _driver(driver.cuModuleLoadData(cubin), "cuModuleLoadData")

    def kernel(self, name: str, shared_bytes: int = 0) -> Any:
        """Return the kernel called ``name``, with ``shared_bytes`` of dynamic shared memory allowed."""
        driver = self._driver
        function = _driver(driver.cuModuleGetFunction(self._module, name.encode()), f"cuModuleGetFunction({name})")
        if shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _driver(driver.cuFuncSetAttribute(function, attribute, shared_bytes), "cuFuncSetAttribute")
        return function

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Any],
        stream: int,
        *,
        shared_bytes: int = 0,
        early: bool = False,
    ) -> None:
        """Launch with ctypes ``arguments``; an ``early`` kernel may start before its predecessor has ended."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], grid[1], 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        else:
            config.numAttrs = 0
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _driver(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(pointers), 0), "cuLaunchKernelEx")
