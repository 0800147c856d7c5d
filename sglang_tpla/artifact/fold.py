"""Fold the key and value maps of a slice into the absorbed weights, so that they cost nothing at run time.

w_kc [h, qk_nope, d] A^T [d, w] -> [h, qk_nope, w]        B [w, d] w_vc [h, d, v] -> [h, w, v]
"""

from __future__ import annotations

import torch


def fold_key_map(w_kc: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Absorbed key weights of a slice, float32 ``[h, qk_nope, w]``, laid out as SGLang lays out ``w_kc``.

    Args:
        w_kc: ``[h, qk_nope, d]``, any dtype.
        a: A_i, ``[w, d]`` float32.
        scale: what a quantised ``w_kc`` has to be multiplied with.
    """
    folded = (w_kc.to(torch.float32) * scale) @ a.to(w_kc.device).T
    return folded.transpose(1, 2).contiguous().transpose(1, 2)


def fold_value_map(w_vc: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Absorbed value weights of a slice, float32 ``[h, w, v]``, laid out as SGLang lays out ``w_vc``.

    Args:
        w_vc: ``[h, d, v]``, any dtype.
        b: B_i, ``[w, d]`` float32.
        scale: what a quantised ``w_vc`` has to be multiplied with.
    """
    folded = b.to(w_vc.device) @ (w_vc.to(torch.float32) * scale)
    return folded.transpose(1, 2).contiguous().transpose(1, 2)
