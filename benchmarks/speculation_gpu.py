"""Speculative decoding through real servers on GPUs: is it right, how many guesses are accepted, how fast is it.

    python benchmarks/speculation_gpu.py --model DIR --out FILE [--artifact FILE] [--limit-s 420]

DIR holds a checkpoint with a NextN layer whose widths the kernels take (``tests/speculating_model.py``). All servers
are started at once; each question below is answered as soon as its servers are up, and the file is written after each:

- right: greedy answers with speculation beside those without it, on the same layout. Where two answers part, the
  log-probabilities of both candidates are kept: two that differ by less than bfloat16 resolves are a tie.
- useful: tokens accepted a step (``spec_accept_length``), beside stock SGLang's own with plain MLA, whose kernels need
  a latent of 512: it serves the same model with zeros added.
- fast: tokens a second at batch 1, 4 and 16, with and without speculation, with and without CUDA graphs, and stock.

Layouts: ``g1`` plain MLA on this package's kernel, ``g2`` two groups (needs the artifact; on one GPU its ranks speak
over gloo and without CUDA graphs).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.e2e.servers import Pair, Server
from tests.gpu.engine import DEVICE, EAGER, ENV, GPUS, SHARED_FLAGS, Engines
from tests.ports import free_ports
from tests.speculating_model import pad_latent

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
SPECULATION = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(STEPS))
STOCK_SPECULATION = (
    *SPECULATION, "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(STEPS + 1),
)  # fmt: skip
REQUESTS = ("--max-running-requests", "32")
# One graph a batch that is measured, and one between: each takes a second to capture.
BATCHES = ("--cuda-graph-bs-decode", "1", "2", "4", "8", "16")
OURS = ("--attention-backend", "tpla") if DEVICE == "cuda" else ()
GRAPHS = BATCHES if DEVICE == "cuda" else ()
STOCK_LATENT = 512
# Two candidates whose log-probabilities differ by less are a tie: logits of 16 to 32 are 0.125 apart in bfloat16.
TIE = 0.26
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 4}


def prompts(tokenizer: Tokenizer, count: int, longest: int) -> list[list[int]]:
    """Code of this repository, which nobody trained on: ``count`` prompts of 10 to ``longest`` tokens."""
    sources = sorted((ROOT / "sglang_tpla").rglob("*.py"), key=lambda path: path.stat().st_size, reverse=True)
    found = []
    for index in range(count):
        ids = tokenizer.encode(sources[index % len(sources)].read_text()).ids
        wanted = int(10 * (longest / 10) ** (index / max(count - 1, 1)))
        found.append(ids[:wanted])
    return found


class Decoder:
    """A way to get answers: a stock server, or prefill and decode servers."""

    def __init__(self, engines: Engines, name: str) -> None:
        self.name, self.engines = name, engines

    def open(self) -> None:
        """Wait for the servers."""
        if self.name.startswith("stock"):
            assert self.engines.stock is not None
            self.engines.wait(self.engines.stock)
            self._pair = None
        else:
            self._pair = self.engines.pair(self.name)

    @property
    def server(self) -> Server:
        """The decode server."""
        if self._pair is None:
            assert self.engines.stock is not None
            return self.engines.stock
        return self._pair.decode

    def ask(self, prompt: list[int], tokens: int, room: int = 0, **extra: Any) -> dict[str, Any]:
        """One greedy answer."""
        if self._pair is None:
            return self.server.generate(prompt, tokens, **extra)
        pair = self._pair
        one = Pair(pair.prefill, pair.bootstrap, pair.decode, next_room=pair.next_room + 1 + room)
        return one.generate(prompt, tokens, **extra)[1]

    def together(self, asked: list[list[int]], tokens: int, **extra: Any) -> list[dict[str, Any]]:
        """All at once."""
        if self._pair is not None:
            self._pair.next_room += 1000
        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            jobs = [pool.submit(self.ask, ids, tokens, room, **extra) for room, ids in enumerate(asked)]
            return [job.result() for job in jobs]


def parted(plain: dict[str, Any], drafted: dict[str, Any]) -> dict[str, Any] | None:
    """The place where two greedy answers part, with both candidates' log-probabilities; None where they agree."""
    left, right = (answer["meta_info"]["output_token_logprobs"] for answer in (plain, drafted))
    for place, (one, other) in enumerate(zip(left, right, strict=True)):
        if one[1] == other[1]:
            continue
        thought = {}
        for name, answer in (("plain", plain), ("drafted", drafted)):
            top = {token: value for value, token, *_ in answer["meta_info"]["output_top_logprobs"][place]}
            thought[name] = [top.get(one[1]), top.get(other[1])]
        gaps = [abs(a - b) for a, b in thought.values() if a is not None and b is not None]
        return {
            "place": place,
            "tokens": [one[1], other[1]],
            "logprobs": thought,
            "tie": bool(gaps) and min(gaps) < TIE,
        }
    return None


