"""Refuse patterns and grammars that would hold up a scheduler, and with it every other client.

Python searches ``stop_regex`` after each token, a grammar masks the vocabulary before each, and neither can be
interrupted. A repetition of a body that itself matches in several ways, ``(a+)+`` or ``([a-z]{1,20}){1,50}``, takes
longer than anyone waits; so do several repetitions of the same characters in a row, ``.*.*.*x``, and a grammar of great
length, depth or count. The check looks only at the form, so it may refuse a pattern that would happen to be quick.
Every check raises `RequestRefused`.
"""

import json
import math
import re
from collections.abc import Iterator
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from sglang_tpla.host.requests.fields import RequestRefused, shown

MAX_STOPS = 64  # strings or patterns; SGLang searches for each after every token
MAX_STOP_CHARACTERS = 4096  # of all strings: SGLang compares each end of a streamed text with each beginning of each
MAX_STOP_REGEX_CHARACTERS = 1024
MAX_GRAMMAR_CHARACTERS = 65536
MAX_GRAMMAR_DEPTH = 128
MAX_COUNT = 100_000  # largest number in {n}, minLength and the like
# Properties of all objects with minProperties or maxProperties: xgrammar takes 22 MB for 100 of one object, 0.6 GB for
# 200, and more memory than there is for 500.
MAX_COUNTED = 100
MAX_EFFORT = 100  # largest `effort` of one repetition
MAX_ROW = 2  # repetitions in a row that may divide one text; n of them try its length to the power of n + 1 ways
LONG = 64  # a repetition with so many lengths or more counts towards a row
MOST_KINDS = 16  # repetitions of one row; each is compared with all others
COUNTS = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")
COUNTED_GROUP = re.compile(r"\)\s*\{")
ANY_JSON = "$$ANY$$"  # SGLang's own name for any JSON
REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
UNBOUNDED = _constants.MAXREPEAT
CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
              "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}  # fmt: skip
TOKEN_MACRO = re.compile(r"(?<!\w)(Token|ExcludeToken|TokenTagDispatch)(?!\w)")
NUMBERS = re.compile(r"[0-9]+")
SCHEMAS = ("json_schema", "schema")  # keys of structural tags under which numbers are not tokens
JSON_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def check_stops(params: Any) -> None:
    """Check ``stop`` and ``stop_regex`` of a request's sampling parameters."""
    for name in ("stop", "stop_regex"):
        value = params.get(name)
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise RequestRefused(f"sampling_params.{name} may hold {MAX_STOPS} entries at most; got {len(value)}")
    value = params.get("stop")
    characters = sum(len(one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))
    if characters > MAX_STOP_CHARACTERS:
        raise RequestRefused(
            f"sampling_params.stop may have {MAX_STOP_CHARACTERS} characters at most, in all; got {characters}"
        )
    value = params.get("stop_regex")
    for pattern in value if isinstance(value, list) else [value]:
        if isinstance(pattern, str):
            check_pattern("stop_regex", pattern, MAX_STOP_REGEX_CHARACTERS, backtracks=True)


def check_grammar(params: Any, vocab: int) -> None:
    """Check the grammar of a request's sampling parameters, for a vocabulary of so many tokens."""
    for name in ("regex", "ebnf", "json_schema", "structural_tag"):
        value = params.get(name)
        if not isinstance(value, str):
            continue
        if len(value) > MAX_GRAMMAR_CHARACTERS:
            raise RequestRefused(
                f"sampling_params.{name} may have {MAX_GRAMMAR_CHARACTERS} characters at most; got {len(value)}"
            )
        if "\0" in value:
            raise nul(name)
        if name == "regex":
            check_pattern(name, value, MAX_GRAMMAR_CHARACTERS)
        elif name == "ebnf":
            check_ebnf(name, value, vocab)
        else:
            check_schema(name, value, vocab if name == "structural_tag" else 0)


def nul(name: str) -> RequestRefused:
    """Make the refusal of a NUL character, over which xgrammar ends the process."""
    return RequestRefused(f"sampling_params.{name} may not hold the character \\u0000")


