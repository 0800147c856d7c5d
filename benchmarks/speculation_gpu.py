"""Speculative decoding through real servers on GPUs: is it right, how many guesses are accepted, how fast is it.

    python benchmarks/speculation_gpu.py --model DIR --out FILE [--artifact FILE] [--sketched-artifact FILE]

DIR holds a checkpoint with a NextN layer whose widths the kernels take (``tests/speculating_model.py``). All servers
are started at once; each question below is answered as soon as its servers are up, and the file is written after each:

- right: greedy answers with speculation beside those without it, on the same layout. Where two answers part, the
  log-probabilities of both candidates are kept: two that differ by less than bfloat16 resolves are a tie.
- useful: tokens accepted a step (``spec_accept_length``), beside stock SGLang's own with plain MLA, whose kernels need
  a latent of 512: it serves the same model with zeros added.
- fast: tokens a second at batch 1, 4 and 16, with and without speculation, with and without CUDA graphs, and stock.
- sampled: tokens drawn with and without speculation come from one distribution.
- along: tokens drawn along whole answers have the target's own distribution.
- penalised: greedy answers under penalties and a least length, beside a server without speculation and without overlap
  scheduling, which lets SGLang's penalties miss the last token.
- requests: stops, grammars, streaming, shared prefixes, samples and aborts of a server that speculates.

Layouts: ``g1`` plain MLA on this package's kernel, ``q1`` the same with 8-bit rows, ``g2`` and ``q2`` two groups of
plain and of sketched rows (each needs its artifact; on one GPU the ranks speak over gloo and without CUDA graphs).
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import header
from benchmarks.speculation_requests import Draws, chances, compare_draws, draw, every_kind
from tests.e2e.prompts import encoded
from tests.e2e.servers import Server
from tests.gpu.engine import DEVICE, EAGER, ENV, GPUS, SHARED_FLAGS, Engines
from tests.ports import free_ports
from tests.speculating_model import pad_latent

ROOT = Path(__file__).resolve().parents[1]
GUESSES = 3
PARTS = ["right", "penalised", "requests", "fast", "documents", "sampled", "along", "control"]
REQUESTS = ("--max-running-requests", "64")
SEED = 17  # the first server's sampler has this seed, each later server the next one, also in runs that add draws
GRAMMARS = ("--grammar-backend", os.environ.get("TEST_GRAMMAR_BACKEND", "xgrammar"))
# There is one graph for each measured batch, and one between two: each takes a second to capture.
BATCHES = ("--cuda-graph-bs-decode", "1", "2", "4", "8", "16")
IN_TURN = ("--disable-overlap-schedule",)
OURS = ("--attention-backend", "tpla") if DEVICE == "cuda" else ()
GRAPHS = BATCHES if DEVICE == "cuda" else ()
STOCK_LATENT = 512
# Candidates whose log-probabilities differ by less than this are a tie: logits of 16 to 32 are 0.125 apart in bfloat16.
TIE = 0.26
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 4}
PENALTIES = ({"frequency_penalty": 1.5}, {"presence_penalty": 1.2}, {"repetition_penalty": 1.6})


def prompts(model: Path, count: int, longest: int) -> list[list[int]]:
    """Return ``count`` prompts of 10 to ``longest`` tokens, of this repository's code, which nobody trained on."""
    sources = sorted((ROOT / "sglang_tpla").rglob("*.py"), key=lambda path: path.stat().st_size, reverse=True)
    lengths = [int(10 * (longest / 10) ** (index / max(count - 1, 1))) for index in range(count)]
    texts = [sources[index % len(sources)].read_text() for index in range(count)]
    return [ids[:length] for ids, length in zip(encoded(model, texts), lengths, strict=True)]


