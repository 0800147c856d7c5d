"""Check the fields of a request that cross from prefill to decode or could end a scheduler, before anything is sent.

SGLang passes most fields on unchecked, so that a wrong value would hang both servers, end one of them, or reach another
client. Every check raises `RequestRefused`, which names the field, its range and what came. Nothing here imports
SGLang; requests are read through the attributes of ``GenerateReqInput``.
"""

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_tpla.config import without_brackets
from sglang_tpla.errors import SglangTplaError

# The metadata row has 0 where there was no room, and the wire carries a room as a signed number of 64 bits.
FIRST_ROOM, LAST_ROOM = 1, 2**63 - 1
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
MAX_SAMPLES = 1024  # prompts times n of one request
LARGEST_BIAS = 1e9  # a larger value over a small temperature is infinite, and sampling then ends the scheduler
LARGEST_TEMPERATURE = 1e30  # a larger one may be infinite in float32, and masked logits over that are no numbers
SMALLEST_PENALTY = 1e-6  # a logit over a smaller one, which in float32 may be 0, is infinite as well
HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")
# SGLang's own processes fill these in; a client's value would send the answer elsewhere.
INTERNAL_FIELDS = ("http_worker_ipc", "mm_data_mooncake", "num_items_assigned", "encoder_urls", "lora_id")
INTERNAL_SAMPLING = frozenset(
    ("is_normalized", "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len")
)
NOT_CARRIED = {
    "input_embeds": "embeddings are not carried to decode: send text or input_ids",
    "positional_embed_overrides": "embeddings are not carried to decode: send text or input_ids",
    "session_params": "sessions are not carried to decode: send the whole prompt, prefill's cache finds what it knows",
    "multi_item_delimiter_indices": "scoring is not carried to decode: ask a server without disaggregation",
    "token_indices_to_pool": "scoring is not carried to decode: ask a server without disaggregation",
}


class RequestRefused(SglangTplaError, ValueError):
    """A request that cannot be served; SGLang answers 400 with its text."""


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Args:
        vocab: number of the model's tokens.
        top_logprobs: number of alternatives of one token in the metadata row.
        data_parallel: number of its prefill server's ranks that a request may name.
        own_host: host with which a server marks the requests that it sends to itself.
        speculates: whether the server guesses tokens and verifies them.
        seeded: whether the server samples by the requests' seeds (``--enable-deterministic-inference``).
        labels: metric labels that a request may give (``--tokenizer-metrics-allowed-custom-labels``).
    """

    vocab: int
    top_logprobs: int
    data_parallel: int
    own_host: str
    speculates: bool = False
    seeded: bool = False
    labels: frozenset[str] = frozenset()


def is_integer(value: Any) -> bool:
    """Return whether a value is a whole number; JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return the short form of a value for a message."""
    text = repr(value) if not isinstance(value, (list, dict, str)) or len(value) < 100 else f"{value!r:.80}..."
    return text[:120]


def within(name: str, value: Any, first: int, last: int) -> int:
    """Check that a value is a whole number of a range, and return it."""
    if not is_integer(value) or not first <= value <= last:
        raise RequestRefused(f"{name} must be a whole number from {first} to {last}; got {shown(value)}")
    return int(value)


def checked_host(value: Any) -> str:
    """Return a bootstrap server's host in one spelling: lower case, no brackets, no dot at the end."""
    if isinstance(value, str):
        host = value.strip().lower()
        try:
            return str(ipaddress.ip_address(without_brackets(host)))
        except ValueError:
            name = host.removesuffix(".")
            if HOST_NAME.fullmatch(name):
                return name
    raise RequestRefused(
        "bootstrap_host must be a host name or an IP address, without a port (that is bootstrap_port); got "
        f"{shown(value)}"
    )


