"""Turn parallel samples into separate requests, each with its own room.

SGLang sends ``n`` samples of a prompt, and before them a request that only fills the prefix cache, under one room. Here
they become a batch before SGLang sees them, and prefill's cache finds the shared prompt by itself. Both servers get the
same request and must arrive at the same rooms, so the rooms follow from the request. Lists that do not go together
raise `RequestRefused`.
"""

import hashlib
from typing import Any

from sglang_tpla.host.requests.fields import LAST_ROOM, MAX_SAMPLES, RequestRefused, is_integer, shown, within

# These fields have one value, or one for each prompt; the last four are those of later releases of SGLang.
PER_PROMPT = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask", "return_hidden_states",
              "custom_logit_processor", "extra_key", "lora_path", "bootstrap_host", "bootstrap_port",
              "bootstrap_pair_key", "decode_tp_size", "watermark", "sampling_logprobs_mode", "cache_salt",
              "kv_hints")  # fmt: skip
# A list in one of these fields belongs to a single prompt, or has one entry for each prompt of a batch.
MEDIA = ("image_data", "video_data", "audio_data", "modalities", "mm_hashes", "mm_content_hashes")


def room_of(room: int, sample: int) -> int:
    """Return the room of a sample; the first sample keeps the request's room.

    A hash draws the others from the whole range, so that they miss rooms that clients or routers choose.

    >>> room_of(7, 0)
    7
    """
    if sample == 0:
        return room
    digest = hashlib.blake2b(b"%d/%d" % (room, sample), digest_size=8, person=b"tpla-sample").digest()
    return int.from_bytes(digest, "little") % LAST_ROOM + 1


def samples_of(obj: Any) -> int:
    """Return the ``n`` of a request, which SGLang requires to be equal for all prompts of a batch."""
    params = obj.sampling_params
    each = params if isinstance(params, list) else [params]
    found = set()
    for one in each:
        if one is not None and not isinstance(one, dict):
            raise RequestRefused(f"sampling_params must be an object or a list of objects; got {shown(one)}")
        n = (one or {}).get("n")
        found.add(1 if n is None else within("sampling_params.n", n, 1, MAX_SAMPLES))
    if len(found) > 1:
        raise RequestRefused(f"sampling_params.n must be the same for all prompts of a batch; got {sorted(found)}")
    return found.pop() if found else 1


def prompts_of(obj: Any) -> int | None:
    """Return the number of prompts of a batch, or None for a single prompt."""
    for name in ("text", "input_ids"):
        value = getattr(obj, name)
        if value is None:
            continue
        if isinstance(value, str) or (name == "input_ids" and value and is_integer(value[0])):
            return None
        if not isinstance(value, list) or not value:
            raise RequestRefused(f"{name} must be a prompt or a list of prompts, not empty; got {shown(value)}")
        return len(value)
    if obj.input_embeds is not None:
        raise RequestRefused("input_embeds: embeddings are not carried to decode: send text or input_ids")
    raise RequestRefused("a request needs text or input_ids")


def rooms_of(room: Any, prompts: int | None, samples: int) -> Any:
    """Return the rooms of a request's samples, all samples of a prompt one after another.

    Args:
        room: one number is a single prompt's room, or the first of a batch's successive rooms; a list has one for each
            prompt or, from routers, one for each sample.
        prompts: number of prompts, or None for a single one.
        samples: number of samples of each prompt.
    """
    count = prompts or 1
    if room is None:
        return None
    if not isinstance(room, list):
        if not is_integer(room):
            raise RequestRefused(f"bootstrap_room must be a whole number or a list of them; got {shown(room)}")
        room = [room + i for i in range(count)]
    if len(room) == count * samples:
        return room
    if len(room) != count:
        raise RequestRefused(
            f"bootstrap_room must have one room for each of {count} prompts, or for each of {count * samples} samples; "
            f"got {len(room)}"
        )
    if not all(map(is_integer, room)):
        raise RequestRefused(f"bootstrap_room must hold whole numbers; got {shown(room)}")
    return [room_of(one, sample) for one in room for sample in range(samples)]


def spread(value: Any, prompts: int | None, samples: int, name: str) -> Any:
    """Return a field of a batch with one entry for each sample; a value for all stays one value."""
    if not isinstance(value, list):
        return value
    count = prompts or 1
    if len(value) == count * samples:
        return value
    if len(value) != count:
        raise RequestRefused(f"{name} must have one entry for each of {count} prompts; got {len(value)}")
    return [entry for entry in value for _ in range(samples)]


def give_each_its_room(obj: Any) -> None:
    """Turn ``n`` samples into a batch in place, and check that lists have an entry for each request."""
    prompts, samples = prompts_of(obj), samples_of(obj)
    count = prompts or 1
    if count * samples > MAX_SAMPLES and samples > 1:
        raise RequestRefused(
            f"a request may ask for {MAX_SAMPLES} samples at most; got {count} prompts and n = {samples}"
        )
    obj.bootstrap_room = rooms_of(obj.bootstrap_room, prompts, samples)
    if prompts is None and samples == 1:
        if isinstance(obj.bootstrap_room, list):
            obj.bootstrap_room = obj.bootstrap_room[0]
        for name in ("bootstrap_host", "bootstrap_port"):
            value = getattr(obj, name)
            if isinstance(value, list):
                if len(value) != 1:
                    raise RequestRefused(f"{name} must be one value for one prompt; got {len(value)}")
                setattr(obj, name, value[0])
        return
    for name in PER_PROMPT:
        if isinstance(value := getattr(obj, name, None), list):
            setattr(obj, name, spread(value, prompts, samples, name))
    obj.sampling_params = spread(obj.sampling_params, prompts, samples, "sampling_params")
    ids = obj.token_ids_logprob  # a list for all prompts, or a list of lists
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        obj.token_ids_logprob = spread(ids, prompts, samples, "token_ids_logprob")
    if samples > 1:
        _expand(obj, prompts, samples)


def _expand(obj: Any, prompts: int | None, samples: int) -> None:
    count = prompts or 1
    for name in ("text", "input_ids"):  # SGLang takes the ids where it gets both
        if (value := getattr(obj, name)) is not None:
            setattr(obj, name, [value] * samples if prompts is None else spread(value, prompts, samples, name))
    for name in MEDIA:
        value = getattr(obj, name, None)
        if not isinstance(value, list) or not value:
            continue  # one for all, or none
        if prompts is None:
            nested = len(value) == 1 and isinstance(value[0], list)  # SGLang takes this form where n is above 1
            setattr(obj, name, [value[0] if nested else value] * samples)
        elif len(value) == prompts:
            setattr(obj, name, [entry for entry in value for _ in range(samples)])
        else:  # SGLang refuses this, too: with as many entries as samples, each sample would see one image
            raise RequestRefused(f"{name} must have one entry for each of {prompts} prompts; got {len(value)}")
    params = obj.sampling_params
    if not isinstance(params, list):
        params = [params] * (count * samples)
    obj.sampling_params = [{**one, "n": 1} for one in params]
    if isinstance(obj.rid, list):
        if len(obj.rid) != count:
            raise RequestRefused(f"rid must have one id for each of {count} prompts; got {len(obj.rid)}")
        obj.rid = [f"{rid}_{sample}" for rid in obj.rid for sample in range(samples)]
