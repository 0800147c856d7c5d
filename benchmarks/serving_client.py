"""SGLang's own client for served requests (``sglang.benchmark.serving``) in a process that is kept between runs.

To import it takes ten seconds and more, which is longer than a run lasts. The process is started beside the servers; it
reads one run's flags a line (JSON) and answers with a line when the run is over. What the runs print is in its log.
"""

import contextlib
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class ClientFailed(RuntimeError):
    """A run that failed; the message carries the end of the client's log."""


class Client:
    """The process.

    Args:
        log: where everything goes that it prints.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def run(self, flags: list[str], out: Path) -> dict[str, Any]:
        """One run with these flags: what the client wrote to the file ``out``.

        Raises:
            ClientFailed: it failed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its log says why
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
    """Read flags, run, answer, until the input ends."""
    from sglang.benchmark.serving import cli_main

    for line in sys.stdin:
        sys.argv = ["sglang.benchmark.serving", *json.loads(line)]
        answer = "done"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                cli_main()
        except (Exception, SystemExit):  # argparse leaves by SystemExit
            traceback.print_exc()
            answer = "failed"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
