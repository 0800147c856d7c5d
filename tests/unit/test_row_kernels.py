"""The kernels that make and place a GPU's chunks are compared with their twins in Triton's interpreter.

`test_transfer_chunks` and the transfers of ``wire/`` test the twins.
"""

import pytest

from tests.triton_interpreter import interpret

SCRIPT = """
import sys
import torch
from row_kernels_case import DEEPSEEK, SMALL, unseen, wrong_chunk
cases = [(case, 3) for case in SMALL] + [(case, 67) for case in (SMALL[1], SMALL[7])] + [(DEEPSEEK[3], 1)]
for (rows, projected), tokens in cases:
    if (wrong := wrong_chunk(rows, projected, tokens, torch.float32, "cpu", few=0.002)) is not None:
        sys.exit(wrong)
if (wrong := unseen(2, torch.float32, "cpu")) is not None:
    sys.exit(wrong)
"""


def test_kernels_do_as_their_twins_do() -> None:
    pytest.importorskip("triton")
    interpret(SCRIPT)
