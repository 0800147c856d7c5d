"""Folding the maps into the absorbed weights gives what applying them one after another gives."""

import pytest
import torch

from sglang_tpla.artifact.fold import fold_key_map, fold_value_map


@pytest.mark.parametrize(("heads", "nope", "d", "w", "v"), [(3, 5, 17, 7, 4), (1, 1, 2, 1, 1), (8, 32, 128, 80, 32)])
def test_scores_and_outputs(heads: int, nope: int, d: int, w: int, v: int) -> None:
    torch.manual_seed(heads)
    w_kc, w_vc = torch.randn(heads, nope, d), torch.randn(heads, d, v)
    a, b = torch.randn(w, d), torch.randn(w, d)
    q, z, p = torch.randn(heads, nope), torch.randn(9, w), torch.randn(heads, 9)

    scores = torch.einsum("hn,hnw,tw->ht", q, fold_key_map(w_kc, a), z)
    torch.testing.assert_close(scores, torch.einsum("hn,hnd,td->ht", q, w_kc, z @ a), rtol=1e-4, atol=1e-4)
    outputs = torch.einsum("ht,tw,hwv->hv", p, z, fold_value_map(w_vc, b))
    torch.testing.assert_close(outputs, torch.einsum("ht,td,hdv->hv", p, z @ b, w_vc), rtol=1e-4, atol=1e-4)


def test_scale_of_quantised_weights() -> None:
    w_kc = torch.randn(2, 3, 4)
    a = torch.eye(4)
    torch.testing.assert_close(fold_key_map(w_kc, a, 0.5), w_kc * 0.5)
    torch.testing.assert_close(fold_value_map(w_kc.transpose(1, 2), a, 0.5), w_kc.transpose(1, 2) * 0.5)