def check_transfer(item: Any, limits: Limits) -> None:
    """Check room, host and port of one request, and put the host into one spelling."""
    if item.bootstrap_room is None:
        raise RequestRefused(
            "bootstrap_room is missing: this server is one of a pair; send requests to the router, or the same "
            f"room ({FIRST_ROOM} to {LAST_ROOM}) to a prefill and a decode server"
        )
    within("bootstrap_room", item.bootstrap_room, FIRST_ROOM, LAST_ROOM)
    if item.disagg_prefill_dp_rank is not None:
        within("disagg_prefill_dp_rank", item.disagg_prefill_dp_rank, 0, limits.data_parallel - 1)
    if item.bootstrap_port is not None:
        within("bootstrap_port", item.bootstrap_port, 1, 65535)
    if item.bootstrap_host is None:
        raise RequestRefused("bootstrap_host is missing: decode must know the prefill server of the request")
    item.bootstrap_host = checked_host(item.bootstrap_host)
    if item.bootstrap_host == limits.own_host:
        raise RequestRefused(
            f"bootstrap_host {limits.own_host} marks a server's requests to itself, which no prefill server reads; "
            "name a prefill server"
        )


def check_carried(item: Any, limits: Limits) -> None:
    """Refuse fields that would not reach decode, and wrong values that SGLang reads only when it has served a request.

    A metric label that the metrics were not made with, or a time of arrival that is not a number, ends SGLang's
    tokenizer process, and with it the server.
    """
    for name, why in NOT_CARRIED.items():
        if getattr(item, name, None) is not None:
            raise RequestRefused(f"{name}: {why}")
    for name in INTERNAL_FIELDS:
        if getattr(item, name, None) is not None:
            raise RequestRefused(f"{name} is set by the server itself; leave it out")
    if unknown := set(getattr(item, "custom_labels", None) or ()) - limits.labels:
        raise RequestRefused(
            f"custom_labels may hold what the server was started with (--tokenizer-metrics-allowed-custom-labels): "
            f"{sorted(limits.labels)}; got {shown(min(unknown))}"
        )
    received = getattr(item, "received_time", None)  # SGLang's endpoints fill it in, so it is not refused
    if received is not None and not (isinstance(received, (int, float)) and math.isfinite(received)):
        raise RequestRefused(f"received_time must be a number of seconds; got {shown(received)}: leave it out")


def check_prompt(item: Any, limits: Limits) -> None:
    """Check that the prompt is text, or token ids of the vocabulary; SGLang takes the ids where it gets both."""
    if item.text is not None and not isinstance(item.text, str):
        raise RequestRefused(f"text must be a string or a list of strings; got {shown(item.text)}")
    if item.input_ids is not None:
        check_token_ids("input_ids", item.input_ids, limits.vocab)
        if not len(item.input_ids):
            raise RequestRefused("input_ids must not be empty")


def check_token_ids(name: str, ids: Any, vocab: int) -> None:
    """Check that the embedding has a row for each id, because any other id ends the server."""
    if not isinstance(ids, list):
        raise RequestRefused(f"{name} must be a list of token ids; got {shown(ids)}")
    try:
        if not ids or (min(ids) >= 0 and max(ids) < vocab and set(map(type, ids)) == {int}):
            return
    except TypeError:
        pass
    wrong = next(i for i in ids if not is_integer(i) or not 0 <= i < vocab)
    raise RequestRefused(f"{name} must hold whole numbers from 0 to {vocab - 1} (the vocabulary); got {shown(wrong)}")


def check_logprobs(item: Any, limits: Limits) -> None:
    within("top_logprobs_num", item.top_logprobs_num, 0, min(limits.top_logprobs, limits.vocab))
    within("logprob_start_len", item.logprob_start_len, -1, INT32_MAX)
    if item.token_ids_logprob:
        check_token_ids("token_ids_logprob", item.token_ids_logprob, limits.vocab)
        if len(item.token_ids_logprob) > limits.vocab:  # SGLang reads each one after every token
            raise RequestRefused(
                f"token_ids_logprob may name each of {limits.vocab} tokens once; got {len(item.token_ids_logprob)}"
            )