def check_ebnf(name: str, text: str, vocab: int) -> None:
    """Check a grammar; in one that names tokens (``Token(5)``, ``TokenTagDispatch``) every number must be a token's."""
    check_counts(name, text)
    for number in NUMBERS.findall(text) if TOKEN_MACRO.search(text) else ():
        check_token(name, number, int(number) if len(number) < 20 else math.inf, vocab)


def check_token(name: str, said: str, token: float, vocab: int) -> None:
    """Check a token's number; xgrammar ends the process over one outside the vocabulary."""
    if token >= vocab:
        raise RequestRefused(
            f"sampling_params.{name}: token ids must lie in 0...{vocab - 1}; got {shown(said)} in a grammar of tokens"
        )


def check_schema(name: str, text: str, vocab: int = 0) -> None:
    """Check a JSON schema, or an object with several: a structural tag, if there is a ``vocab`` for its tokens.

    The grammar's compiler accepts more than Python does, such as text after the schema, so any text that Python cannot
    read is refused.
    """
    if text == ANY_JSON:
        return
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise RequestRefused(f"sampling_params.{name} is no JSON: {error}; got {shown(text)}") from error
    except RecursionError:
        parsed = None
    counted = 0
    for depth, key, value, in_schema in _entries(parsed):
        counted += _counted(value)
        if counted > MAX_COUNTED:
            raise RequestRefused(
                f"sampling_params.{name}: minProperties and maxProperties may stand beside {MAX_COUNTED} properties at "
                f"most; got {counted}: leave them out, or name what is required"
            )
        if depth > MAX_GRAMMAR_DEPTH or parsed is None:
            raise RequestRefused(f"sampling_params.{name} may be nested {MAX_GRAMMAR_DEPTH} deep at most")
        if "\0" in key or (isinstance(value, str) and "\0" in value):
            raise nul(name)
        if key in JSON_COUNTS and isinstance(value, (int, float)) and value > MAX_COUNT:
            raise RequestRefused(f"sampling_params.{name}: {key} may be {MAX_COUNT} at most; got {shown(value)}")
        patterns = [value] if key == "pattern" else value if key == "patternProperties" else ()
        for pattern in patterns if isinstance(patterns, (list, dict)) else ():
            if isinstance(pattern, str):
                check_pattern(name, pattern, MAX_GRAMMAR_CHARACTERS)
        if vocab and not in_schema:
            if isinstance(value, (int, float)):
                check_token(name, str(value), value, vocab)
            elif key == "grammar" and isinstance(value, str):
                check_ebnf(name, value, vocab)


def _counted(value: Any) -> int:
    """Return the number of properties of a schema's object that bounds how many an answer has, and 0 for any other."""
    if not isinstance(value, dict) or not (value.get("minProperties") or "maxProperties" in value):
        return 0
    properties = value.get("properties")
    return len(properties) if isinstance(properties, dict) else 0


def _entries(root: Any) -> Iterator[tuple[int, str, Any, bool]]:
    """Yield each value of a JSON document, without recursion, with its depth, its key and whether a schema holds it."""
    stack: list[tuple[int, str, Any, bool]] = [(0, "", root, False)]
    while stack:
        depth, key, value, in_schema = stack.pop()
        yield depth, key, value, in_schema
        in_schema = in_schema or key in SCHEMAS
        if isinstance(value, dict):
            stack += [(depth + 1, name, one, in_schema) for name, one in value.items()]
        elif isinstance(value, list):
            stack += [(depth + 1, "", one, in_schema) for one in value]


def check_counts(name: str, text: str) -> None:
    """Check the counts of repetitions in a text."""
    for first, last in COUNTS.findall(text):
        for count in (first, last):
            if len(count) > 6 or int(count or 0) > MAX_COUNT:
                raise RequestRefused(
                    f"sampling_params.{name}: a repetition may count to {MAX_COUNT} at most; got {shown(count)}"
                )


