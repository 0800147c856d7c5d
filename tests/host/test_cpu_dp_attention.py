"""Rows of attention groups are put side by side and taken apart as SGLang's kernel does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_tpla.host.cpu.dp_attention import copy_rows, padded_length


def never(*args: Any) -> None:
    raise AssertionError("a GPU's kernel on a CPU")


@pytest.mark.parametrize(("first", "count", "kept"), [(0, 2, 2), (3, 2, 2), (1, 0, 0), (6, 4, 2), (2, 9, 4)])
def test_rows_there_and_back(first: int, count: int, kept: int) -> None:
    """Eight rows of all groups, four of this one; what does not fit is left out."""
    mine = torch.arange(1.0, 13.0).view(4, 3)
    together = torch.zeros(8, 3)
    offset, size = torch.tensor(first), torch.tensor(count)
    copy_rows(never, together, mine, 0, offset, size, False)
    expected = torch.zeros(8, 3)
    for row in range(kept):
        expected[first + row] = mine[row]
    assert torch.equal(together, expected)
    back = torch.zeros(4, 3)
    copy_rows(never, back, together, 0, offset, size, True)
    assert torch.equal(back[:kept], mine[:kept]) and not back[kept:].any()


def test_a_request_that_fills_up_a_batch() -> None:
    def unknown(backend: Any) -> int:
        raise NotImplementedError

    assert padded_length(unknown, None) == 1
    assert padded_length(lambda backend: 7, None) == 7
