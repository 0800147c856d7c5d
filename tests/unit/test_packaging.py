"""What `pip install` copies: a server that starts from an installed package needs more than its Python files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_carries_what_servers_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("sglang_tpla", "patches"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("sglang_tpla/patches/ledger.toml") == (ROOT / "patches/ledger.toml").read_bytes()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "sglang_tpla.plugin:register" in archive.read(entry_points).decode()
    for folder in ("attention/hopper/cuda", "transfer", "transfer/memory"):
        wanted = {p.name for p in (ROOT / "sglang_tpla" / folder).iterdir() if p.is_file()}
        assert wanted <= {Path(name).name for name in names if name.startswith(f"sglang_tpla/{folder}/")}
