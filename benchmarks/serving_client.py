"""SGLang's own client for served requests (``sglang.benchmark.serving``) in a process that is kept between runs.

Importing the client takes ten seconds and more, which is longer than a run. The process starts together with the
servers, reads one run's flags a line (JSON), and answers with a line when the run is over. Its log has the output of
the runs.
"""

import contextlib
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class ClientFailed(RuntimeError):
    """A run failed; the message carries the end of the client's log."""


class Client:
    """The client's process.

    Args:
        log: the file for everything that the process prints.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def run(self, flags: list[str], out: Path) -> dict[str, Any]:
        """Run the client with these flags, and return its results, which it writes to the file ``out``.

        Raises:
            ClientFailed: the run failed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: its log says why
            self._process.stdin.write(json.dumps([*flags, "--output-file", str(out)]) + "\n")
            self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise ClientFailed(f"the client failed; its log {self._log} ends with:\n{self._log.read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
        return found

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError), self._process:  # which closes its pipes
            self._process.kill()


def main() -> None:
    """Read flags, run the client and answer, until the input ends."""
    from sglang.benchmark.serving import cli_main

    for line in sys.stdin:
        sys.argv = ["sglang.benchmark.serving", *json.loads(line)]
        answer = "done"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                cli_main()
        except (Exception, SystemExit):  # argparse raises SystemExit
            traceback.print_exc()
            answer = "failed"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
