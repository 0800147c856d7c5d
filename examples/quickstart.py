"""Show the whole package on a CPU, in minutes: prefill, TPLA decode on two ranks, router, and plain MLA to compare.

    make quickstart

This program starts the deployment of ``launch/quickstart.yaml`` on free ports and, for comparison, a stock SGLang
server with plain MLA, and sends both the same prompts. It prints every answer with plain MLA's, where they part, the
cache bytes of a token and rank, the artifact's error on held-out text, and the bytes that each transfer moved. Then it
ends everything, and checks that nothing is left.
"""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.launch import cpu
from sglang_tpla.launch import options as launch_options
from sglang_tpla.launch.options_file import read_file
from sglang_tpla.launch.reaper import Reaper
from sglang_tpla.launch.roles import Process, check_installation, plan
from sglang_tpla.launch.supervisor import (
    ChildDied,
    StartTimeout,
    StopRequested,
    Supervisor,
    end_with_parent,
    start_all,
    stop_signals_raise,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "launch/quickstart.yaml"
START_TIMEOUT_S = 600.0
NEW_TOKENS = 48
# The prompts are the launcher's first modules in alphabetical order, cut at these lengths. With this rule nobody can
# choose prompts by their answers, and no model was trained or calibrated on this text. The longest prompt takes more
# than one chunk.
PROMPT_CHARACTERS = (250, 800, 2000, 4200)


@dataclass(frozen=True)
class Answer:
    """A server's answer to a prompt.

    Args:
        text: the continuation.
        tokens: its token numbers.
        logprobs: the log-probability of each token.
        prompt_tokens: length of the prompt.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    prompt_tokens: int


def prompts() -> list[str]:
    """Return the prompts for both servers: whole lines from the beginnings of modules."""
    modules = sorted(path for path in (ROOT / "sglang_tpla/launch").glob("*.py") if path.name[0] != "_")
    pairs = zip(modules, PROMPT_CHARACTERS, strict=False)
    return [path.read_text()[:length].rpartition("\n")[0] + "\n" for path, length in pairs]


def free_base_port() -> int:
    """Return a port whose next ones are free as well: the deployment needs one for each of its addresses."""
    for base in range(31000, 60000, 16):
        try:
            for offset in range(6):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        return base
    raise SystemExit("error: no six free ports in a row between 31000 and 60000")


def stock_server(prefill: Process, port: int) -> Process:
    """Start plain MLA with the prefill server's flags, without disaggregation and without this package's role."""
    config = read_file(CONFIG).common
    flags = [f"--{name}={config[name]}" for name in ("model-path", "device", "dtype", "max-total-tokens")]
    command = (sys.executable, "-m", "sglang.launch_server", *flags, f"--port={port}", "--host=127.0.0.1")
    return Process("plain MLA", command, dict(cpu.environment(1, os.environ)), f"http://127.0.0.1:{port}")


def ask(url: str, prompt: str) -> Answer:
    """Return one greedy continuation.

    Raises:
        httpx.HTTPStatusError: the server refused.
    """
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    body = {"text": prompt, "sampling_params": sampling, "return_logprob": True}
    response = httpx.post(url + "/generate", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    said = response.json()
    meta = said["meta_info"]
    logprobs = [value for value, _, _ in meta["output_token_logprobs"]]
    return Answer(said["text"], said["output_ids"], logprobs, meta["prompt_tokens"])


def same_tokens(ours: Answer, theirs: Answer) -> int:
    """Return the number of tokens that agree before the first that does not."""
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours.tokens), len(theirs.tokens)))


def shortened(text: str, lines: int = 10) -> Text:
    """Return the text without interpreting markup, cut after ``lines`` lines."""
    kept = text.splitlines()
    return Text("\n".join(kept[:lines] + ["..."] * (len(kept) > lines)))


def show_answers(console: Console, answers: list[tuple[str, Answer, Answer]]) -> None:
    """Print each prompt's two continuations side by side, and how far they agree."""
    agreed = total = 0
    distances: list[float] = []
    for prompt, ours, theirs in answers:
        same, length = same_tokens(ours, theirs), max(len(ours.tokens), len(theirs.tokens))
        agreed, total = agreed + same, total + length
        distances += [abs(a - b) for a, b in zip(ours.logprobs[:same], theirs.logprobs[:same], strict=True)]
        said = f"all {length} tokens agree" if same == length else f"tokens agree up to {same} of {length}"
        last_line = prompt.rstrip("\n").splitlines()[-1]
        table = Table(title=Text(f"… {last_line}  ({ours.prompt_tokens} prompt tokens)"), box=box.ROUNDED, expand=True)
        table.add_column("TPLA, prefill → 2 decode ranks", ratio=1)
        table.add_column("plain MLA, stock SGLang", ratio=1)
        table.add_row(shortened(ours.text), shortened(theirs.text))
        table.caption = said
        console.print(table)
    console.print(
        f"Agreement: {agreed} of {total} greedy tokens before the first difference of each answer; the "
        f"log-probabilities of these differ by {sum(distances) / max(agreed, 1):.4f} on average.\n"
    )


def show_cache(console: Console, decode: Process) -> None:
    """Print the cache bytes of a token and rank, as the decode server reports them, and its artifact's error report."""
    info = httpx.get(decode.url + "/server_info", timeout=30, trust_env=False).json()["tpla"]
    ours, layers = info["cache_bytes_per_token_and_rank"], len(info["widths"])
    mla = 2 * layers * (info["latent_dim"] + info["rope_dim"])
    console.print(
        f"Cache of a token on one rank, {layers} layers: TPLA {ours} bytes, plain MLA in bfloat16 {mla}: "
        f"{mla / ours:.2f} times the tokens in the same memory (g = {info['groups']}, {info['rows']} rows, latent "
        f"{info['latent_dim']} → {max(info['widths'])}, rope {info['rope_dim']})."
    )
    report = Artifact.load(info["artifact"]).meta.error_report
    if report is not None:
        console.print(
            f"The artifact's cost on {report.tokens:,} tokens of held-out text, prompt exact: {report.kl_mean:.5f} "
            f"nats a token; the most likely token is plain MLA's for {report.top1_agreement:.1%} of them."
        )
    console.print()


def transfers(log: Path) -> list[dict[str, Any]]:
    """Return the transfer agent's log lines, one for each finished request and rank."""
    lines = log.read_text(errors="replace").splitlines()
    return [json.loads(line.split(" transfer ", 1)[1]) for line in lines if " transfer {" in line]


def show_transfers(console: Console, found: list[dict[str, Any]]) -> None:
    """Print the bytes and the time of each transfer, as its receiver saw them."""
    table = Table(title="Transfers from the prefill server, as each decode rank saw them", box=box.SIMPLE_HEAD)
    for name in ("prompt tokens", "decode rank", "chunks", "over TCP", "through shared memory", "time", "result"):
        table.add_column(name, justify="right")
    for line in found:
        table.add_row(
            *(str(line[name]) for name in ("tokens", "rank", "chunks")),
            f"{line['bytes'] - line['shared_memory_bytes']:,} bytes",  # "bytes" counts TCP and shared memory
            f"{line['shared_memory_bytes']:,} bytes",
            f"{1000 * line['seconds']:.1f} ms",
            line["result"],
        )
    console.print(table)


def run(console: Console, supervisor: Supervisor) -> None:
    """Start the servers, ask them, and print the results.

    Raises:
        ChildDied, StartTimeout: a server did not start, or ended early.
    """
    port = free_base_port()
    tokens = ["--role", "all", "--config", CONFIG, "--port", str(port)]
    trio = plan(launch_options.read(tokens, os.environ))
    stock = stock_server(trio[0], port + 5)
    console.print("Starting prefill (1 rank), decode (2 ranks, TPLA), router, and plain MLA to compare with.")
    start_all(supervisor, [stock, *trio], START_TIMEOUT_S, console)
    answers = []
    asked = prompts()
    for number, prompt in enumerate(asked, start=1):
        with console.status(f"prompt {number} of {len(asked)}"):
            answers.append((prompt, ask(trio[2].url, prompt), ask(stock.url, prompt)))
        supervisor.check()
    show_answers(console, answers)
    show_cache(console, trio[1])
    show_transfers(console, transfers(supervisor.log_of("decode")))


def belongings(supervisor: Supervisor) -> Reaper:
    """Return every process of the servers and the shared memory that they hold now."""
    found = Reaper()
    found.foreign = set()
    found.sessions = {child.pid for child in supervisor.children.values()}
    found.look()
    return found


def leftovers(before: Reaper, folder: Path) -> list[str]:
    """Return the processes and files of the servers that are still there."""
    found = [f"process {pid}" for pid in before.living()]
    found += [str(segment) for segment in before.segments()]
    return found + [str(folder)] * folder.exists()


def main() -> int:
    """Run the program, and return the exit code: 0 only if everything worked and nothing is left."""
    os.chdir(ROOT)
    end_with_parent()
    check_installation()
    console = Console(highlight=False)
    start_s = time.monotonic()
    try:
        with stop_signals_raise(), Supervisor() as supervisor:
            try:
                run(console, supervisor)
            except (ChildDied, StartTimeout, httpx.HTTPError) as error:
                console.print(f"error: {error}", markup=False, style="red")
                console.print(f"all logs are in {supervisor.save_logs()}")
                return 1
            started = belongings(supervisor)
            console.print("Shutting down.")
    except StopRequested as stop:
        console.print("stopped; nothing is left running")
        return 128 + stop.number
    if left := leftovers(started, supervisor.folder):
        console.print(f"error: left behind: {', '.join(left)}", style="red")
        return 1
    console.print(
        f"Nothing is left: no process, no socket file, no shared memory. {time.monotonic() - start_s:.0f} s\n"
        "Next: docs/deployment.md."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