def answer_all(decoder: Decoder, asked: list[list[int]], tokens: int, workers: int) -> list[dict[str, Any]]:
    """Greedy answers with log-probabilities, so many at a time."""
    return [
        answer
        for first in range(0, len(asked), workers)
        for answer in decoder.together(asked[first : first + workers], tokens, **LOGPROBS)
    ]


def compare(plain: list[dict[str, Any]], drafted: list[dict[str, Any]]) -> dict[str, Any]:
    """Two sets of greedy answers: where they part, and how far the log-probabilities of equal tokens differ."""
    pairs = list(zip(plain, drafted, strict=True))
    places = [parted(*pair) for pair in pairs]
    differences, tokens = [], 0
    for (one, other), place in zip(pairs, places, strict=True):
        left, right = (answer["meta_info"]["output_token_logprobs"] for answer in (one, other))
        same = place["place"] if place else len(left)
        tokens += len(left)
        differences += [abs(a[0] - b[0]) for a, b in zip(left[:same], right[:same], strict=True)]
    return {
        "prompts": len(pairs),
        "tokens": tokens,
        "equal": sum(place is None for place in places),
        "ties": sum(place is not None and place["tie"] for place in places),
        "different": sum(place is not None and not place["tie"] for place in places),
        "parted": [place | {"prompt": index} for index, place in enumerate(places) if place],
        "logprob_difference": {
            "mean": statistics.fmean(differences) if differences else None,
            "max": max(differences, default=None),
        },
        "accept_length": accepted(drafted),
    }


def accepted(answers: list[dict[str, Any]]) -> float | None:
    """Tokens a step of all answers together, the target's own one included."""
    steps = [answer["meta_info"].get("spec_verify_ct") for answer in answers]
    if not all(steps):
        return None
    return sum(answer["meta_info"]["completion_tokens"] for answer in answers) / sum(steps)


def speed(decoder: Decoder, asked: list[list[int]], tokens: int, batches: list[int]) -> list[dict[str, Any]]:
    """Tokens a second of a batch, prompts (short ones) included, the best of two; and what was accepted meanwhile."""
    rows = []
    decoder.together(asked[:2], 8)
    for batch in batches:
        rates = []
        for _ in range(2):
            start = time.perf_counter()
            answers = decoder.together(asked[:batch], tokens)
            rates.append(batch * tokens / (time.perf_counter() - start))
        rows.append({"batch": batch, "tokens_per_second": max(rates), "accept_length": accepted(answers)})
    return rows


