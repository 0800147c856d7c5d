"""The OpenAI client against a running deployment: completions, chat, streaming, log-probabilities.

python examples/openai_client.py --url http://127.0.0.1:30000
"""

import argparse
import sys

from openai import OpenAI, OpenAIError
from rich.console import Console


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
        ask(url, Console(highlight=False))
    except OpenAIError as error:
        raise SystemExit(f"error: expected a deployment at {url}; {error}") from error
    return 0


def ask(url: str, console: Console) -> None:
    """Ask for everything once, and print the answers."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        model = client.models.list().data[0].id
        console.print(f"model {model}", markup=False)

        console.rule("completions")
        prompt = "import os\n\n\ndef list_files(folder):\n"
        whole = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0, logprobs=2)
        choice = whole.choices[0]
        check(whole.usage is not None and whole.usage.completion_tokens > 0, "tokens", whole.usage)
        check(choice.logprobs is not None and bool(choice.logprobs.token_logprobs), "logprobs", choice.logprobs)
        console.print(prompt + choice.text, markup=False)

        console.rule("completions, streamed")
        pieces = []
        for event in client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0, stream=True):
            pieces.append(event.choices[0].text)
            console.print(pieces[-1], end="", markup=False)
        console.print()
        check("".join(pieces) == choice.text, f"the same text, {choice.text!r}", "".join(pieces))

        console.rule("chat")
        messages = [{"role": "user", "content": "class Queue:\n    def push(self, item):\n"}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
        said = answer.choices[0].message.content
        check(bool(said), "an answer", said)
        console.print(said, markup=False)

        console.rule("chat, streamed")
        pieces = []
        for event in client.chat.completions.create(
            model=model, messages=messages, max_tokens=24, temperature=0, stream=True
        ):
            pieces.append(event.choices[0].delta.content or "" if event.choices else "")
            console.print(pieces[-1], end="", markup=False)
        console.print()
        check("".join(pieces) == said, f"the same text, {said!r}", "".join(pieces))


if __name__ == "__main__":
    sys.exit(main())
