"""From the end of prefill to the first decode step, through real servers on one GPU.

    python benchmarks/engine_gpu.py --out FILE [--layers 61] [--tokens 1024 8192 32768] [--repeats 5]

A checkpoint with random weights is written whose cache is DeepSeek-V3's (61 layers of 512 + 64 values in bfloat16,
70 KB a token) and whose other sizes are small, so that what is timed is the cache's way and not the model. A prefill
and a decode server (one group, our decode kernel) share the GPU and the host, so that payloads go through shared
memory.

For every prompt length, medians over the repeats (two beyond one chunk) after one warm-up, no cached prefix:

- after_prefill_ms: from the moment SGLang hands the last rows to the sender until the decode rank has confirmed them
- first_step_ms: from that same moment until the client has the first token that decode itself computed
- goodput: bytes moved after the prefill's end over after_prefill_ms (prompts beyond a chunk overlap with prefill)
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import shutil
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.e2e.servers import ROOT, Pair, request_body, transfer_lines
from tests.gpu.engine import DEVICE, OUR_KERNEL, Engines

LATENT, ROPE, NOPE, VALUE, HEADS, HIDDEN, QUERY, INTERMEDIATE, VOCABULARY = (
    512,
    64,
    128,
    128,
    8,
    256,
    128,
    512,
    4096,
)
CHUNK = 8192


def write_checkpoint(folder: Path, layers: int, context: int) -> None:
    """Random weights of a DeepSeek-V3-shaped model with dense feed-forward layers."""
    config = json.loads((ROOT / "examples/nano-mla/config.json").read_text())
    config |= {
        "num_hidden_layers": layers, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": LATENT, "q_lora_rank": QUERY,
        "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "first_k_dense_replace": layers,
        "max_position_embeddings": context, "vocab_size": VOCABULARY,
    }  # fmt: skip
    config["rope_scaling"]["original_max_position_embeddings"] = context
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/nano-mla" / name, folder)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    ones = torch.ones(max(HIDDEN, LATENT), dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": draw(VOCABULARY, HIDDEN),
        "lm_head.weight": draw(VOCABULARY, HIDDEN),
        "model.norm.weight": ones[:HIDDEN].clone(),
    }
    for layer in range(layers):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": ones[:HIDDEN].clone(),
                "post_attention_layernorm": ones[:HIDDEN].clone(),
                "self_attn.q_a_proj": draw(QUERY, HIDDEN),
                "self_attn.q_a_layernorm": ones[:QUERY].clone(),
                "self_attn.q_b_proj": draw(HEADS * (NOPE + ROPE), QUERY),
                "self_attn.kv_a_proj_with_mqa": draw(LATENT + ROPE, HIDDEN),
                "self_attn.kv_a_layernorm": ones[:LATENT].clone(),
                "self_attn.kv_b_proj": draw(HEADS * (NOPE + VALUE), LATENT),
                "self_attn.o_proj": draw(HIDDEN, HEADS * VALUE),
                "mlp.gate_proj": draw(INTERMEDIATE, HIDDEN),
                "mlp.up_proj": draw(INTERMEDIATE, HIDDEN),
                "mlp.down_proj": draw(HIDDEN, INTERMEDIATE),
            }.items()
        }
    save_file(tensors, folder / "model.safetensors")


def one_request(pair: Pair, prompt: list[int]) -> dict[str, Any]:
    """One prompt through both servers: the transfer's log line, and when the client saw each decoded token."""
    room = pair.next_room = pair.next_room + 1
    body = request_body(prompt, 4) | {
        "bootstrap_host": "127.0.0.1", "bootstrap_port": pair.bootstrap, "bootstrap_room": room,
    }  # fmt: skip
    seen: list[float] = []

    def decode() -> None:
        with httpx.stream(
            "POST", pair.decode.url + "/generate", json=body | {"stream": True}, timeout=300
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    seen.append(time.time())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = pool.submit(decode)
        pair.prefill.post("/generate", body, 300).raise_for_status()
        stream.result()
    (line,) = (line for line in transfer_lines(pair.prefill) if line["room"] == room)
    assert line["result"] == "success", line
    end_of_prefill = line["at"] - line["after_prefill_seconds"]
    return line | {"first_step_seconds": seen[1] - end_of_prefill, "tokens_seen": len(seen)}


def measure(pair: Pair, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians over ``repeats`` requests of ``tokens`` tokens after a warm-up."""
    dice = random.Random(tokens)
    runs = []
    for _ in range(repeats + 1):
        assert pair.prefill.post("/flush_cache", {}).status_code == 200
        runs.append(one_request(pair, [dice.randrange(100, VOCABULARY) for _ in range(tokens)]))
    runs = runs[1:]

    def median_ms(key: str) -> float:
        return 1e3 * statistics.median(run[key] for run in runs)

    last_chunk = min(tokens, (tokens - 1) % CHUNK + 1)
    after = median_ms("after_prefill_seconds")
    return {
        "tokens": tokens,
        "bytes": runs[0]["bytes"],
        "after_prefill_ms": after,
        "first_step_ms": median_ms("first_step_seconds"),
        "transfer_ms": median_ms("seconds"),
        "gigabytes_per_second_after_prefill": runs[0]["bytes"] * last_chunk / tokens / after / 1e6,
        "shared_memory_bytes": runs[0]["shared_memory_bytes"],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "layers": args.layers,
        "cache_bytes_per_token": args.layers * (LATENT + ROPE) * (2 if DEVICE == "cuda" else 4),
        "chunked_prefill_tokens": CHUNK,
        "rows": rows,
    }
    with TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        context = 2 * max(args.tokens)
        write_checkpoint(model, args.layers, context)
        engines = Engines(str(model), args.out.parent)
        try:
            engines.start_prefill("--chunked-prefill-size", str(CHUNK))
            engines.decode("decode", 1, "--tpla-groups", "1", *OUR_KERNEL)
            pair = engines.pair("decode")
            for tokens in args.tokens:  # each row is kept, whatever becomes of the next
                rows.append(measure(pair, tokens, args.repeats if tokens <= CHUNK else min(2, args.repeats)))
                args.out.write_text(json.dumps(result, indent=1))
        finally:
            engines.stop()
    print(
        f"{'tokens':>7} {'after prefill':>14} {'first step':>11} {'whole transfer':>15} {'GB/s after prefill':>19}"
    )
    for row in rows:
        print(
            f"{row['tokens']:>7} {row['after_prefill_ms']:>11.1f} ms {row['first_step_ms']:>8.1f} ms "
            f"{row['transfer_ms']:>12.1f} ms {row['gigabytes_per_second_after_prefill']:>19.2f}"
        )


if __name__ == "__main__":
    main()
