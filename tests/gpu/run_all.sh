#!/usr/bin/env bash
# Run every GPU test on a machine with one Hopper GPU, PyTorch and nvcc, in some minutes. Nothing is downloaded.
#
#   tests/gpu/run_all.sh [PARTS] [pytest arguments]
#
# PARTS is a folder with SGLang packed as base-* (tar, xz, split), for a machine that has none installed. It is unpacked
# into $SGLANG_SITE (/tmp/sglang-site). The tests of grammars need the real xgrammar in it. The engine's tests also serve
# the checkpoint SGLANG_TPLA_TEST_TINY with the artifact SGLANG_TPLA_TEST_TINY_ARTIFACT, if named; SGLANG_TPLA_TEST_RESULTS
# is a folder for figures and logs.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
site=${SGLANG_SITE:-/tmp/sglang-site}
mkdir -p "$site"
if [ -d "${1:-}" ]; then
    if [ ! -d "$site/sglang" ]; then
        cat "$1"/base-* | xz -dc | tar x -C "$site"
        # Compile once, because a dozen processes import it at the same time. A few templates are not Python: the command
        # reports them.
        python3 -m compileall -q -j 0 "$site" || true
    fi
    shift
fi
cd "$root"
# SGLang finds the plug-in by its entry points; the package itself is this checkout's.
PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}" exec python3 - "$site" "$@" <<'EOF'
import os, sys, tomllib
from pathlib import Path

site, arguments = Path(sys.argv[1]), sys.argv[2:]
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
info = site / f"sglang_tpla-{project['version']}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
groups = project["entry-points"].items()
lines = [f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items()) for group, names in groups]
(info / "entry_points.txt").write_text("\n".join(lines))
tests = ["tests/gpu", "tests/wire/test_gpu.py"] if not any("test_" in argument for argument in arguments) else []
command = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
os.execv(sys.executable, [*command, *tests, *arguments])
EOF
