"""Find the way of sharing attention over GPUs that decodes fastest for a model, a machine and a load.

    python -m sglang_tpla.plan --model deepseek-v3 --gpu h200 --ranks 8 --link nvlink --weights-dtype fp8 \\
        --batch 16 --context 32768

The planner prices plain tensor parallelism, plain MLA with an 8-bit cache, TPLA at every g in every row format (head
weights replicated, or a reduce-scatter before o_proj), decode context parallelism and data-parallel attention, and
recommends one of them with its reasons. It prices every combination of several batches and contexts; --map shows the
fastest method over a grid. With speculative decoding a step verifies several tokens of a request (--verified-tokens)
and keeps --accepted-length of them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from sglang_tpla.config import not_retired
from sglang_tpla.plan import hardware, text
from sglang_tpla.plan.choice import Setting, answer
from sglang_tpla.plan.cost import ROWS, Load, Precision, methods
from sglang_tpla.plan.hardware import GPUS, LINKS, Link
from sglang_tpla.plan.model import BUILT_IN, PlanError, find

MOST_GPUS = 100_000
MAP_BATCHES = (1, 4, 16, 64, 128, 256)
MAP_CONTEXTS = (2048, 8192, 32768, 131072)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise PlanError(message)


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="python -m sglang_tpla.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="deepseek-v3", help=f"{', '.join(BUILT_IN)}, or a config.json")
    p.add_argument("--gpu", default="h200", help=f"{', '.join(GPUS)} (default h200)")
    p.add_argument("--gpu-memory-gb", type=float, help="instead of the table's")
    p.add_argument("--gpu-bandwidth-gb-s", type=float, help="data sheet; rates are scaled by it")
    p.add_argument("--gpu-tflops", type=float, help="data sheet, dense bf16; rates are scaled by it")
    p.add_argument("--ranks", type=int, default=8, help="GPUs that share attention (default 8)")
    p.add_argument("--gpus", type=int, help="GPUs over which all other weights are spread (default: --ranks)")
    p.add_argument("--link", default="nvlink", help=f"{', '.join(LINKS)} (default nvlink)")
    p.add_argument("--link-latency-us", type=float, help="one small collective, instead of the table's")
    p.add_argument("--link-gb-s", type=float, help="a rank, each way, instead of the table's")
    p.add_argument("--weights-dtype", default="bf16", help="bf16 or fp8 (DeepSeek's blocks; default bf16)")
    p.add_argument("--cache-dtype", default="bf16", help="of SGLang's own cache: bf16 or fp8 (default bf16)")
    p.add_argument(
        "--rows",
        nargs="+",
        type=not_retired("--rows sketched"),
        default=list(ROWS),
        choices=ROWS,
        help="formats of TPLA's cache (default: all)",
    )
    p.add_argument("--batch", type=int, nargs="+", help="requests that decode together (default 16)")
    p.add_argument("--context", type=int, nargs="+", help="cached tokens of each (default 32768)")
    p.add_argument(
        "--verified-tokens",
        type=int,
        default=1,
        help="with speculative decoding: tokens a request that one step verifies (--speculative-num-draft-tokens)",
    )
    p.add_argument(
        "--accepted-length",
        type=float,
        default=1.0,
        help="tokens that such a step adds on average (spec_accept_length in SGLang's answers)",
    )
    p.add_argument("--groups", type=int, nargs="+", help="latent groups to look at (default: all from 2)")
    p.add_argument(
        "--shared-dims",
        type=int,
        help="latent values that every group keeps (default: d/4, at most 64 in sketched rows, as in calibrate)",
    )
    p.add_argument(
        "--without", nargs="+", default=[], choices=("tp", "tpla", "dcp", "dp"), help="methods that are not open to you"
    )
    p.add_argument("--memory-fraction", type=float, default=0.88, help="of a GPU, for weights and cache (default 0.88)")
    p.add_argument("--margin", type=float, default=0.05, help="what TPLA must gain over exact methods (default 0.05)")
    p.add_argument("--map", action="store_true", help="batch x context: the fastest method")
    p.add_argument("--json", action="store_true", help="everything as JSON")
    return p


def setting_of(a: argparse.Namespace) -> Setting:
    model = find(a.model)
    gpus = a.ranks if a.gpus is None else a.gpus
    if not 1 <= a.ranks <= gpus <= MOST_GPUS:
        raise PlanError(
            f"--ranks must be at least 1 and --gpus at least --ranks, at most {MOST_GPUS}, got {a.ranks} and {gpus}"
        )
    if not 0 < a.memory_fraction <= 1 or not 0 <= a.margin < 1:
        raise PlanError(
            f"--memory-fraction must lie in (0, 1] and --margin in [0, 1), got {a.memory_fraction} and {a.margin}"
        )
    listed = hardware.find("--gpu", GPUS, a.gpu, "--gpu-memory-gb, --gpu-bandwidth-gb-s and --gpu-tflops")
    gpu = listed.with_numbers(
        memory_bytes=None if a.gpu_memory_gb is None else a.gpu_memory_gb * 1e9,
        sheet_bytes_per_s=None if a.gpu_bandwidth_gb_s is None else a.gpu_bandwidth_gb_s * 1e9,
        sheet_flops_per_s=None if a.gpu_tflops is None else a.gpu_tflops * 1e12,
    )
    every = methods(a.ranks, model, a.groups, a.shared_dims, a.rows)
    found = [m for m in every if m.kind not in a.without]
    if not found:
        raise PlanError(f"--without {' '.join(a.without)} leaves no method on {a.ranks} ranks")
    return Setting(
        model=model,
        gpu=gpu,
        link=_link(a),
        precision=Precision(a.weights_dtype, a.cache_dtype),
        methods=found,
        gpus=gpus,
        memory_fraction=a.memory_fraction,
        margin=a.margin,
    )


def _link(a: argparse.Namespace) -> Link:
    link = hardware.find("--link", LINKS, a.link, "--link-latency-us and --link-gb-s")
    if a.link_latency_us is None and a.link_gb_s is None:
        return link
    return replace(
        link,
        latency_s=link.latency_s if a.link_latency_us is None else a.link_latency_us * 1e-6,
        bytes_per_s=link.bytes_per_s if a.link_gb_s is None else a.link_gb_s * 1e9,
        source="given on the command line",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return 0 on success or 2 on bad input."""
    try:
        a = parser().parse_args(argv)
        setting = setting_of(a)
        batches = a.batch or (MAP_BATCHES if a.map else (16,))
        contexts = a.context or (MAP_CONTEXTS if a.map else (32768,))
        verified, accepted = a.verified_tokens, a.accepted_length
        answers = [answer(setting, Load(b, c, verified, accepted)) for b in batches for c in contexts]
    except PlanError as error:
        print(f"sglang_tpla.plan: error: {error}", file=sys.stderr)
        return 2
    if a.json:
        print(json.dumps(text.as_json(setting, answers), indent=1))
        return 0
    print(text.heading(setting) + "\n")
    if a.map:
        print(text.fastest_map(answers))
        return 0
    print("\n\n".join(text.table(found, setting.model.layers) for found in answers))
    if len(answers) > 1:
        print("\n" + text.summary(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
