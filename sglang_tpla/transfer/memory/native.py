"""``native.c``, compiled at its first use: one call per chunk where Python would make one call per piece.

Each call releases the GIL once; in Python a chunk of some sixty pieces would release it and wait for it as often. A
machine without a C compiler does the same in Python (`copy`), more slowly, and logs so once. The library is kept under
``$SGLANG_TPLA_CACHE`` (default ``~/.cache/sglang_tpla``) by the hash of the source, the compiler and the machine type.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from sglang_tpla.config import CACHE_VARIABLE
from sglang_tpla.errors import SglangTplaError

SOURCE = Path(__file__).with_name("native.c")
OPTIONS = ("-O3", "-shared", "-fPIC", "-std=gnu11")
COMPILE_S = 60.0
COMPILERS = ("cc", "gcc", "clang")

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/sglang_tpla").expanduser() / "native"


class NativeError(SglangTplaError, RuntimeError):
    """The C source could not be compiled or loaded."""


def compiled(compiler: str) -> Path:
    """Return the library's path; compile it if it is not there. Several processes may call this at once.

    Raises:
        NativeError: there is no such compiler, it refuses the source, or the cache cannot be written.
    """
    command = [*compiler.split(), *OPTIONS]
    try:
        version = subprocess.run(
            [*compiler.split(), "--version"], capture_output=True, timeout=COMPILE_S, check=True
        ).stdout
        key = repr((SOURCE.read_bytes(), command, version, platform.machine())).encode()
        path = cache_folder() / f"{hashlib.sha256(key).hexdigest()[:32]}.so"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            made = subprocess.run(
                [*command, str(SOURCE), "-o", file.name], capture_output=True, text=True, timeout=COMPILE_S
            )
        if made.returncode:
            os.unlink(file.name)
            raise NativeError(f"{compiler} refuses {SOURCE}: {made.stderr[:2000]}")
        os.replace(file.name, path)  # atomic: another process sees all of it or nothing
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"{compiler} cannot make a library of {SOURCE}: {error}") from error
    return path


def loaded(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions' types.

    Raises:
        NativeError: the library cannot be loaded here.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded: {error}") from error
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.checksum_bytes.restype = size
    library.checksum_start.argtypes = (pointer, size)
    library.checksum_end.argtypes, library.checksum_end.restype = (pointer,), ctypes.c_uint64
    library.check_pieces.argtypes = (pointer, pointer)
    library.copy_pieces.argtypes = (pointer, pointer, pointer)
    library.receive_pieces.argtypes = (pointer, pointer, pointer, ctypes.c_int, size, size)
    library.receive_pieces.restype = ctypes.c_int64
    library.send_pieces.argtypes = (pointer, pointer, pointer, ctypes.c_int, size)
    library.send_pieces.restype = ctypes.c_int64
    for name in ("checksum_start", "check_pieces", "copy_pieces"):
        getattr(library, name).restype = None
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, compiled by ``$CC`` or a usual compiler, or log a warning and return None."""
    usual = next(filter(shutil.which, COMPILERS), COMPILERS[0])
    try:
        return loaded(compiled(os.environ.get("CC") or usual))
    except NativeError as error:
        logger.warning("transfers take more processor time without a C compiler (install gcc): %s", error)
        return None
