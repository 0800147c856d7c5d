"""Fold the key and value maps of a slice into the absorbed weights, so that the maps cost nothing at run time.

w_kc [h, qk_nope, d] A^T [d, w] -> [h, qk_nope, w]        B [w, d] w_vc [h, d, v] -> [h, w, v]
"""

import torch


def fold_key_map(w_kc: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the absorbed key weights of a slice, float32 ``[h, qk_nope, w]``, in the layout of SGLang's ``w_kc``.

    Args:
        w_kc: ``[h, qk_nope, d]``, any dtype.
        a: A_i, ``[w, d]`` float32.
        scale: factor of a quantised ``w_kc``.
    """
    folded = (w_kc.to(torch.float32) * scale) @ a.to(w_kc.device).T
    return folded.transpose(1, 2).contiguous().transpose(1, 2)


def fold_value_map(w_vc: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the absorbed value weights of a slice, float32 ``[h, w, v]``, in the layout of SGLang's ``w_vc``.

    Args:
        w_vc: ``[h, d, v]``, any dtype.
        b: B_i, ``[w, d]`` float32.
        scale: factor of a quantised ``w_vc``.
    """
    folded = b.to(w_vc.device) @ (w_vc.to(torch.float32) * scale)
    return folded.transpose(1, 2).contiguous().transpose(1, 2)