class Decoder:
    """A way to get answers: a stock server, or prefill and decode servers.

    Args:
        engines: the servers, which are waited for.
        name: the decode server's layout.
    """

    def __init__(self, engines: Engines, name: str) -> None:
        self.name, self.stock = name, engines.stock
        if self.stock is not None:
            engines.wait(self.stock)
        else:
            self.pair = engines.pair(name)

    def ask(self, prompt: list[int], tokens: int, **extra: Any) -> dict[str, Any]:
        """Return one greedy answer."""
        if self.stock is not None:
            return self.stock.generate(prompt, tokens, **extra)
        return self.pair.generate(prompt, tokens, **extra)[1]

    def together(self, asked: list[list[int]], tokens: int, **extra: Any) -> list[dict[str, Any]]:
        """Return the answers to all prompts, asked at once."""
        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda ids: self.ask(ids, tokens, **extra), asked))


def parted(plain: dict[str, Any], drafted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the place where two greedy answers part, with both candidates' log-probabilities; None if they agree."""
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


def answer_all(
    decoder: Decoder, asked: list[list[int]], tokens: int, workers: int, **params: Any
) -> list[dict[str, Any]]:
    """Return greedy answers with log-probabilities, ``workers`` at a time, under further sampling parameters."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True} | params
    return [
        answer
        for first in range(0, len(asked), workers)
        for answer in decoder.together(asked[first : first + workers], tokens, sampling_params=sampling, **LOGPROBS)
    ]


def penalised(decoders: dict[str, Decoder], asked: list[list[int]], tokens: int) -> dict[str, Any]:
    """Compare answers under each of SGLang's penalties, and the lengths of answers that may end, but not soon."""
    found: dict[str, Any] = {}
    for params in PENALTIES:
        said = {kind: answer_all(one, asked, tokens, 8, **params) for kind, one in decoders.items()}
        found[" ".join(params)] = compare(said["plain"], said["drafting"])
    ends = sorted({token for answer in said["plain"] for token in answer["output_ids"]})
    lengths = {
        kind: [
            len(answer["output_ids"])
            for answer in answer_all(one, asked, tokens, 8, min_new_tokens=15, stop_token_ids=ends, ignore_eos=False)
        ]
        for kind, one in decoders.items()
    }
    return found | {"min_new_tokens": lengths}


def compare(plain: list[dict[str, Any]], drafted: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two sets of greedy answers: where they part, and how far the log-probabilities of equal tokens differ."""
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
    """Return the tokens a step of all answers together, the target's own token included."""
    steps = [answer["meta_info"].get("spec_verify_ct") for answer in answers]
    if not all(steps):
        return None
    return sum(answer["meta_info"]["completion_tokens"] for answer in answers) / sum(steps)


def speed(decoder: Decoder, asked: list[list[int]], tokens: int, batches: list[int]) -> list[dict[str, Any]]:
    """Return the tokens a second of each batch (the best of three, short prompts included), and the tokens accepted."""
    rows = []
    decoder.together(asked[:2], 8)
    for batch in batches:
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            answers = decoder.together(asked[:batch], tokens)
            rates.append(batch * tokens / (time.perf_counter() - start))
        fastest = {"tokens_per_second": max(rates), "rates": rates}
        rows.append({"batch": batch, **fastest, "accept_length": accepted(answers)})
    return rows


def draws_at(
    prompt: list[int], decoders: dict[str, Decoder], draws: int, limit_s: float, made: Draws
) -> dict[str, Any]:
    """Compare draws of a few tokens at one prompt by a server with speculation and by one without it."""
    rows = {kind: made.at(prompt, f"{decoder.name}, {kind}") for kind, decoder in decoders.items()}
    with concurrent.futures.ThreadPoolExecutor(len(decoders)) as pool:
        jobs = {
            kind: pool.submit(draw, decoder.ask, prompt, 3, max(0, draws - len(rows[kind])), limit_s)
            for kind, decoder in decoders.items()
        }
        for kind, job in jobs.items():
            rows[kind].extend(job.result())
    made.keep()
    # Token 0 is prefill's. One step gives tokens 1 and 2 if it keeps the first guess.
    params = {"max_new_tokens": 3, "temperature": 1.0, "ignore_eos": True, "n": 100}
    steps = [one["meta_info"]["spec_verify_ct"] for one in decoders["drafting"].ask(prompt, 3, sampling_params=params)]
    return {
        "tokens": len(prompt),
        "runs": made.runs + 1,
        "first_guess_kept": sum(count == 1 for count in steps) / len(steps),
        "tests": compare_draws(rows["plain"], rows["drafting"]),
    }


def along_answers(asked: list[list[int]], decoder: Decoder, tokens: int) -> dict[str, Any]:
    """Compare draws along whole answers with the target's own distribution."""
    params = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    said = [
        answer
        for _ in range(5)
        for prompt in asked
        for answer in decoder.together([prompt] * 16, tokens, sampling_params=params, **LOGPROBS)
    ]
    return chances(said) | {"accept_length": accepted(said)}


def start_stock(engines: Engines, *flags: str) -> None:
    """Start stock SGLang without a plug-in, on the only one of its backends that serves prompts and any batch here."""
    (port,) = free_ports(1)
    command = (
        "-m", "sglang.launch_server", "--model-path", engines.model, *SHARED_FLAGS, "--port", str(port), *REQUESTS,
        "--attention-backend", "triton", "--disable-prefill-cuda-graph", *GRAPHS, *flags,
    )  # fmt: skip
    engines.stock = Server("stock", command, port, engines.log / "stock.log", ENV | {"SGLANG_PLUGINS": "none"}).start()


class Run:
    """All servers, and the file with the answers to the questions about them.

    Args:
        scratch: a folder for the checkpoint that stock servers take.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.began = args, scratch, time.monotonic()
        self.draws = Draws(args.draws_file)
        self.seeds = itertools.count(SEED + 100 * self.draws.runs)
        self.parts: dict[str, Any] = {}
        self.result = header(torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu") | {
            "gpus": GPUS,
            "model": args.model.name,
            "guesses": args.guesses,
            "parts": self.parts,
        }
        self.prompts = prompts(args.model, args.prompts, args.longest)
        self.engines: dict[str, Engines] = {}
        self.stocks: dict[str, Engines] = {}
        self._decoders: dict[tuple[str, str], Decoder] = {}
        self._answers: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def start(self) -> list[str]:
        """Start all servers, and return the layouts that are served."""
        args, logs = self.args, self.args.out.parent
        speculation = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(args.guesses))
        for kind in ("drafting", "plain"):  # each has its prefill server: a pair of which one server drafts is refused
            self.engines[kind] = Engines(str(args.model), logs / kind)
            self.engines[kind].log.mkdir(parents=True, exist_ok=True)
        # The prompts' backend computes only prompts: SGLang's tables have no backend for the draft's guesses.
        draft = ("--speculative-draft-attention-backend", "triton") if DEVICE == "cuda" else ()
        self.engines["drafting"].start_prefill(*REQUESTS, *self._sampler(), *speculation, *draft)
        self.engines["plain"].start_prefill(*REQUESTS, *self._sampler())
        layouts = self._layouts()
        for name in (name for name in args.only if name in layouts):
            ranks, flags = layouts[name]
            self.engines["drafting"].decode(name, ranks, *REQUESTS, *self._sampler(), *flags, *speculation)
            self.engines["plain"].decode(name, ranks, *REQUESTS, *self._sampler(), *flags)
            if "penalised" in args.parts:
                in_turn = f"{name}-in-turn"
                self.engines["plain"].decode(in_turn, ranks, *REQUESTS, *self._sampler(), *flags, *IN_TURN)
        if "stock" in args.only and DEVICE == "cuda":
            padded = pad_latent(args.model, self.scratch / "padded", STOCK_LATENT)
            chains = ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(args.guesses + 1))
            for kind, extra in (("drafting", (*speculation, *chains)), ("plain", ())):
                self.stocks[kind] = Engines(str(padded), logs / f"stock-{kind}")
                self.stocks[kind].log.mkdir(parents=True, exist_ok=True)
                start_stock(self.stocks[kind], *extra)
        return [name for name in args.only if name in layouts or (name == "stock" and self.stocks)]

    def _sampler(self) -> tuple[str, ...]:
        """Return the flags of a new seed: servers of one seed could draw the same tokens."""
        return (*GRAMMARS, "--random-seed", str(next(self.seeds)))

    def _layouts(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Return the ranks and the flags of every layout whose artifact is there."""
        found: dict[str, tuple[int, tuple[str, ...]]] = {
            "g1": (1, (*OURS, *GRAPHS)),
            "q1": (1, (*OURS, *GRAPHS, "--tpla-rows", "sketched")),
            "eager": (1, (*OURS, *EAGER)),
        }
        two = ("--tpla-groups", "2", *OURS, *(GRAPHS if GPUS > 1 else ()), "--tpla-artifact")
        for name, artifact in (("g2", self.args.artifact), ("q2", self.args.sketched_artifact)):
            if artifact is not None:
                found[name] = (2, (*two, str(artifact)))
        return found

    def stop(self) -> None:
        """End all servers."""
        for one in (*self.engines.values(), *self.stocks.values()):
            one.stop()

    def decoder(self, name: str, kind: str) -> Decoder:
        """Return a layout's servers, with speculation ("drafting") or without ("plain"), once they answer."""
        if (name, kind) not in self._decoders:
            source = self.stocks if name == "stock" else self.engines
            self._decoders[name, kind] = Decoder(source[kind], name)
        return self._decoders[name, kind]

    def both(self, name: str) -> dict[str, Decoder]:
        """Return the two kinds of servers of a layout."""
        return {kind: self.decoder(name, kind) for kind in ("drafting", "plain")}

    def answers(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Return a server's answers to all prompts, each asked once."""
        if (name, kind) not in self._answers:
            decoder = self.decoder(name, kind)
            self._answers[name, kind] = answer_all(decoder, self.prompts, self.args.tokens, 8)
        return self._answers[name, kind]

    def keep(self, name: str, work: Callable[..., Any], *arguments: Any) -> None:
        """Run one part and write the file, which has the other parts even if this one fails."""
        start = time.monotonic()
        if start - self.began > self.args.limit_s:
            self.parts[name] = {"skipped": f"after {start - self.began:.0f} s"}
        else:
            try:
                self.parts[name] = work(*arguments)
            except Exception as error:
                self.parts[name] = {"failed": f"{type(error).__name__}: {error}"[:1500]}
                traceback.print_exc()
        now = time.monotonic()
        print(f"== {name} ({now - start:.0f} s, {now - self.began:.0f} s in all)")
        print(json.dumps(self.parts[name])[:700], flush=True)
        self.args.out.write_text(json.dumps(self.result, indent=1))

    def part(self, question: str, name: str) -> None:
        """Answer one question about one layout, if it is a question about that layout."""
        match question:
            case "right":
                self.keep(f"{name}: right", self.right, name)
            case "penalised" if name != "stock":
                self.keep(f"{name}: penalised", self.penalised, name)
            case "requests" if name not in ("eager", "stock"):
                self.keep(f"{name}: requests", self.requests, name)
            case "fast":
                for kind in ("plain", "drafting"):
                    self.keep(f"{name}: fast, {kind}", self.fast, name, kind)
            case "documents" if self.args.documents:
                self.keep(f"{name}: documents", self.documents, name)
            case "sampled" if name in ("g1", "q1"):
                for prompt in self.prompts[8:17:4]:
                    self.keep(f"{name}: sampled at {len(prompt)} tokens", self.sampled, name, prompt)
            case "along" if name in ("g1", "q1"):
                for kind in ("plain", "drafting"):
                    self.keep(f"{name}: sampled along answers, {kind}", self.along, name, kind)
            case "control" if name in ("g1", "q1", "stock"):
                self.keep(f"{name}: control", self.control, name)

    def right(self, name: str) -> dict[str, Any]:
        """Compare answers with speculation and without."""
        return compare(self.answers(name, "plain"), self.answers(name, "drafting"))

    def control(self, name: str) -> dict[str, Any]:
        """Compare answers without speculation in different batches, to see the effect of bfloat16 alone."""
        others = answer_all(self.decoder(name, "plain"), self.prompts, self.args.tokens, 16)
        return compare(self.answers(name, "plain"), others)

    def documents(self, name: str) -> dict[str, Any]:
        """Compare answers to documents: the tokens accepted, and whether the answers part."""
        told = json.loads(self.args.documents.read_text())
        said = {kind: answer_all(one, told, 64, 16) for kind, one in self.both(name).items()}
        return compare(said["plain"], said["drafting"])

    def penalised(self, name: str) -> dict[str, Any]:
        """Compare answers under penalties with those of a server without speculation and overlap scheduling."""
        decoders = {"plain": self.decoder(f"{name}-in-turn", "plain"), "drafting": self.decoder(name, "drafting")}
        return penalised(decoders, self.prompts[8:16], 48)

    def requests(self, name: str) -> dict[str, Any]:
        """Send requests of every kind to a server that speculates."""
        return every_kind(self.decoder(name, "drafting").pair, self.prompts[12])

    def fast(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Measure tokens a second, of short prompts."""
        short = [ids[:64] for ids in self.prompts if len(ids) >= 64]
        return speed(self.decoder(name, kind), short, self.args.tokens, self.args.batches)

    def sampled(self, name: str, prompt: list[int]) -> dict[str, Any]:
        """Compare samples at one prompt with speculation and without."""
        return draws_at(prompt, self.both(name), self.args.draws, self.args.draw_s, self.draws)

    def along(self, name: str, kind: str) -> dict[str, Any]:
        """Compare samples along whole answers with the target's distribution."""
        return along_answers(self.prompts[8:13:4], self.decoder(name, kind), self.args.tokens)

    def print_summary(self) -> None:
        """Print a line for each comparison of answers and each speed."""
        for name, row in self.parts.items():
            if "equal" in row:
                print(
                    f"{name:>20}: {row['equal']} equal, {row['ties']} ties, {row['different']} different of "
                    f"{row['prompts']}; {row['accept_length'] or 0:.2f} tokens a step"
                )
            elif isinstance(row, list) and row:
                rates = ", ".join(f"{one['batch']}: {one['tokens_per_second']:.0f}" for one in row)
                print(f"{name:>20}: tokens/s at batch {rates}; {row[-1]['accept_length']} tokens a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, help="of two groups of plain rows, for this model")
    parser.add_argument("--sketched-artifact", type=Path, help="of two groups of sketched rows")
    parser.add_argument("--documents", type=Path, help="JSON of prompts that ask for what stands in them, as token ids")
    parser.add_argument("--draws", type=int, default=20_000, help="samples at each of three prompts")
    parser.add_argument("--draw-s", type=float, default=35, help="those at one prompt take no longer")
    parser.add_argument("--draws-file", type=Path, help="keeps the samples, so that the next run adds to them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guesses", type=int, default=GUESSES, help="a step")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--only", nargs="+", default=["g1", "q1", "eager", "g2", "q2", "stock"], help="layouts, in this order"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="questions, in this order")
    parser.add_argument("--limit-s", type=float, default=420, help="no part is begun after so many seconds")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        run = Run(args, Path(scratch))
        try:
            served = run.start()
            for question in args.parts:
                for name in served:
                    run.part(question, name)
        finally:
            run.stop()
    run.print_summary()


if __name__ == "__main__":
    main()
