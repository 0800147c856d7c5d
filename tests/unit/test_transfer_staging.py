"""The memory of staging."""

import numpy as np

from sglang_tpla.transfer.memory.staging import Staging


def test_memory_is_touched_only_where_that_much_is_in_use() -> None:
    touched: list[int] = []
    staging = Staging(np.empty(8 * 64, dtype=np.uint8), 64, lambda offset, _: touched.append(offset))
    for _ in range(20):
        two = [staging.take(), staging.take()]
        for slot in two:
            assert slot is not None
            slot.pending = 0
        assert staging.reap() and staging.used_bytes == 0
    assert len(touched) == 2
