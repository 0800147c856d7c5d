"""Patterns and grammars that would hold up a server are refused by their form; ordinary ones are accepted."""

import json
from typing import Any

import pytest

from sglang_tpla.host.requests.fields import RequestRefused
from sglang_tpla.host.requests.patterns import check_grammar, check_stops

VOCAB = 4096
ORDINARY = [
    r"\d+\.\d+", r"(\d{1,3}\.){3}\d{1,3}", "(foo|bar)+", r"(\w+,)*\w+", "[^,]+(,[^,]+)*", r'"([^"\\]|\\.)*"',
    "(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", r"\s*\w+\s*=", "Question:.*Answer:.*", r"<a[^>]*>[^<]*</a>\s*<b[^>]*>[^<]*</b>",
    "(ab*c)*", "[a-z]{1,2000}", "(?P<q>['\"]).*(?P=q)",
]  # fmt: skip
# Python's search of each in a text of some thirty letters takes longer than a request lives.
BACKTRACKS = ["(a+)+$", "(a|aa)+b", "(.|a)*b", "(a?){50}b", r"(\w+\s?)*b", "((a{0,9}){0,9}){0,9}b", "(?:x|y|xy)*z",
              "(?i)(aA*)*b"]  # fmt: skip
# xgrammar takes seconds or minutes to mask the first token of each of these.
SLOW_GRAMMARS = ["([a-z]{1,20}){1,50}", "([a-z]{0,1}){1,300}", r"([a-z]{2,20},?){1,50}"]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns(pattern: str) -> None:
    check_stops({"stop_regex": [pattern]})
    check_grammar({"regex": pattern, "json_schema": json.dumps({"type": "string", "pattern": pattern})}, VOCAB)


@pytest.mark.parametrize("pattern", BACKTRACKS)
def test_what_backtracks_without_end(pattern: str) -> None:
    with pytest.raises(RequestRefused, match=r"stop_regex: .* could hold up the server"):
        check_stops({"stop_regex": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        ".*.*.*z",
        r"\w*[a-z]*(?:x|[^,]*)z",
        "(.*a)(.*b)(.*c)",
        ".{0,99}.{0,99}.{0,99}z",
        ".*a" * 8,
        "a*b*a*b*a*c",
        "[a-m]*[n-z]*" * 85,
        "(?:x*|.*)(?:y*|.*)(?:.*|z)q",
    ],
)
def test_repetitions_in_a_row_of_the_same_characters(pattern: str) -> None:
    with pytest.raises(RequestRefused, match=r"stop_regex: .* in a row that match the same characters"):
        check_stops({"stop_regex": pattern})


def test_a_long_row_is_seen_at_once() -> None:
    """The check is quick even for as many repetitions as fit, each of a different character."""
    row = "".join(chr(0x4E00 + i) + "*" for i in range(500))
    for _ in range(64):
        with pytest.raises(RequestRefused, match="in a row"):
            check_stops({"stop_regex": row})


def test_stop_strings_of_great_length() -> None:
    """64 of 20,000 characters, each of which may begin at any end of a streamed text, take 0.8 s for every token."""
    check_stops({"stop": ["a" * 64] * 64})
    check_stops({"stop": "a" * 4096})
    for stop in (["a" * 65] * 64, "a" * 4097):
        with pytest.raises(RequestRefused, match=r"stop may have 4096 characters at most, in all; got 4\d+"):
            check_stops({"stop": stop})


@pytest.mark.parametrize("pattern", SLOW_GRAMMARS)
def test_counted_repetitions_of_counted_repetitions(pattern: str) -> None:
    for params in (
        {"regex": pattern},
        {"json_schema": json.dumps({"properties": {"a": {"type": "string", "pattern": pattern}}})},
        {"json_schema": json.dumps({"patternProperties": {pattern: {"type": "string"}}})},
    ):
        with pytest.raises(RequestRefused, match="could hold up the server"):
            check_grammar(params, VOCAB)


@pytest.mark.parametrize("before", ["(?<n>a)", r"\i", r"\u{61}", "[^]"])
def test_a_dialect_that_is_not_checked_repeats_no_group_by_counts(before: str) -> None:
    """xgrammar accepts all of these dialects."""
    for pattern in SLOW_GRAMMARS:
        with pytest.raises(RequestRefused, match=r"repeats a group by counts, .* and cannot be checked"):
            check_grammar({"regex": before + pattern}, VOCAB)
    check_grammar({"regex": before + "[a-z]{1,20}"}, VOCAB)


