"""Check the files that a command is told to write before its work: none may be an input, and each must be possible.

A wrong name could otherwise overwrite weights or statistics for good, or fail only after minutes.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sglang_tpla.errors import SglangTplaError


class OutputError(SglangTplaError, ValueError):
    """A file must not or cannot be written; the message says what was expected, what came, where, and what to do."""


@dataclass(frozen=True)
class Output:
    """A file to write.

    Args:
        flag: the flag that names it.
        path: the file.
        kind: the kind of its content, for messages.
        is_kind: returns whether an existing file is of that kind, so that the new file may replace it.
    """

    flag: str
    path: Path
    kind: str
    is_kind: Callable[[Path], bool]

    def __str__(self) -> str:
        """Name the flag and the file, for messages."""
        return f"{self.flag} {self.path}"


def check_outputs(
    outputs: Sequence[Output], inputs: Mapping[str, Iterable[str | Path]], model: str | Path | None = None
) -> None:
    """Refuse outputs that would overwrite an input or a file of another kind, and outputs that cannot be written.

    Args:
        outputs: the files to write.
        inputs: the files and folders that are read, by the flag that names them.
        model: the checkpoint's folder, in which another safetensors file would count as weights.

    Raises:
        OutputError: a file must not or cannot be written; the message names the first one.
    """
    read = {_identity(file): flag for flag, paths in inputs.items() for path in paths for file in _files(Path(path))}
    if model is not None:
        read |= {_identity(file): "--model-path" for file in Path(model).glob("*") if file.is_file()}
    places: dict[str, Output] = {}
    for output in outputs:
        path = output.path
        if path.is_dir():
            raise OutputError(f"{output}: expected a file to write, got the folder {path}; give a file name in it")
        if path.exists() and (flag := read.get(_identity(path))):
            raise OutputError(f"{output} would replace a file of {flag}; give another path")
        if model is not None and os.path.realpath(path.parent) == os.path.realpath(model):
            raise OutputError(f"{output} lies in the folder of --model-path, whose files are the model's; give another")
        if (other := places.setdefault(os.path.realpath(path), output)) is not output:
            raise OutputError(f"{output} and {other} are one file; give each its own")
        if path.exists() and not (path.is_file() and (path.stat().st_size == 0 or output.is_kind(path))):
            raise OutputError(f"{output}: what is there is not {output.kind}; move it away, or give another path")
        _check_possible(output)


def _files(path: Path) -> Iterable[Path]:
    return [file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]


def _identity(path: Path) -> tuple[int, int]:
    """Return a value that is equal for all names of one file, links included."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _check_possible(output: Output) -> None:
    """Make a file in the output's folder as its writer will, and remove all files and folders made here."""
    folder, made = output.path.parent, []
    try:
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{output.path.name}.", suffix=".tmp")
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise OutputError(f"{output}: no file can be made there ({error.strerror}); give another path") from error
    finally:
        for part in made:
            with suppress(OSError):
                part.rmdir()


def is_artifact(path: Path) -> bool:
    """Return whether a file is an artifact, of any format version."""
    return {"format_version", "created_by", "groups"} <= _metadata(path).keys()


def is_statistics(path: Path) -> bool:
    """Return whether a file holds second moments."""
    return '"corpus_hash"' in _metadata(path).get("meta", "")


def begins_with(text: str) -> Callable[[Path], bool]:
    """Return a function that tests whether a file begins with ``text``."""

    def test(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(text.encode())) == text.encode()

    return test


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError):
        return {}
