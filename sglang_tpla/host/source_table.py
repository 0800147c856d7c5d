"""The table of all hooked targets in SGLang's releases, made from their wheels: ``patches/targets.json``.

    pip download --no-deps --dest wheels sglang==0.5.17    # and so on for each release
    python -m sglang_tpla.host.source_table wheels/*.whl > patches/targets.json

For every release the table holds the wheel's hash and, for every path that the ledger names for any release, the hash
of the syntax tree, or null where that release has no such name. Tests compare the ledger with it without a download.
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from sglang_tpla.host import ledger

NAME = "targets.json"


class Wheel:
    """The source files in one of SGLang's wheels; a `ledger.Source`."""

    def __init__(self, path: Path) -> None:
        self.release = path.name.split("-")[1]
        self._archive = zipfile.ZipFile(path)
        self._names = set(self._archive.namelist())

    def read(self, module: str) -> str | None:
        place = module.replace(".", "/")
        for name in (f"{place}.py", f"{place}/__init__.py"):
            if name in self._names:
                return self._archive.read(name).decode()
        return None


def all_targets() -> list[str]:
    """Return every path that the ledger names for any release."""
    return sorted({path for hook in ledger.load() for path in (hook.target, *hook.targets.values())})


def release_row(path: Path) -> dict[str, Any]:
    """Make one release's entry of the table from its wheel."""
    source = Wheel(path)
    hashes: dict[str, str | None] = {}
    for target in all_targets():
        try:
            hashes[target] = ledger.target_hash(target, source)
        except ledger.LedgerError:
            hashes[target] = None
    return {"wheel_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "targets": hashes}


def recorded() -> dict[str, Any]:
    """Return the table beside the ledger: release -> ``wheel_sha256`` and ``targets``."""
    table: dict[str, Any] = json.loads((ledger.ledger_path().parent / NAME).read_text(encoding="utf-8"))
    return table


def main() -> None:
    """Print the table of the wheels on the command line, oldest release first."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m sglang_tpla.host.source_table WHEEL... > patches/targets.json")
    paths = sorted(map(Path, sys.argv[1:]), key=lambda path: ledger.version_key(path.name.split("-")[1]))
    print(json.dumps({path.name.split("-")[1]: release_row(path) for path in paths}, indent=1))


if __name__ == "__main__":
    main()