def start_stock(engines: Engines, *flags: str) -> None:
    """Stock SGLang without a plug-in, on the one of its backends that computes prompts and steps of any batch here."""
    (port,) = free_ports(1)
    command = (
        "-m", "sglang.launch_server", "--model-path", engines.model, *SHARED_FLAGS, "--port", str(port), *REQUESTS,
        "--attention-backend", "triton", "--disable-prefill-cuda-graph", *GRAPHS, *flags,
    )  # fmt: skip
    engines.stock = Server(
        "stock", command, port, engines.log / "stock.log", ENV | {"SGLANG_PLUGINS": "none"}
    ).start()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, help="of two groups, for this model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--only", nargs="+", default=["g1", "eager", "g2", "stock"], help="parts to run")
    parser.add_argument("--limit-s", type=float, default=420, help="no part is begun after so many seconds")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    parts: dict[str, Any] = {}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "gpus": GPUS,
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "model": args.model.name,
        "guesses": STEPS,
        "parts": parts,
    }
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    asked = prompts(tokenizer, args.prompts, args.longest)
    short = [ids[:64] for ids in asked if len(ids) >= 64]

    def keep(name: str, work: Callable[[], Any]) -> None:
        """One part: whatever becomes of it, the file has the others."""
        start = time.monotonic()
        if start - began > args.limit_s:
            parts[name] = {"skipped": f"after {start - began:.0f} s"}
        else:
            try:
                parts[name] = work()
            except Exception as error:
                parts[name] = {"failed": f"{type(error).__name__}: {error}"[:1500]}
                traceback.print_exc()
        seconds = time.monotonic() - start
        print(
            f"== {name} ({seconds:.0f} s, {time.monotonic() - began:.0f} s in all)\n{json.dumps(parts[name])[:700]}",
            flush=True,
        )
        args.out.write_text(json.dumps(result, indent=1))

    with TemporaryDirectory() as scratch:
        logs = args.out.parent
        stocks: dict[str, Engines] = {}
        # each kind has a prefill server of its own: half a pair that drafts is refused
        engines = {kind: Engines(str(args.model), logs / kind) for kind in ("drafting", "plain")}
        try:
            for one in engines.values():
                one.log.mkdir(parents=True, exist_ok=True)
            # The prompts' backend computes prompts alone: SGLang's own tables have none for the draft's guesses.
            draft = ("--speculative-draft-attention-backend", "triton") if DEVICE == "cuda" else ()
            engines["drafting"].start_prefill(*REQUESTS, *SPECULATION, *draft)
            engines["plain"].start_prefill(*REQUESTS)
            layouts: dict[str, tuple[int, tuple[str, ...]]] = {"g1": (1, (*OURS, *GRAPHS))}
            if "eager" in args.only:
                layouts["g1-eager"] = (1, (*OURS, *EAGER))
            if "g2" in args.only and args.artifact:
                flags = ("--tpla-groups", "2", "--tpla-artifact", str(args.artifact), *OURS)
                layouts["g2"] = (2, (*flags, *(GRAPHS if GPUS > 1 else ())))
            for name, (ranks, flags) in layouts.items():
                engines["drafting"].decode(name, ranks, *REQUESTS, *flags, *SPECULATION)
                engines["plain"].decode(name, ranks, *REQUESTS, *flags)
            if "stock" in args.only and DEVICE == "cuda":
                padded = pad_latent(args.model, Path(scratch) / "padded", STOCK_LATENT)
                for kind, extra in (("drafting", STOCK_SPECULATION), ("plain", ())):
                    stocks[kind] = Engines(str(padded), logs / f"stock-{kind}")
                    stocks[kind].log.mkdir(parents=True, exist_ok=True)
                    start_stock(stocks[kind], *extra)
            opened: dict[str, dict[str, Decoder]] = {}

            def both(name: str) -> dict[str, Decoder]:
                """The two servers of a layout, up."""
                if name not in opened:
                    source = stocks if name == "stock" else engines
                    opened[name] = {kind: Decoder(source[kind], name) for kind in source}
                    for decoder in opened[name].values():
                        decoder.open()
                return opened[name]

            said: dict[tuple[str, str], list[dict[str, Any]]] = {}

            def answers(name: str, kind: str) -> list[dict[str, Any]]:
                """The answers of a server to all prompts, each asked once."""
                if (name, kind) not in said:
                    said[name, kind] = answer_all(both(name)[kind], asked, args.tokens, 8)
                return said[name, kind]

            def right(name: str) -> dict[str, Any]:
                """With speculation beside without it."""
                return compare(answers(name, "plain"), answers(name, "drafting"))

            def control(name: str) -> dict[str, Any]:
                """Without speculation in other batches: what bfloat16 does by itself."""
                return compare(
                    answers(name, "plain"), answer_all(both(name)["plain"], asked, args.tokens, 16)
                )

            for name in (*layouts, *(["stock"] if stocks else [])):
                keep(f"{name}: right", lambda name=name: right(name))
            for name in ("g1", *(["stock"] if stocks else [])):
                keep(f"{name}: control", lambda name=name: control(name))
            for name in (*layouts, *(["stock"] if stocks else [])):
                for kind in ("plain", "drafting"):
                    keep(
                        f"{name}: fast, {kind}",
                        lambda name=name, kind=kind: speed(
                            both(name)[kind], short, args.tokens, args.batches
                        ),
                    )
        finally:
            for one in (*engines.values(), *stocks.values()):
                one.stop()
    args.out.write_text(json.dumps(result, indent=1))
    for name, row in parts.items():
        if "equal" in row:
            print(
                f"{name:>20}: {row['equal']} equal, {row['ties']} ties, {row['different']} different of "
                f"{row['prompts']}; {row['accept_length'] or 0:.2f} tokens a step"
            )
        elif isinstance(row, list) and row:
            rates = ", ".join(f"{one['batch']}: {one['tokens_per_second']:.0f}" for one in row)
            print(f"{name:>20}: tokens/s at batch {rates}; {row[-1]['accept_length']} tokens a step")


if __name__ == "__main__":
    main()
