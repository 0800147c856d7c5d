"""A program in SGLang's frontend language against a running deployment: gen, select, and fork.

    python examples/frontend_language.py --url http://127.0.0.1:30000

Nothing in the program knows about TPLA: the router's address is an ordinary SGLang endpoint. The shipped nano
checkpoint only continues Python source, so the program asks for that.
"""

import argparse
import sys
import warnings
from typing import Any

import sglang as sgl
from rich.console import Console

TYPES = ["int", "str", "dict", "None"]
NAMES = ["read", "write", "close"]


class RouterEndpoint(sgl.RuntimeEndpoint):
    """An endpoint behind ``sglang_router``, which takes one text per request, while a server takes a list.

    The frontend only warns of a request that is refused, and leaves its variable out. ``refused`` keeps the reason.
    """

    refused: RuntimeError | None = None

    def _assert_success(self, res: Any) -> None:
        try:
            super()._assert_success(res)
        except RuntimeError as error:
            self.refused = error
            raise

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        for name in ("text", "input_ids"):
            if isinstance(data.get(name), list):
                one_by_one = [{**data, name: one} for one in data[name]]
                return [super(RouterEndpoint, self)._generate_http_request(s, one) for one in one_by_one]
        return super()._generate_http_request(s, data)


@sgl.function
def complete(s, signature: str) -> None:
    """gen: continue from a function's head up to an empty line."""
    s += signature
    s += sgl.gen("body", max_tokens=32, stop="\n\n", temperature=0)


@sgl.function
def annotate(s, source: str) -> None:
    """select: the most likely of a few choices, by their log-probabilities."""
    s += source
    s += sgl.select("type", choices=TYPES, temperature=0)


@sgl.function
def methods(s, header: str) -> None:
    """fork: make several continuations of one prefix at once, and gather them."""
    s += header
    forks = s.fork(len(NAMES))
    for fork, name in zip(forks, NAMES, strict=True):
        fork += f"    def {name}(self):\n"
        fork += sgl.gen("body", max_tokens=16, stop="\n\n", temperature=0)
    forks.join()
    for fork, name in zip(forks, NAMES, strict=True):
        s += f"    def {name}(self):\n" + fork["body"] + "\n\n"


def check(condition: bool, expected: str, came: object) -> None:
    """End the program with a message unless the server answered as it should."""
    if not condition:
        raise SystemExit(f"error: expected {expected}; got {came!r}")


def main() -> int:
    """Run the program, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the router, or any SGLang server")
    url = parser.parse_args().url.rstrip("/")
    try:
        endpoint = RouterEndpoint(url)  # this asks the server for its model
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: expected a deployment at {url}; {error}") from error
    sgl.set_default_backend(endpoint)
    warnings.filterwarnings("ignore", "Error in stream_executor")
    try:
        ask(Console(highlight=False))
    except KeyError as error:
        raise SystemExit(f"error: expected an answer from {url}; {endpoint.refused or f'got no {error}'}") from error
    return 0


def ask(console: Console) -> None:
    """Run every program once, and print what came."""
    state = complete.run(signature="def fibonacci(n):\n")
    check(bool(state["body"].strip()), "a function's body", state["body"])
    console.rule("gen")
    console.print(state.text(), markup=False)

    state = annotate.run(source="def name_of(user) -> str:\n    return user.name\n\n\ndef count(items) -> ")
    check(state["type"] in TYPES, f"one of {TYPES}", state["type"])
    console.rule("select")
    console.print(f"def count(items) -> {state['type']}", markup=False)

    batch = complete.run_batch([{"signature": f"def {name}(path):\n"} for name in NAMES])
    bodies = [state["body"] for state in batch]
    check(all(isinstance(body, str) for body in bodies), "three bodies", bodies)
    console.rule("a batch")
    for name, body in zip(NAMES, bodies, strict=True):
        console.print(f"def {name}(path):\n{body}", markup=False)

    state = methods.run(header="class Reader:\n    def __init__(self, path):\n        self.path = path\n\n")
    check(all(f"def {name}" in state.text() for name in NAMES), f"methods {NAMES}", state.text())
    console.rule("fork and join")
    console.print(state.text(), markup=False)


if __name__ == "__main__":
    sys.exit(main())
