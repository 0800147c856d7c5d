"""Coverage-guided fuzzing of what a peer can send: ``python -m tests.fuzz [--seconds N] [TARGET ...]``.

Targets: ``frames`` (decoding), ``cuts`` (honest agents whose connections break), ``faults`` (also aborts and lost time)
and ``strange`` (also malformed and lying messages), the last three over `tests.wire.simulation`. Each runs in a process
of its own under atheris, which nothing else needs: it is installed on first use, beside the environment. What is found
is printed as bytes in hexadecimal: add it to ``FINDS`` of ``tests/wire/test_simulation.py``, or to the frame tests, and
mend the fault.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ATHERIS = "atheris==3.0.0"
TARGETS = ("frames", "cuts", "faults", "strange")


def install(folder: Path) -> None:
    """Put atheris into a folder of its own."""
    if (folder / "atheris").is_dir():
        return
    print(f"installing {ATHERIS} into {folder}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), ATHERIS]
    subprocess.run(command, check=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=3600, help="for all targets together (default: an hour)")
    parser.add_argument("--out", type=Path, help="corpus and finds (default: a new temporary folder)")
    args = parser.parse_args(arguments)
    targets = args.targets or list(TARGETS)
    out = args.out or Path(tempfile.mkdtemp(prefix="sglang-tpla-fuzz-"))
    package = Path(sys.prefix) / ("fuzz-" + ATHERIS.replace("==", "-"))
    install(package)
    paths = [str(ROOT), str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    found = 0
    shares = {"frames": 1} | dict.fromkeys(TARGETS[1:], 3)
    for target in targets:
        seconds = args.seconds * shares[target] // sum(shares[name] for name in targets)
        corpus, finds = out / target / "corpus", out / target / "finds"
        corpus.mkdir(parents=True, exist_ok=True)
        finds.mkdir(exist_ok=True)
        chooser = random.Random(target)
        for number in range(0 if any(corpus.iterdir()) else 32):  # short inputs never get as far as a transfer
            (corpus / f"seed-{number}").write_bytes(chooser.randbytes(60 * (1 + number % 8)))
        end = time.monotonic() + seconds
        while (left := int(end - time.monotonic())) > 0:
            before = set(finds.iterdir())
            command = [
                sys.executable, "-m", "tests.fuzz.harness", target, str(corpus), f"-artifact_prefix={finds}/",
                f"-max_total_time={left}", "-timeout=60", "-report_slow_units=60", "-rss_limit_mb=4096",
                "-max_len=1500", "-len_control=0", "-print_final_stats=1",
            ]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
            new = sorted(set(finds.iterdir()) - before)
            found += len(new)
            for find in new:
                print(f"FOUND by {target}: {find.read_bytes().hex()}", flush=True)
            if done.returncode and not new:
                print(f"{target} ended with {done.returncode} and left nothing to look at", flush=True)
                return 2
    print(f"{found} finds in {args.seconds} s; corpus and finds in {out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