@pytest.mark.parametrize("schema", ["{", '{"type": "string"} x', '{"a": ' + "1" * 5000 + "}"])
def test_what_is_no_json_is_refused_though_the_compiler_may_read_it(schema: str) -> None:
    """xgrammar reads the second of these texts, and no check here could see its content."""
    for name in ("json_schema", "structural_tag"):
        with pytest.raises(RequestRefused, match=f"{name} is no JSON"):
            check_grammar({name: schema}, VOCAB)
    check_grammar({"json_schema": "$$ANY$$"}, VOCAB)


def test_objects_that_count_their_properties() -> None:
    """xgrammar needs unbounded memory for some hundred properties."""

    def schema(count: int, **bounds: int) -> dict[str, Any]:
        return {"type": "object", "properties": {f"a{i}": {} for i in range(count)}, **bounds}

    for large in (schema(101, minProperties=1), schema(101, maxProperties=3)):
        with pytest.raises(RequestRefused, match="beside 100 properties at most; got 101"):
            check_grammar({"json_schema": json.dumps(large)}, VOCAB)
    both = {"anyOf": [schema(60, minProperties=1), schema(60, maxProperties=3)]}
    with pytest.raises(RequestRefused, match="beside 100 properties at most; got 120"):
        check_grammar({"json_schema": json.dumps(both)}, VOCAB)
    for good in (schema(1000), schema(1000, minProperties=0), schema(100, minProperties=1, maxProperties=50)):
        check_grammar({"json_schema": json.dumps(good)}, VOCAB)


def check(params: dict[str, Any]) -> None:
    check_stops(params)
    check_grammar(params, VOCAB)


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"stop": ["a"] * 65}, "stop may hold 64 entries at most; got 65"),
        ({"stop_regex": "a" * 1025}, "1024 characters at most; got 1025"),
        ({"stop_regex": "a{1,99999999}"}, "count to 100000 at most; got '99999999'"),
        ({"regex": "a" * 65537}, "65536 characters at most; got 65537"),
        ({"ebnf": 'root ::= "a"{100001}'}, "count to 100000 at most; got '100001'"),
        ({"json_schema": '{"type": "string", "minLength": 1000000000}'}, "minLength may be 100000 at most"),
        ({"json_schema": nested(200)}, "nested 128 deep at most"),
        ({"regex": "a\0"}, r"regex may not hold the character \\u0000"),
        ({"json_schema": json.dumps({"properties": {"a\0": {}}})}, r"may not hold the character \\u0000"),
        ({"json_schema": json.dumps({"pattern": "a\0"})}, r"may not hold the character \\u0000"),
        ({"structural_tag": nested(5000)}, "nested 128 deep at most"),
    ],
)
def test_size(params: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        check(params)


def tag(**form: Any) -> dict[str, Any]:
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": form})}


@pytest.mark.parametrize(
    "params",
    [
        {"ebnf": "root ::= Token(4096)"},
        {"ebnf": "root ::= Token\n(5, 99999999)"},
        {"ebnf": "root ::= ExcludeToken(" + "9" * 5000 + ")"},
        {"ebnf": 'root ::= TokenTagDispatch((5, r), excludes=(99999999))\nr ::= "a"'},
        tag(type="token", token=4096),
        tag(type="token", token=99999999.0),
        tag(type="any_tokens", exclude_tokens=[5, 4096]),
        tag(type="token_dispatch", rules=[[99999999, {"type": "any_text"}]]),
        tag(type="sequence", elements=[{"type": "grammar", "grammar": "root ::= Token(4096)"}]),
    ],
)
def test_a_token_beyond_the_vocabulary(params: dict[str, Any]) -> None:
    """For each of these tokens, xgrammar reads past its table and ends the process."""
    with pytest.raises(RequestRefused, match=r"token ids must lie in 0\.\.\.4095; got"):
        check(params)


@pytest.mark.parametrize(
    "params",
    [
        {"ebnf": "root ::= Token(0, 4095)"},
        {"ebnf": 'root ::= "99999" [0-9]{5000}'},
        {"ebnf": 'root ::= "accessToken: 20240101"'},
        {"json_schema": '{"enum": [99999]}'},
        tag(type="token", token=4095),
        tag(type="json_schema", json_schema={"enum": [99999], "maxLength": 99999}),
    ],
)
def test_other_numbers_go(params: dict[str, Any]) -> None:
    check(params)


def test_the_largest_that_go() -> None:
    check_stops({"stop": ["a"] * 64, "stop_regex": "a" * 1024})
    check_grammar({"regex": "a{100000}", "ebnf": 'root ::= "a"{100000}', "json_schema": nested(100)}, VOCAB)


@pytest.mark.parametrize("params", [{"regex": "["}, {"regex": r"\p{L}+"}, {"stop_regex": 5}])
def test_what_cannot_be_read_is_left_to_those_who_compile_it(params: dict[str, Any]) -> None:
    check(params)