def check_pattern(name: str, pattern: str, most: int, backtracks: bool = False) -> None:
    if len(pattern) > most:
        raise RequestRefused(f"sampling_params.{name} may have {most} characters at most; got {len(pattern)}")
    check_counts(name, pattern)
    try:
        parsed = _parser.parse(pattern)
        found = effort(parsed, backtracks)
        if backtracks and longest_row(parsed) > MAX_ROW:
            raise RequestRefused(
                f"sampling_params.{name}: {shown(pattern)} has more than {MAX_ROW} repetitions in a row that match "
                "the same characters, such as .*a.*b.*, which could hold up the server; leave some out, or put a "
                "character between them that the one before does not match, such as [^a]*a"
            )
    except (re.error, OverflowError) as error:
        # The pattern's compiler reports the mistake, or knows the dialect, which may repeat groups by counts as well.
        if not backtracks and COUNTED_GROUP.search(pattern):
            raise RequestRefused(
                f"sampling_params.{name}: {shown(pattern)} repeats a group by counts, which could hold up the server, "
                f"and cannot be checked ({error}): write it as Python's re reads it"
            ) from error
        return
    except RecursionError:
        found = math.inf
    if found > MAX_EFFORT:
        raise RequestRefused(
            f"sampling_params.{name}: {shown(pattern)} repeats what may itself match in several ways, such as (a+)+ or "
            "([a-z]{1,20}){1,50}, which could hold up the server; begin or end what is repeated with a character that "
            "the rest of it does not match"
        )


def effort(items: Any, backtracks: bool) -> float:
    """Return the highest cost of the repetitions of a parsed pattern.

    Args:
        backtracks: true for Python's ``re``, which takes w to the power of n steps for w ways of a body and n
            repetitions. A grammar follows all ways at once in w times n steps; unbounded bodies and repetitions cost
            nothing there.

    >>> effort(_parser.parse(r"[a-z]+@[a-z]{2,20}"), True), effort(_parser.parse("(a+)+"), True)
    (1.0, inf)
    """
    found = 1.0
    for op, value in items:
        if op in REPEATS:
            _, most, body = value
            inside = 1.0 if delimited(body) else choices(body, backtracks)
            if inside > 1 and most > 1 and (backtracks or most is not UNBOUNDED):
                cost = inside * most if not backtracks else 2.0 ** min(math.log2(inside) * most, 1000)
                found = max(found, math.inf if most is UNBOUNDED else cost)
        found = max([found, *(effort(part, backtracks) for part in parts(op, value))])
    return found


def longest_row(items: Any) -> int:
    r"""Return the length of the longest row of long repetitions that may divide one text among them.

    A character that no repetition before it matches ends a row, and so does a repetition of such characters that
    matches at least one. Where it may match none, as in ``a*b*a*``, the repetitions before and after it divide a text.

    >>> longest_row(_parser.parse(".*a.*b.*")), longest_row(_parser.parse(r"\s*\w+\s*=[^;]*;.*"))
    (3, 1)
    """
    longest = 0
    row: list[tuple[Any, int]] = []  # each repetition, and the number up to it that may divide its text
    stack = [iter(items)]
    while stack and longest <= MAX_ROW:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
            continue
        op, value = item
        if op is _constants.SUBPATTERN:
            stack.append(iter(value[3]))
            continue
        repeats = op in REPEATS and value[1] - value[0] >= LONG
        inside = max(map(longest_row, parts(op, value)), default=0)
        longest = max(longest, inside)
        body = value[2] if repeats else [item]
        count = 1 if repeats else inside if op is _constants.BRANCH else 0
        if count == 0 and op not in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN):
            continue
        before = [shared for other, shared in row if overlap(other, body)]
        if not before and not (repeats and value[0] == 0) and op is not _constants.BRANCH:
            row = []
        if count:
            row.append((body, count + max(before, default=0)))
            longest = max(longest, row[-1][1] if len(row) <= MOST_KINDS else MAX_ROW + 1)
    return longest


