"""From the end of prefill to the first decode step, through real servers.

    python benchmarks/engine_gpu.py --out FILE [--groups 2] [--layers 61] [--tokens 1024 8192 32768] [--chunk 8192]

A checkpoint with random weights whose cache is DeepSeek-V3's (61 layers of 512 + 64 values in bfloat16, 70 KB a token)
and whose other sizes are small, so that what is timed is the cache's way and not the model. One prefill server and a
decode server with as many ranks as groups (each on a GPU of its own over NCCL where there are as many), on one host:
payloads go through shared memory, projected to each rank's slice where there are groups.

For every prompt length, medians over the repeats after one warm-up, no cached prefix; the clock starts when SGLang
hands the last rows to the sender, that is, when prefill has ended:

- sent_ms: until every decode rank has confirmed its cache
- first_token_ms: until the client has the prompt's own first token, which travels beside the cache
- first_step_ms: until the client has the first token that a decode step computed
- goodput: bytes moved after the prefill's end over sent_ms (prompts beyond a chunk overlap with prefill)
"""

import argparse
import concurrent.futures
import json
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from alone import alone
from machine import header
from v3_shaped import LATENT, ROPE, VOCABULARY, Shape, write_artifact, write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.e2e.servers import transfer_lines
from tests.e2e.traffic import Pair
from tests.gpu.engine import DEVICE, OUR_KERNEL, Engines

ANSWER_TOKENS = 4


def one_request(pair: Pair, prompt: list[int]) -> dict[str, Any]:
    """Send one prompt through both servers; return the transfer's log line and when the client saw the first tokens."""
    body = pair.body(prompt, ANSWER_TOKENS)
    seen: list[float] = []

    def decode() -> None:
        with httpx.stream("POST", pair.decode.url + "/generate", json=body | {"stream": True}, timeout=300) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    seen.append(time.time())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = pool.submit(decode)
        pair.prefill.post("/generate", body, 300).raise_for_status()
        stream.result()
    (line,) = (line for line in transfer_lines(pair.prefill) if line["room"] == body["bootstrap_room"])
    assert line["result"] == "success", line
    end_of_prefill = line["at"] - line["after_prefill_seconds"]
    assert len(seen) >= ANSWER_TOKENS, seen  # the times are only valid with one event a token
    return line | {"first_token_seconds": seen[0] - end_of_prefill, "first_step_seconds": seen[1] - end_of_prefill}


def measure(pair: Pair, tokens: int, repeats: int, chunk: int) -> dict[str, Any]:
    """Return medians over ``repeats`` requests of ``tokens`` tokens after a warm-up."""
    dice = random.Random(tokens)
    runs = []
    for _ in range(repeats + 1):
        assert pair.prefill.post("/flush_cache", {}).status_code == 200
        runs.append(one_request(pair, [dice.randrange(100, VOCABULARY) for _ in range(tokens)]))
    runs = runs[1:]

    def median_ms(key: str) -> float:
        return 1e3 * statistics.median(run[key] for run in runs)

    last_chunk = (tokens - 1) % chunk + 1
    sent = median_ms("after_prefill_seconds")
    return {
        "tokens": tokens,
        "bytes": runs[0]["bytes"],
        "sent_ms": sent,
        "first_token_ms": median_ms("first_token_seconds"),
        "first_step_ms": median_ms("first_step_seconds"),
        "transfer_ms": median_ms("seconds"),
        "gigabytes_per_second_after_prefill": runs[0]["bytes"] * last_chunk / tokens / sent / 1e6,
        "shared_memory_bytes": runs[0]["shared_memory_bytes"],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens that prefill computes at a time")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {
        **header(torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"),
        "layers": args.layers,
        "groups": args.groups,
        "cache_bytes_per_token": args.layers * (LATENT + args.groups * ROPE) * (2 if DEVICE == "cuda" else 4),
        "chunked_prefill_tokens": args.chunk,
        "rows": rows,
    }
    with TemporaryDirectory() as scratch:
        model, artifact = Path(scratch) / "model", Path(scratch) / "artifact.safetensors"
        context = 2 * max(args.tokens)
        shape = Shape(args.layers, context, heads=8, hidden=256, query_latent=128, intermediate=512)
        write_checkpoint(model, shape)
        flags = ("--tpla-groups", str(args.groups))
        if args.groups > 1:
            write_artifact(artifact, model, args.groups)
            flags += ("--tpla-artifact", str(artifact))
        engines = Engines(str(model), args.out.parent)
        try:
            engines.start_prefill("--chunked-prefill-size", str(args.chunk))
            engines.decode("decode", args.groups, *flags, *OUR_KERNEL)
            pair = engines.pair("decode")
            with alone():
                for tokens in args.tokens:  # write each row at once, in case the next fails
                    rows.append(measure(pair, tokens, args.repeats, args.chunk))
                    args.out.write_text(json.dumps(result, indent=1))
        finally:
            engines.stop()
    print(f"{'tokens':>7} {'sent':>11} {'first token':>14} {'first step':>13} {'GB/s after prefill':>19}")
    for row in rows:
        print(
            f"{row['tokens']:>7} {row['sent_ms']:>8.1f} ms {row['first_token_ms']:>11.1f} ms "
            f"{row['first_step_ms']:>10.1f} ms {row['gigabytes_per_second_after_prefill']:>19.2f}"
        )


if __name__ == "__main__":
    main()
