"""Start a prefill server, a TPLA decode server, the router, or all three.

    python -m sglang_tpla.launch --role prefill|decode|router|all [--config FILE.yaml] [--dry-run]
        [--tpla-groups G --tpla-artifact FILE] [any flag of SGLang or its router]

One role replaces this process, so that signals and exit codes are the server's own; ``all`` is supervised. A mistake in
the settings gives one line on stderr and exit code 2; a server that dies under ``all`` gives exit code 1, and a signal
128 + its number.
"""

import os
import sys
from collections.abc import Sequence

from sglang_tpla.config import ConfigError
from sglang_tpla.launch import options as launch_options
from sglang_tpla.launch.rendezvous import with_port
from sglang_tpla.launch.roles import check_free, check_installation, check_log_dir, check_model_path, plan


def main(tokens: Sequence[str] | None = None) -> int:  # noqa: RET503 (execve does not return)
    """Run the command line, and return the exit code unless a server replaces this process."""
    try:
        options = launch_options.read(sys.argv[1:] if tokens is None else tokens, os.environ)
        processes = plan(options)
        if options.dry_run:
            print("\n\n".join(f"# {process.role}\n{process.shell()}" for process in processes))
            return 0
        check_installation()
        check_log_dir(options.log_dir)
        for process in processes:
            check_model_path(process)
            check_free(process)
    except ConfigError as error:
        print(f"sglang_tpla.launch: error: {error}", file=sys.stderr)
        return 2
    if options.role == "all":
        from sglang_tpla.launch.supervisor import supervise

        return supervise(processes, options.log_dir, options.startup_timeout_s)
    process = processes[0]
    os.execve(process.command[0], with_port(process.command), process.full_environment(os.environ))


if __name__ == "__main__":
    sys.exit(main())