def overlap(first: Any, second: Any) -> bool:
    """Return whether both bodies may match one character; if so, a character at an end of their ranges is one."""
    tried = {*map(ord, "a0_ -\n"), *edges(first), *edges(second)}
    return any(takes(first, c) and takes(second, c) for c in tried)


def edges(items: Any) -> Iterator[int]:
    """Yield the characters and the ends of ranges that a parsed pattern names."""
    for op, value in items:
        if op in (_constants.LITERAL, _constants.NOT_LITERAL):
            yield value
        elif op is _constants.RANGE:
            yield from value
        elif op is _constants.IN:
            yield from edges(value)
        for part in parts(op, value):
            yield from edges(part)


def choices(items: Any, backtracks: bool) -> float:
    """Return the number of lengths or forms in which the body of a repetition can match."""
    found = 1.0
    for op, value in items:
        if op in REPEATS and (backtracks or value[1] is not UNBOUNDED):
            found *= math.inf if value[1] is UNBOUNDED else value[1] - value[0] + 1
        elif op is _constants.BRANCH and backtracks:
            found *= 1 if told_apart(value[1]) else len(value[1])
        for part in parts(op, value):
            found *= choices(part, backtracks)
    return found


def told_apart(branches: Any) -> bool:
    """Return whether the first character decides the alternative: each has its own, and one may begin with a set."""
    first = [branch[0] if len(branch) else (_constants.ANY, None) for branch in branches]
    plain: set[int] = {value for op, value in first if op is _constants.LITERAL}  # type: ignore[misc]
    others = [item for item in first if item[0] is not _constants.LITERAL]
    distinct = len(plain) + len(others) == len(first) and len(others) <= 1
    return (
        distinct
        and all(op in (_constants.IN, _constants.NOT_LITERAL) for op, _ in others)
        and not any(takes(others, character) for character in plain)
    )


def delimited(items: Any) -> bool:
    """Return whether a body begins or ends with a character that nothing else in it matches: a text fits in one way."""
    while len(items) == 1 and items[0][0] is _constants.SUBPATTERN:
        items = items[0][1][3]
    ends = [(items[0], items[1:]), (items[-1], items[:-1])] if len(items) else []
    return any(op is _constants.LITERAL and not takes(rest, value) for (op, value), rest in ends)


def takes(items: Any, character: int) -> bool:
    """Return whether an item of a parsed pattern may match a character in either case; a flag may ignore case."""
    spellings = {character, *map(ord, chr(character).lower() + chr(character).upper())}
    for op, value in items:
        if op is _constants.ANY or (op is _constants.LITERAL and value in spellings):
            return True
        if op is _constants.NOT_LITERAL and spellings != {value}:
            return True
        if op is _constants.IN:
            negated = value[0][0] is _constants.NEGATE
            if any(any(_holds(kind, one, c) for kind, one in value) != negated for c in spellings):
                return True
        if op is _constants.GROUPREF or any(takes(part, character) for part in parts(op, value)):
            return True
    return False


def _holds(op: Any, value: Any, character: int) -> bool:
    """Return whether one entry of a set matches a character."""
    if op is _constants.RANGE:
        return bool(value[0] <= character <= value[1])
    if op is _constants.CATEGORY:
        return re.fullmatch(CATEGORIES[str(value)], chr(character)) is not None
    return bool(op is _constants.LITERAL and value == character)


def parts(op: Any, value: Any) -> list[Any]:
    """Return the patterns inside an item of a parsed pattern."""
    if op is _constants.BRANCH:
        return list(value[1])
    if op is _constants.SUBPATTERN:
        return [value[3]]
    if op is _constants.ATOMIC_GROUP:
        return [value]
    if op in (*REPEATS, _constants.POSSESSIVE_REPEAT):
        return [value[2]]
    if op in (_constants.ASSERT, _constants.ASSERT_NOT):
        return [value[1]]
    if op is _constants.GROUPREF_EXISTS:
        return [part for part in value[1:] if part is not None]
    return []