def check_sampling(params: Any, limits: Limits) -> None:
    """Check sampling parameters in the client's own form."""
    if not isinstance(params, Mapping):
        raise RequestRefused(f"sampling_params must be an object; got {shown(params)}")
    if internal := INTERNAL_SAMPLING.intersection(params):
        raise RequestRefused(f"sampling_params.{min(internal)} is set by the server itself; leave it out")
    ranges = {
        "max_new_tokens": (0, INT32_MAX),
        "min_new_tokens": (0, INT32_MAX),
        "top_k": (-1, INT32_MAX),
        "stream_interval": (1, INT32_MAX),
        "sampling_seed": (-INT64_MAX - 1, INT64_MAX),
    }
    for name, (first, last) in ranges.items():
        if params.get(name) is not None:
            within(f"sampling_params.{name}", params[name], first, last)
    penalty = params.get("repetition_penalty")
    if isinstance(penalty, float) and 0 < penalty < SMALLEST_PENALTY:  # SGLang refuses 0 and negative values
        raise RequestRefused(f"sampling_params.repetition_penalty must be at least {SMALLEST_PENALTY:g}; got {penalty}")
    temperature = params.get("temperature")
    if isinstance(temperature, (int, float)) and temperature > LARGEST_TEMPERATURE:
        raise RequestRefused(
            f"sampling_params.temperature may be {LARGEST_TEMPERATURE:g} at most; got {shown(temperature)}"
        )
    stops = params.get("stop_token_ids")
    if stops is not None:
        # If any request of a batch has min_new_tokens, SGLang masks the stop tokens of the whole batch by their place
        # in the vocabulary.
        for token in stops if isinstance(stops, list) else [stops]:
            if token is not None:
                within("sampling_params.stop_token_ids", token, 0, limits.vocab - 1)
    bias = params.get("logit_bias")
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise RequestRefused(f"sampling_params.logit_bias must be an object of token id and bias; got {shown(bias)}")
    for token, value in bias.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or abs(value) > LARGEST_BIAS:
            raise RequestRefused(
                f"sampling_params.logit_bias of {shown(token)} must be a number up to {LARGEST_BIAS:g} either way; "
                f"got {shown(value)}"
            )


def check_verified(min_p: float, limits: Limits) -> None:
    """Refuse ``min_p`` if SGLang would ignore it or assert on it.

    SGLang ignores it in verification, so answers would have another distribution. With seeds its sampler asserts that
    there is none, which ends the scheduler.
    """
    if limits.seeded and min_p > 0:
        raise RequestRefused(
            f"sampling_params.min_p does not go with --enable-deterministic-inference; got {shown(min_p)}: leave it "
            "out (top_p and top_k are applied), or ask a server without the flag"
        )
    if limits.speculates and min_p > 0:
        raise RequestRefused(
            f"sampling_params.min_p is not applied by a server with speculative decoding; got {shown(min_p)}: leave it "
            "out (top_p and top_k are applied), or ask a server without --speculative-algorithm"
        )


def check_item(item: Any, limits: Limits, transferred: bool = True) -> None:
    """Check one request, single or of a batch, after SGLang has filled in missing fields.

    Args:
        transferred: whether the cache crosses from prefill to decode; that of a server's own request does not.
    """
    check_carried(item, limits)
    if transferred:
        check_transfer(item, limits)
    check_prompt(item, limits)
    check_logprobs(item, limits)
    check_sampling(item.sampling_params, limits)


def check_rooms_differ(items: list[Any]) -> None:
    """Check that every request of a batch has a different room."""
    seen: set[int] = set()
    for item in items:
        if item.bootstrap_room in seen:
            raise RequestRefused(f"bootstrap_room must differ within a batch; {item.bootstrap_room} comes twice")
        seen.add(item.bootstrap_room)
