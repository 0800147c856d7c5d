"""The valid fields of a request: rooms, hosts, ids, sampling parameters, and one room for each sample."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tpla.host.requests.fields import (
    FIRST_ROOM,
    LAST_ROOM,
    Limits,
    RequestRefused,
    check_item,
    check_rooms_differ,
    check_verified,
    checked_host,
)
from sglang_tpla.host.requests.samples import MEDIA, PER_PROMPT, give_each_its_room, room_of

LIMITS = Limits(vocab=1000, top_logprobs=128, data_parallel=2, own_host="2.2.2.2", labels=frozenset(["tenant"]))


def item(**changes: Any) -> SimpleNamespace:
    """Return one request as SGLang has filled it in."""
    fields: dict[str, Any] = dict.fromkeys(
        ("text", "input_embeds", "session_params", "token_ids_logprob", "positional_embed_overrides",
         "multi_item_delimiter_indices", "http_worker_ipc", "lora_id", "rid", "disagg_prefill_dp_rank", *PER_PROMPT)
    )  # fmt: skip
    fields |= {"input_ids": [1, 2, 3], "sampling_params": {}, "top_logprobs_num": 0, "logprob_start_len": -1}
    fields |= {"bootstrap_room": 5, "bootstrap_host": "127.0.0.1", "bootstrap_port": 8998}
    return SimpleNamespace(**fields | changes)


def test_what_verification_ignores_is_refused_where_guesses_are_verified() -> None:
    check_verified(0.1, LIMITS)
    verifies = replace(LIMITS, speculates=True)
    check_verified(0.0, verifies)
    with pytest.raises(RequestRefused, match="min_p is not applied by a server with speculative decoding"):
        check_verified(0.1, verifies)


def test_min_p_beside_seeds_is_refused() -> None:
    """SGLang asserts that the two never meet, in the scheduler."""
    seeded = replace(LIMITS, seeded=True)
    check_verified(0.0, seeded)
    with pytest.raises(RequestRefused, match=r"min_p does not go with --enable-deterministic-inference; got 0\.1"):
        check_verified(0.1, seeded)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bootstrap_room", 2**63, f"from 1 to {LAST_ROOM}"),
        ("bootstrap_room", -1, "got -1"),
        ("bootstrap_room", 0, "got 0"),
        ("bootstrap_room", True, "got True"),
        ("bootstrap_room", None, "send requests to the router"),
        ("disagg_prefill_dp_rank", 2, "0 to 1"),
        ("bootstrap_port", 0, "1 to 65535"),
        ("bootstrap_port", "8998", "1 to 65535"),
        ("bootstrap_host", None, "is missing"),
        ("bootstrap_host", "2.2.2.2", "requests to itself"),
        ("bootstrap_host", "prefill:8998", "without a port"),
        ("bootstrap_host", "host/path?x=", "host name"),
        ("bootstrap_host", "", "host name"),
        ("input_ids", [1, 999999], "0 to 999 .*got 999999"),
        ("input_ids", [1, -1], "got -1"),
        ("input_ids", [], "must not be empty"),
        ("input_ids", [1, "a"], "got 'a'"),
        ("input_ids", [1, True], "got True"),
        ("input_ids", [1, 2.0], "got 2.0"),
        ("input_embeds", [[0.5]], "not carried"),
        ("session_params", {"id": "x"}, "sessions are not carried"),
        ("http_worker_ipc", "ipc:///x", "set by the server itself"),
        ("token_indices_to_pool", [100000], "scoring is not carried"),
        ("custom_labels", {"tenant": "a", "other": "b"}, r"\['tenant'\]; got 'other'"),
        ("received_time", "x", "a number of seconds; got 'x'"),
        ("received_time", float("inf"), "a number of seconds; got inf"),
        ("top_logprobs_num", 129, "0 to 128"),
        ("logprob_start_len", -2, "-1 to"),
        ("token_ids_logprob", [1000], "0 to 999"),
        ("token_ids_logprob", [5] * 1001, "each of 1000 tokens once; got 1001"),
        ("sampling_params", {"top_k": 2**31}, "top_k"),
        ("sampling_params", {"sampling_seed": 2**63}, "sampling_seed"),
        ("sampling_params", {"stream_interval": 0}, "stream_interval"),
        ("sampling_params", {"repetition_penalty": 1e-300}, "repetition_penalty must be at least 1e-06"),
        ("sampling_params", {"logit_bias": {"1": float("inf")}}, "logit_bias"),
        ("sampling_params", {"logit_bias": [1]}, "logit_bias"),
        ("sampling_params", {"is_normalized": True}, "set by the server itself"),
        ("sampling_params", {"stop_token_ids": [-5]}, "stop_token_ids"),
        ("sampling_params", {"stop_token_ids": [1000], "min_new_tokens": 1}, "0 to 999"),
        ("sampling_params", {"stop_token_ids": [1000]}, "0 to 999"),
        ("sampling_params", {"temperature": 1e39}, r"temperature may be 1e\+30 at most; got 1e\+39"),
        ("sampling_params", {"temperature": 10**400}, "temperature may be"),
        ("sampling_params", [], "an object"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_range(field: str, value: Any, said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        check_item(item(**{field: value}), LIMITS)


@pytest.mark.parametrize("ids", [[], [1, 999999], ["a"], [[1]]])
def test_ids_beside_a_text_are_read_as_the_server_reads_them(ids: list[Any]) -> None:
    """SGLang uses the ids of a request that has both, and ids that it cannot embed end its scheduler."""
    with pytest.raises(RequestRefused, match="input_ids must"):
        check_item(item(text="x", input_ids=ids), LIMITS)
    check_item(item(text="x", input_ids=[1]), LIMITS)


def test_what_can_be_served_is_let_through() -> None:
    check_item(item(), LIMITS)
    check_item(item(input_ids=None, text="x", bootstrap_room=LAST_ROOM, bootstrap_port=None), LIMITS)
    check_item(item(sampling_params={"stop_token_ids": [999], "logit_bias": {"5": -100}, "temperature": 2}), LIMITS)
    check_item(item(custom_labels={"tenant": "a"}, received_time=12.5, token_ids_logprob=[5] * 1000), LIMITS)
    check_item(item(sampling_params={"repetition_penalty": 0.5}), LIMITS)


@pytest.mark.parametrize(
    ("given_host", "host"),
    [("Prefill_1", "prefill_1"), ("[::1]", "::1"), ("FE80::1", "fe80::1"), ("a.example.", "a.example"),
     ("10.0.0.1", "10.0.0.1"), ("x", "x")],
)  # fmt: skip
def test_one_spelling_for_a_host(given_host: str, host: str) -> None:
    assert checked_host(given_host) == host
    assert checked_host(host) == host


def test_rooms_of_a_batch_differ() -> None:
    with pytest.raises(RequestRefused, match="7 comes twice"):
        check_rooms_differ([item(bootstrap_room=7), item(bootstrap_room=8), item(bootstrap_room=7)])


def raw(**changes: Any) -> SimpleNamespace:
    return item(**{"text": "a", "input_ids": None} | changes)


def test_samples_become_a_batch_with_a_room_each() -> None:
    one = raw(sampling_params={"n": 3, "temperature": 0})
    give_each_its_room(one)
    assert one.text == ["a"] * 3
    assert one.sampling_params == [{"n": 1, "temperature": 0}] * 3
    assert one.bootstrap_room == [5, room_of(5, 1), room_of(5, 2)]

    two = raw(text=["a", "b"], sampling_params={"n": 2}, bootstrap_room=[5, 9], rid=["x", "y"])
    give_each_its_room(two)
    assert two.text == ["a", "a", "b", "b"]
    assert two.bootstrap_room == [5, room_of(5, 1), 9, room_of(9, 1)]
    assert two.rid == ["x_0", "x_1", "y_0", "y_1"]


def test_every_sample_has_all_of_its_prompts_images() -> None:
    media = {"image_data": ["A", "B"], "video_data": "V", "audio_data": [], "modalities": ["image", "image"],
             "mm_hashes": ["1", "2"]}  # fmt: skip
    one = raw(sampling_params={"n": 2}, **media)
    give_each_its_room(one)
    assert (one.image_data, one.mm_hashes) == ([["A", "B"]] * 2, [["1", "2"]] * 2)  # each sample has both images
    assert (one.video_data, one.audio_data) == ("V", [])  # one video for all, and no audio

    nested = raw(sampling_params={"n": 3}, image_data=[["A", "B"]])
    give_each_its_room(nested)
    assert nested.image_data == [["A", "B"]] * 3

    two = raw(text=["a", "b"], sampling_params={"n": 2}, image_data=["A", ["B", "C"]])
    give_each_its_room(two)
    assert two.image_data == ["A", "A", ["B", "C"], ["B", "C"]]


def test_samples_of_a_prompt_given_twice_have_both_forms() -> None:
    """If a request has both forms, SGLang uses the ids, by the sample's place."""
    one = raw(sampling_params={"n": 2}, input_ids=[1, 2, 3])
    give_each_its_room(one)
    assert (one.text, one.input_ids) == (["a"] * 2, [[1, 2, 3]] * 2)
    two = raw(text=["a", "b"], sampling_params={"n": 2}, input_ids=[[1], [2]])
    give_each_its_room(two)
    assert two.input_ids == [[1], [1], [2], [2]]


