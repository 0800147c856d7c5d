"""Requests with odd values, drawn by hypothesis: every field that crosses to decode or that SGLang hands on unread."""

from typing import Any

from hypothesis import strategies as st

HUGE = st.sampled_from([2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1])
NUMBERS = st.sampled_from([-2, -1, 0, 1, 2, 1e-9, 0.5, 1.5, -0.0, 1e39, -1e39, 1e308]) | HUGE
WORDS = st.sampled_from(["", " ", "x", "-1", "0", "null", "\x00", "\ud83d\ude00", "../..", "a" * 5000, "[", "{}"])
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.lists(st.lists(SCALARS, max_size=2), max_size=2)
ANYTHING |= st.dictionaries(WORDS, SCALARS, max_size=2)

SAMPLING = (
    "min_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "n", "json_schema", "regex", "ebnf",
    "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
    "stream_interval", "logit_bias", "sampling_seed", "custom_params", "is_normalized", "stop_strs", "unknown",
    "max_new_tokens", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "beam_width", "watermark",
    "ebnf_full_assistant",
)  # fmt: skip
NATIVE = (
    "rid", "session_id", "text", "input_ids", "input_embeds", "image_data", "video_data", "audio_data", "mm_hashes",
    "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_sampling_mask",
    "return_text_in_logprobs", "return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64", "stream",
    "log_metrics", "return_hidden_states", "return_routed_experts", "routed_experts_start_len",
    "return_indexer_topk", "modalities", "session_params", "lora_path", "lora_id", "custom_logit_processor",
    "positional_embed_overrides", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size", "routed_dp_rank",
    "disagg_prefill_dp_rank", "routing_key", "conversation_id", "http_worker_ipc", "require_reasoning",
    "max_thinking_tokens", "priority", "extra_key", "no_logs", "custom_labels", "return_bytes", "return_entropy",
    "return_prompt_token_ids", "external_trace_header", "received_time", "need_wait_for_mm_inputs",
    "num_items_assigned", "mm_data_mooncake", "encoder_urls", "max_dynamic_patch", "images_config",
    "multi_item_delimiter_indices", "sampling_params", "background", "bootstrap_host", "bootstrap_port",
    "image_max_dynamic_patch", "min_dynamic_patch", "use_audio_in_video", "video_max_dynamic_patch",
    "mm_content_hashes", "video_config", "watermark", "sampling_logprobs_mode", "return_flat_raw_output_top_logprobs",
    "data_parallel_rank", "mm_processor_kwargs", "token_indices_to_pool", "cache_salt", "kv_hints",
    "return_spec_tokens_details",
)  # fmt: skip
OPENAI = (
    "prompt", "echo", "logprobs", "n", "best_of", "stop", "suffix", "seed", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stream", "stream_options", "user",
    "regex", "ebnf", "json_schema", "response_format", "stop_token_ids", "stop_regex", "min_tokens", "ignore_eos",
    "skip_special_tokens", "no_stop_trim", "lora_path", "session_params", "return_hidden_states", "bootstrap_room",
    "priority", "rid", "extra_key", "cache_salt", "custom_logit_processor", "messages", "tools", "tool_choice",
    "top_logprobs", "continue_final_message", "add_generation_prompt", "chat_template_kwargs", "reasoning_effort",
    "parallel_tool_calls", "separate_reasoning", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank",
    "bootstrap_host", "bootstrap_port", "max_tokens", "max_completion_tokens", "model", "input_ids", "session_id",
    "custom_labels", "custom_params", "images_config", "max_dynamic_patch", "min_dynamic_patch", "use_audio_in_video",
    "return_cached_tokens_details", "return_meta_info", "return_prompt_token_ids", "return_token_ids",
    "return_routed_experts", "routed_experts_start_len", "stream_reasoning", "task", "thinking",
    "return_input_ids_in_sglext", "return_output_ids_in_sglext", "return_spec_tokens_details", "return_sampling_mask",
    "sampling_logprobs_mode", "return_flat_raw_output_top_logprobs", "return_flat_raw_top_logprobs_b64", "watermark",
    "video_config", "mm_processor_kwargs",
)  # fmt: skip
# Nearly right values get further into a server than values of another type.
NEARLY: dict[str, list[Any]] = {
    "text": ["x = 1\n", ["x = 1\n", "y"], ["x", ""], ["x", None], [[]], "\x00"],
    "input_ids": [[1, 2], [[1, 2], [3]], [[1], []], [1, 4095], [1, 4096], [2**40], [-1], [[1], 2], [True], [[[1]]]],
    "prompt": ["x", ["x", "y"], [1, 2], [[1, 2], [3]], [5000], [[5000]], [], [[]], ["x", 1]],
    "bootstrap_room": [[7001, 7002], [7003, 7003], [[7004]], 2**63 - 2],
    "top_logprobs_num": [1, 128, 129, 4096, 4097, [1, 2]], "logprob_start_len": [0, 3, 4, 5, 100, -2, [0, 1]],
    "return_logprob": [True, [True, False], [True]], "token_ids_logprob": [[5], [4096], [[5]], [[5], [6]]],
    "logprobs": [1, 128, 129, True], "top_logprobs": [1, 20, 129], "echo": [True],
    "n": [2, 3, 1.0, 1025], "stream": [True],
    "logit_bias": [{"5": 100}, {"5": 1e300}, {"4096": 1}, {"x": 1}, {"5": "a"}],
    "stop_token_ids": [[5], [4096], [-1], 5, [[5]], [None]],
    "stop_regex": ["(", "a+", ["a", 5]], "stop": [["a", ""], [1]],
    "regex": ["[0-9]{2}", "[0-9", "a{99999}"], "ebnf": ['root ::= "a"', "root ::="], "min_new_tokens": [2, 5],
    "json_schema": ['{"type": "object"}', '{"type": "nothing"}', "{", '{"$ref": "#/nowhere"}'],
    "response_format": [{"type": "json_object"}, {"type": "x"}, {"type": "json_schema"}, {"type": "structural_tag"},
                        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}],
    "return_hidden_states": [True, "last", [True]], "return_routed_experts": [True], "return_indexer_topk": [True],
    "return_sampling_mask": [True], "return_flat_raw_top_logprobs": [True], "return_entropy": [True],
    "session_params": [{"id": "a"}, {"id": "a", "rid": "b", "offset": 1}], "lora_path": ["a", ["a", None]],
    "custom_logit_processor": ["{}", '{"callable": "80"}'], "routed_dp_rank": [0, 1, -1],
    "disagg_prefill_dp_rank": [0, 1, 7], "priority": [5], "max_thinking_tokens": [3], "stream_interval": [1, 0],
    "image_data": ["file:///etc/hostname", ["http://127.0.0.1:9/a.png"], {"url": "x"}],
    "custom_params": [{"a": {"b": [1]}}], "rid": ["same", ["a", "b"], "HEALTH_CHECK_1", "\0declined"],
    "messages": [[], [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": None}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "assistant", "content": "x"}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]],
    "tools": [[{"type": "function", "function": {"name": "f"}}], [{}], [{"type": "function", "function": {"name": 5}}]],
    "tool_choice": ["required", "auto", {"type": "function", "function": {"name": "g"}}],
    "chat_template_kwargs": [{"a": 1}, {"tokenize": False}], "stream_options": [{"include_usage": True}],
    "repetition_penalty": [1e-300, 1e-6, 2.0], "custom_labels": [{"a": "b"}, {"model_name": "x"}],
    "received_time": [float("nan"), float("inf"), 0.0], "token_indices_to_pool": [[0], [100000], [-1], [2**63]],
    "beam_width": [1, 2], "watermark": [{"enabled": True}, {"key": "a"}], "log_metrics": [False],
    "thinking": [True, {"type": "enabled"}], "return_spec_tokens_details": [True],
    "kv_hints": [{}, {"protocol_version": "1", "message_id": "a", "actions": [{}]}], "cache_salt": ["a"],
}  # fmt: skip
LENGTHS = [0, -1, 2, 1.5, "5", [], [2], {}, True, 2**31, 2**63, 2**64]
# Any other value of these fields would be served: a length takes its time, and a place may be another request's.
ONLY: dict[str, list[Any]] = {
    "max_new_tokens": LENGTHS, "max_tokens": LENGTHS, "max_completion_tokens": LENGTHS,
    "bootstrap_host": [None, 5, True, "", " ", "a/b", "http://x", "x:8998", "[::1", "x" * 300, "\x00", "2.2.2.2", [],
                       {}, [None], ["127.0.0.1"], ["127.0.0.1"] * 2],
    "bootstrap_port": ["x", "", 0, -1, 65536, 2**40, 2**64, 1.5, [], {}, [None], [0]],
}  # fmt: skip


def values(name: str) -> st.SearchStrategy[Any]:
    """Draw odd values for a field, half of them nearly right where some are known."""
    if name in ONLY:
        return st.sampled_from(ONLY[name])
    return st.sampled_from(NEARLY[name]) | ANYTHING if name in NEARLY else ANYTHING


def changes(names: tuple[str, ...], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Draw some of the fields, each with an odd value."""
    chosen = st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True)
    return chosen.flatmap(lambda found: st.fixed_dictionaries({name: values(name) for name in found}))


def native() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Draw bodies for /generate."""

    def body(fields: dict[str, Any], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": 3, "temperature": 0} | sampling
        base = {} if "input_ids" in fields or "input_embeds" in fields else {"text": "x = 1\n"}
        return "/generate", {**base, "sampling_params": params, **fields}

    nothing = st.just({})
    return st.one_of(
        st.builds(body, changes(NATIVE, 3), nothing),
        st.builds(body, nothing, changes(SAMPLING, 3)),
        st.builds(body, changes(NATIVE, 2), changes(SAMPLING, 2)),
    )


def openai() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Draw bodies for the two OpenAI endpoints."""
    completion = {"model": "m", "prompt": "x = 1\n", "max_tokens": 3, "temperature": 0}
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    return st.one_of(
        changes(OPENAI, 3).map(lambda fields: ("/v1/completions", completion | fields)),
        changes(OPENAI, 3).map(lambda fields: ("/v1/chat/completions", chat | fields)),
    )
