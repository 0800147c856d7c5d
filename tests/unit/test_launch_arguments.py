"""Flags as tokens: how they are grouped, spelled, layered and read from YAML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_tpla.config import ConfigError
from sglang_tpla.launch import cpu
from sglang_tpla.launch.flags import (
    canonical,
    for_section,
    from_mapping,
    integer,
    layered,
    outside_sections,
    split_tokens,
    to_tokens,
    value_of,
)

NAMES = st.from_regex(r"--[a-z][a-z0-9-]{0,12}", fullmatch=True)
VALUES = st.from_regex(r"[a-z0-9{\"][ -~]{0,12}|-[0-9]{1,3}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, st.lists(VALUES, max_size=3)), max_size=6))
def test_tokens_survive_grouping(flags: list[tuple[str, list[str]]]) -> None:
    tokens = [token for flag, values in flags for token in (flag, *values)]
    assert to_tokens(split_tokens(tokens)) == tokens


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--tp", "tp-size"),
        ("--tensor_parallel_size", "tp-size"),
        ("--tp-size=4", "tp-size"),
        ("--model", "model-path"),
        ("-tp", "tp-size"),
        ("--max-total-tokens", "max-total-tokens"),
    ],
)
def test_one_spelling(flag: str, name: str) -> None:
    assert canonical(flag) == name


def test_values_are_read_from_either_form() -> None:
    arguments = split_tokens(["--port=1", "--flag", "--offset", "-7", "--stop", "a", "--both", "a", "b"])
    assert [value_of(arguments, name) for name in ("port", "flag", "offset", "stop")] == ["1", None, "-7", "a"]
    with pytest.raises(ConfigError, match="--both takes one value; got 2"):
        value_of(arguments, "both")
    assert integer(arguments, "offset", 0) == -7
    assert integer(arguments, "absent", 3) == 3
    with pytest.raises(ConfigError, match="--stop must be a whole number; got 'a'"):
        integer(arguments, "stop", 0)


def test_a_value_without_a_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 'prefill' first"):
        split_tokens(["prefill", "--role"])


def test_a_stronger_layer_replaces_whole_flags() -> None:
    below = split_tokens(["--tp", "2", "--prefill", "a", "--prefill", "b", "--trust-remote-code"])
    above = split_tokens(["--tp-size=4", "--prefill", "c"])
    assert to_tokens(layered(below, above)) == ["--trust-remote-code", "--tp-size=4", "--prefill", "c"]


def test_section_prefixes() -> None:
    arguments = split_tokens(["--decode.tp", "2", "--port", "1", "--prefill.port=3", "--json-model.x", "y"])
    assert to_tokens(for_section(arguments, "decode")) == ["--tp", "2"]
    assert to_tokens(for_section(arguments, "prefill")) == ["--port=3"]
    assert [argument.name for argument in outside_sections(arguments)] == ["port", "json-model.x"]


def test_yaml_values() -> None:
    values = {
        "trust_remote_code": True,
        "enable-metrics": False,
        "api-key": None,
        "cuda-graph-bs": [1, 2],
        "json-model-override-args": {"a": 1},
        "prefill": [["http://a:1", 8998], "http://b:1"],
    }
    assert to_tokens(from_mapping(values, "file")) == [
        "--trust-remote-code",
        *("--cuda-graph-bs", "1", "2"),
        *("--json-model-override-args", '{"a": 1}'),
        *("--prefill", "http://a:1", "8998"),
        *("--prefill", "http://b:1"),
    ]


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([0, 1], 4, [[0], [1], [0], [1]]),
        ([2, 3, 5, 7, 11], 2, [[2, 3], [5, 7]]),
        ([6], 2, [[6], [6]]),
    ],
)
def test_cores_are_dealt(cores: list[int], ranks: int, expected: list[list[int]]) -> None:
    assert cpu.cores_per_rank(cores, ranks) == expected


def test_cpu_environment_keeps_the_users_threads() -> None:
    chosen = cpu.environment(2, {"OMP_NUM_THREADS": "6", "SGLANG_PLATFORM": "other"})
    assert "OMP_NUM_THREADS" not in chosen
    assert chosen["SGLANG_PLATFORM"] == "sglang_tpla_cpu"
    assert chosen["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
