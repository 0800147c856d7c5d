"""The planner's choice between methods that cost the same, and over several loads."""

import math

import pytest

from sglang_tpla.plan.choice import Answer, Row, answer, overall
from sglang_tpla.plan.cost import Load, Method, Price
from tests.unit.test_plan import setting


def test_overall_is_least_behind() -> None:
    s = setting("--weights-dtype", "fp8")
    long = [answer(s, Load(16, 32768)), answer(s, Load(16, 32767))]
    short = answer(s, Load(1, 2048))
    assert overall([*long, short]) == long[0].recommended
    assert overall([short]) == short.recommended
    assert overall([]) is None


def tied(rows: list[tuple[Method, float, int]]) -> Answer:
    """Return an answer with methods, their times and bytes, which recommends the first."""
    priced = [
        Row(
            method, price=Price({"attention": time_s}, 0.0), cache_bytes_per_token_and_rank=size, fits=time_s < math.inf
        )
        for method, time_s, size in rows
    ]
    return Answer(Load(1, 1000), tuple(priced), rows[0][0], rows[0][0], ())


SLICED, SKETCHED, EIGHT_BIT, PLAIN, DCP = (
    Method("tpla", 8, groups=2), Method("tpla", 8, groups=2, rows="sketched"), Method("tpla", 8, rows="sketched"),
    Method("tp", 8), Method("dcp", 8),
)  # fmt: skip


@pytest.mark.parametrize("faster_s", [1.0, math.inf])
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({SLICED: 1, SKETCHED: 2, EIGHT_BIT: 3, PLAIN: 5}, PLAIN),
        ({SLICED: 1, SKETCHED: 2, EIGHT_BIT: 3}, EIGHT_BIT),
        ({SLICED: 1, SKETCHED: 2}, SKETCHED),
        ({PLAIN: 5, DCP: 4}, DCP),
        ({DCP: 5, PLAIN: 4}, PLAIN),
    ],
)
def test_between_equals_the_closer_one_then_the_smaller(
    sizes: dict[Method, int], expected: Method, faster_s: float
) -> None:
    """Each method is best at one load, and equally far behind (or does not fit) at the others'."""
    loads = [[(first, 0.5), *((m, faster_s) for m in sizes if m is not first)] for first in sizes]
    for turn in range(len(loads)):
        answers = [tied([(m, time_s, sizes[m]) for m, time_s in load]) for load in loads[turn:] + loads[:turn]]
        assert overall(answers) == expected


def test_overall_fits_as_many_loads_as_one_can() -> None:
    """Plain TP does not fit the long loads, and of the others each is far behind at one of these."""
    long = (
        [(SLICED, 1.0, 1), (PLAIN, math.inf, 5), (DCP, 9.0, 1)],
        [(SLICED, 9.0, 1), (PLAIN, math.inf, 5), (DCP, 1.0, 1)],
    )
    short = [(PLAIN, 1.0, 5), (SLICED, math.inf, 1), (DCP, 2.0, 1)]
    assert overall([tied(short), *(tied(sorted(rows, key=lambda r: r[1])) for rows in long)]) == DCP
    assert overall([tied(short), *(tied(rows[:2]) for rows in (long[0], long[0]))]) == SLICED


def test_the_fastest_of_equal_ones_is_the_closest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    s = setting("--weights-dtype", "fp8")
    monkeypatch.setattr("sglang_tpla.plan.choice.price", lambda *given: Price({"attention": 1.0}, 0.0))
    found = answer(s, Load(4, 4096))
    exact = [r for r in found.rows if r.method.exact]
    assert found.fastest == min(exact, key=lambda r: r.cache_bytes_per_token_and_rank).method == found.recommended
