"""The planner's printed answer: a table for each load, a map of the fastest method, and the source of each number."""

import math
from collections.abc import Sequence
from typing import Any

from sglang_tpla.plan.choice import Answer, Row, Setting, overall


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def provenance(setting: Setting) -> dict[str, list[str]]:
    """Return the source of every number: measured, from a data sheet, assumed or modelled."""
    gpu, link = setting.gpu, setting.link
    link_fact = (
        f"{link.name}: {link.latency_s * 1e6:g} us a collective, {link.bytes_per_s / 1e9:g} GB/s a rank each way "
        f"({link.source})"
    )
    return {
        "measured": [f"{gpu.name}: {fact}" for fact in gpu.measured],
        "from_data_sheets": [f"{gpu.name}: {fact}" for fact in gpu.from_data_sheets],
        "assumed": [*(f"{gpu.name}: {fact}" for fact in gpu.assumed), link_fact],
        "modelled": [
            "every time below: bytes and operations of each kernel over its rate plus an overhead, kernels and "
            "collectives one after another, equal loads on all ranks",
            "weights, cache bytes and the tokens that fit: counted from the model's sizes",
        ],
    }


def heading(setting: Setting) -> str:
    model, gpu = setting.model, setting.gpu
    ranks = setting.methods[0].ranks
    lines = [
        f"{model.name}: {model.layers} layers, {model.heads} heads, latent {model.latent_dim} + rope "
        f"{model.rope_dim}; weights {setting.precision.weights}, SGLang's own cache {setting.precision.cache}",
        f"{ranks} attention ranks on {gpu.name} ({gpu.memory_bytes / 1e9:.0f} GB), {setting.link.name}; the other "
        f"weights over {setting.gpus} GPUs",
    ]
    for kind, facts in provenance(setting).items():
        lines += [f"{kind.replace('_', ' ')}: {fact}" for fact in facts]
    return "\n".join(lines)


def table(answer: Answer, layers: int) -> str:
    """Return the table of one load: every method's modelled time, cache and capacity, then the recommendation."""
    load = answer.load
    step = "a decode step"
    if load.verified > 1:
        step = f"verifying {load.verified} tokens a request, of which {load.accepted:g} are kept"
    column = "ms a token" if load.verified > 1 else "ms a step"
    lines = [
        f"batch {load.batch} x context {load.context_tokens:,} ({load.tokens:,} cached tokens), attention part of "
        f"{step}, modelled",
        f"{'method':<34}{'us a layer':>11}{'kernels':>10}{'links':>8}{column:>11}{'width':>7}"
        f"{'B/token/rank':>14}{'tokens that fit':>17}{'pays from':>12}",
    ]
    for row in answer.rows:
        lines.append(_line(row, layers, row.method == answer.recommended, load.accepted))
    verdict = answer.recommended.label if answer.recommended else "none"
    lines.append(f"recommended: {verdict}")
    lines += [f"  - {reason}" for reason in answer.reasons]
    return "\n".join(lines)


def _line(row: Row, layers: int, recommended: bool, accepted: float) -> str:
    mark = "*" if recommended else " "
    if row.price is None:
        return f"{mark}{row.method.label:<33} cannot: {row.refused}"
    price = row.price
    even = "" if math.isnan(row.break_even_tokens) else f"{row.break_even_tokens:,.0f}"
    line = (
        f"{mark}{row.method.label:<33}{_time(price.layer_s):>11}{_time(sum(price.kernels_s.values())):>10}"
        f"{_time(price.collectives_s):>8}{price.layer_s * layers * 1e3 / accepted:>11.2f}{row.width:>7}"
        f"{row.cache_bytes_per_token_and_rank:>14,.0f}{row.tokens_that_fit:>17,}{even:>12}"
    )
    if row.refused:
        return f"{line}  ({row.refused})"
    return line if row.fits else f"{line}  does not fit"


def fastest_map(answers: Sequence[Answer]) -> str:
    """Return the map, batch by context, of the fastest method that fits."""
    batches = sorted({a.load.batch for a in answers})
    contexts = sorted({a.load.context_tokens for a in answers})
    cells = {(a.load.batch, a.load.context_tokens): a.fastest.code if a.fastest is not None else "-" for a in answers}
    lines = [
        "fastest method that fits, modelled (TP, DCP, DP attention; MLA8: plain MLA with an 8-bit cache; Tg: TPLA with",
        "g groups, Tg.8 in sketched rows, s: with the reduce-scatter before o_proj; -: nothing fits)",
        "batch \\ context" + "".join(f"{context:>9,}" for context in contexts),
    ]
    for batch in batches:
        lines.append(f"{batch:>15}" + "".join(f"{cells[batch, context]:>9}" for context in contexts))
    return "\n".join(lines)


def summary(answers: Sequence[Answer]) -> str:
    """Return the line about several loads: the method that is least behind on average."""
    method = overall(answers)
    return f"over all loads: {method.label if method else 'nothing fits'}"


def as_json(setting: Setting, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the whole answer as JSON, with units in the names."""
    layers = setting.model.layers
    best = overall(answers)
    return {
        "model": setting.model.name,
        "layers": layers,
        "ranks": setting.methods[0].ranks,
        "gpus": setting.gpus,
        "gpu": setting.gpu.name,
        "link": setting.link.name,
        "weights_dtype": setting.precision.weights,
        "cache_dtype": setting.precision.cache,
        "provenance": provenance(setting),
        "recommended_over_all": best.label if best else None,
        "loads": [_load_json(a, layers) for a in answers],
    }


def _load_json(answer: Answer, layers: int) -> dict[str, Any]:
    return {
        "batch": answer.load.batch,
        "context_tokens": answer.load.context_tokens,
        "verified_tokens": answer.load.verified,
        "accepted_length": answer.load.accepted,
        "fastest": answer.fastest.label if answer.fastest else None,
        "recommended": answer.recommended.label if answer.recommended else None,
        "reasons": list(answer.reasons),
        "methods": [_row_json(row, layers, answer.load.accepted) for row in answer.rows],
    }


def _row_json(row: Row, layers: int, accepted: float) -> dict[str, Any]:
    common = {
        "method": row.method.label,
        "rows": row.method.rows if row.method.kind == "tpla" else None,
        "exact": row.method.exact,
        "refused": row.refused,
    }
    if row.price is None:
        return common
    return common | {
        "layer_s": row.price.layer_s,
        "step_s": row.price.layer_s * layers,
        "token_s": row.price.layer_s * layers / accepted,
        "kernels_s": row.price.kernels_s,
        "collectives_s": row.price.collectives_s,
        "width": row.width,
        "heads": row.heads,
        "cache_bytes_per_token_and_rank": row.cache_bytes_per_token_and_rank,
        "weight_bytes_per_rank": row.weight_bytes_per_rank,
        "tokens_that_fit": row.tokens_that_fit,
        "fits": row.fits,
        "break_even_tokens": row.break_even_tokens if math.isfinite(row.break_even_tokens) else None,
    }
