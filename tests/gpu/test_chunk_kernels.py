"""The kernels that make and place chunks against their twins, at DeepSeek's sizes and at odd ones."""

import pytest
import torch
from row_kernels_case import DEEPSEEK, SMALL, unseen, wrong_chunk

from sglang_tpla.cache_rows.layer_rows import LayerRows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "projected"), [*SMALL, *DEEPSEEK], ids=str)
def test_kernels_do_as_their_twins_do(rows: list[LayerRows], projected: bool, dtype: torch.dtype) -> None:
    for tokens in (1, 64, 65, 1000):
        assert wrong_chunk(rows, projected, tokens, dtype, "cuda", few=0.005) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_seen(dtype: torch.dtype) -> None:
    for tokens in (1, 70):
        assert unseen(tokens, dtype, "cuda") is None