def test_fields_that_a_release_lacks_stay_away() -> None:
    one = raw(sampling_params={"n": 2}, cache_salt=["s"])
    del one.kv_hints
    give_each_its_room(one)
    assert one.cache_salt == ["s", "s"] and not hasattr(one, "kv_hints")


def test_a_room_for_each_sample_is_kept() -> None:
    """Routers give some endpoints a room for each sample, and others a room for each prompt."""
    one = raw(sampling_params={"n": 2}, bootstrap_room=[5, 6], bootstrap_host=["h", "h"])
    give_each_its_room(one)
    assert (one.bootstrap_room, one.bootstrap_host) == ([5, 6], ["h", "h"])


def test_one_prompt_is_left_as_it_is() -> None:
    one = raw(sampling_params={"n": 1}, bootstrap_room=[5])
    give_each_its_room(one)
    assert (one.text, one.bootstrap_room) == ("a", 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling_params": {"n": 0}}, "n must be a whole number from 1"),
        ({"sampling_params": {"n": 10**9}}, "n must be a whole number from 1"),
        ({"sampling_params": {"n": "2"}}, "n must be"),
        ({"sampling_params": [{"n": 1}, {"n": 2}], "text": ["a", "b"]}, "the same for all prompts"),
        ({"sampling_params": {"n": 700}, "text": ["a", "b"]}, "1024 samples at most"),
        ({"text": []}, "not empty"),
        ({"text": None}, "needs text or input_ids"),
        ({"text": ["a", "b"], "bootstrap_room": [5]}, "one room for each of 2 prompts"),
        ({"text": ["a", "b"], "top_logprobs_num": [1]}, "one entry for each of 2 prompts"),
        ({"text": ["a", "b"], "sampling_params": {"n": 2}, "image_data": ["A"]}, "one entry for each of 2 prompts"),
        ({"text": ["a"], "sampling_params": {"n": 2}, "image_data": ["A", "B"]}, "one entry for each of 1 prompts"),
        ({"bootstrap_room": "5"}, "whole number or a list"),
        ({"sampling_params": "x"}, "an object"),
    ],
)
def test_what_makes_no_batch_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        give_each_its_room(raw(**changes))


@settings(deadline=None)
@given(st.integers(FIRST_ROOM, LAST_ROOM), st.integers(1, 100))
def test_rooms_of_samples_are_rooms(room: int, sample: int) -> None:
    assert FIRST_ROOM <= room_of(room, sample) <= LAST_ROOM
    assert room_of(room, sample) == room_of(room, sample) != room


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*PER_PROMPT, *MEDIA, "text", "input_ids", "bootstrap_room", "sampling_params", "token_ids_logprob", "rid"]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
def test_no_value_ends_in_anything_but_a_refusal(changes: dict[str, Any]) -> None:
    """An accepted request has a room in the range and ids of the vocabulary."""
    request = raw(**changes)
    try:
        give_each_its_room(request)
        if isinstance(request.text, str):
            check_item(request, LIMITS)
    except RequestRefused:
        return
    rooms = request.bootstrap_room if isinstance(request.bootstrap_room, list) else [request.bootstrap_room]
    assert len(rooms) == (len(request.text or request.input_ids) if isinstance(request.text, list) else len(rooms))
