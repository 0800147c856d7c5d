"""Text for calibration and measurement: files, a seeded disjoint split, and token sequences.

The default corpus is the source of Python's standard library, so calibration works wherever Python does. A document is
a file, or a piece of about 32 KiB of a file if there are few files. The seed and the documents' names decide which
quarter of the documents is held out. Missing files, too little text and a missing tokenizer raise `CorpusError`.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_tpla.errors import SglangTplaError

Tokenizer = Callable[[str], list[int]]
HELD_OUT_SHARE = 0.25
_PIECE_CHARS = 32768
_FEW_FILES = 16
_LARGEST_FILE_BYTES = 4 << 20
# Tables and tests are unlike other code, and distributions omit the tests.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings", "pydoc_data"}


class CorpusError(SglangTplaError, ValueError):
    """Text cannot be used; the message says what was expected, what came, where, and what to do."""


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents, with a name and a hash that identify the text."""

    name: str
    content_hash: str
    documents: tuple[Document, ...]

    @classmethod
    def from_paths(cls, paths: Sequence[str | Path] = ()) -> Corpus:
        """Read files and folders, or the standard library if none are given.

        Files of a folder that are not text are skipped. A file that is named itself is read whatever its size.

        Raises:
            CorpusError: a path does not exist, a named file is not text, or there is no text at all.
        """
        name, files = _named(paths) if paths else _standard_library()
        documents = list(_read(files, {path for path in map(Path, paths) if path.is_file()}))
        if not documents:
            raise CorpusError(f"expected UTF-8 text files in {name}, found none; give other --corpus paths")
        if len(documents) < _FEW_FILES:
            documents = [piece for document in documents for piece in _pieces(document)]
        digest = hashlib.sha256()
        for document in documents:
            digest.update(f"{document.name}\0{len(document.text)}\0".encode())
            digest.update(document.text.encode())
        return cls(name=name, content_hash=digest.hexdigest(), documents=tuple(documents))

    def split(self, seed: int) -> tuple[list[Document], list[Document]]:
        """Split into disjoint (calibration, held-out) documents, in an order that the seed decides.

        A held-out document that a calibration document copies under another name is left out.
        """
        ranked = sorted(self.documents, key=lambda one: hashlib.sha256(f"{seed}\0{one.name}".encode()).digest())
        cut = round(len(ranked) * HELD_OUT_SHARE)
        calibration = ranked[cut:]
        seen = {document.text for document in calibration}
        held_out = [document for document in ranked[:cut] if document.text not in seen]
        if not held_out or not calibration:
            different = len({document.text for document in self.documents})
            raise CorpusError(
                f"the corpus {self.name} has {different} different document(s), too few to hold some out; give more or "
                "longer files to --corpus"
            )
        return calibration, held_out


def sequences(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    separator: int | None,
    fewer: bool = False,
) -> torch.Tensor:
    """Cut token sequences [count, length] from the documents, joined in order with ``separator`` between them.

    With ``fewer``, return as many whole sequences as there are, at least one.
    """
    needed = length * count
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document.text)
        if separator is not None:
            stream.append(separator)
        if len(stream) >= needed:
            break
    if fewer:
        count = min(count, max(len(stream) // length, 1))
    needed = length * count
    if len(stream) < needed:
        raise CorpusError(
            f"expected {needed} tokens ({count} sequences of {length}), the corpus has {len(stream)}; ask for fewer "
            "tokens or give more text to --corpus"
        )
    return torch.tensor(stream[:needed], dtype=torch.long).view(count, length)


def load_tokenizer(model_path: str | Path) -> Tokenizer:
    """Load the model's tokenizer, which adds no special tokens."""
    path = Path(model_path) / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer as FastTokenizer  # type: ignore[import-untyped]

        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other kind over a file that it cannot read
            raise CorpusError(f"{path} is no tokenizer that can be read: {error}; copy it again") from error
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    from transformers import AutoTokenizer

    try:
        slow: Any = AutoTokenizer.from_pretrained(str(model_path))
    except (OSError, ValueError) as error:
        raise CorpusError(f"expected a tokenizer in {model_path}, could not load one: {error}") from error
    return lambda text: list(slow.encode(text, add_special_tokens=False))


def _standard_library() -> tuple[str, list[tuple[Path, Path]]]:
    """Return a name for the source of Python's library, and its files with their names in it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    version = ".".join(map(str, sys.version_info[:3]))
    files = [(path, path.relative_to(root)) for path in sorted(root.rglob("*.py"))]
    return f"python-{version}-stdlib", [one for one in files if not _SKIPPED_FOLDERS.intersection(one[1].parts)]


def _named(paths: Sequence[str | Path]) -> tuple[str, list[tuple[Path, Path]]]:
    """Return a name for some files and folders, and their files with a name for each."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise CorpusError(f"expected a file or folder at --corpus {path}, found none")
        if path.is_file():
            files.append((path, Path(path.name)))
        else:
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            files += [(p, Path(_name(path)) / p.relative_to(path)) for p in inside]
    return _utf8("+".join(_name(path) or str(path) for path in map(Path, paths))), _once(files)


def _name(path: Path) -> str:
    """Return the name of a file or folder, also where it is given as ``.`` or ``..``: names decide the split."""
    return path.resolve().name if path.name in ("", "..") else path.name


def _utf8(name: str) -> str:
    """Return a name with bytes that are not UTF-8 written as escapes, so that the name can be hashed and stored."""
    return name.encode("utf-8", "backslashreplace").decode()


def _once(files: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Return each file once, under its first name: a file read twice could be both calibration and held-out text."""
    found: dict[tuple[int, int], tuple[Path, Path]] = {}
    for path, name in files:
        status = path.stat()
        found.setdefault((status.st_dev, status.st_ino), (path, name))
    return list(found.values())


def _read(files: Sequence[tuple[Path, Path]], given: Set[Path]) -> Iterator[Document]:
    small = [one for one in files if one[0] in given or one[0].stat().st_size <= _LARGEST_FILE_BYTES]
    for path, name in small if len(small) >= _FEW_FILES else files:
        text = _text(path)
        if text is None and path in given:
            raise CorpusError(
                f"expected UTF-8 text in --corpus {_utf8(str(path))}, found other bytes; convert the file, or leave it "
                "out"
            )
        if text is not None and text.strip():  # a binary file in a folder of text is no error
            yield Document(_utf8(name.as_posix()), text)


def _text(path: Path) -> str | None:
    """Return a file's text, or None if the file is not text."""
    with path.open("rb") as file:
        if b"\0" in file.read(_PIECE_CHARS):
            return None  # do not read weights in the same folder: they may be larger than memory
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _pieces(document: Document) -> Iterator[Document]:
    lines, size, number = [], 0, 0
    whole = document.text.splitlines(keepends=True)
    # Cut long lines, so that text without line ends is divided as well.
    for line in (long[at : at + _PIECE_CHARS] for long in whole for at in range(0, len(long), _PIECE_CHARS)):
        lines.append(line)
        size += len(line)
        if size >= _PIECE_CHARS:
            yield Document(f"{document.name}#{number}", "".join(lines))
            lines, size, number = [], 0, number + 1
    if lines:
        yield Document(f"{document.name}#{number}", "".join(lines))
