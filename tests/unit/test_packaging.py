"""`pip install` copies more than Python files, because a server of an installed package needs more."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# SGLang pins these packages for its release and device; a second pin here could only disagree.
WITH_SGLANG = {"torch", "triton", "transformers", "tokenizers", "huggingface_hub", "flashinfer", "cuda", "xgrammar"}
IMPORTED_AS = {"pyzmq": "zmq", "pyyaml": "yaml", "prometheus-client": "prometheus_client"}


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^\w-]", requirement)[0].lower() for requirement in project["dependencies"]]
    declared = {IMPORTED_AS.get(name, name) for name in names} | WITH_SGLANG | {"sglang_tpla"}
    found = set()
    for path in (ROOT / "sglang_tpla").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    assert found - sys.stdlib_module_names - declared == set()


def test_the_wheel_carries_what_servers_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("sglang_tpla", "patches"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
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
