"""Fold the key and value maps of a slice into the absorbed weights, so that the maps cost nothing at run time.

w_kc [h, qk_nope, d] A^T [d, w] -> [h, qk_nope, w]        B [w, d] w_vc [h, d, v] -> [h, w, v]

Maps are float32. Weights have any dtype, and a ``scale`` if they are quantised. Results are float32, in the layout of
SGLang's ``w_kc`` and ``w_vc``.
"""

import torch


def fold_key_map(w_kc: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the absorbed key weights of a slice."""
    folded = (w_kc.to(torch.float32) * scale) @ a.to(w_kc.device).T
    return folded.transpose(1, 2).contiguous().transpose(1, 2)


def fold_value_map(w_vc: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the absorbed value weights of a slice."""
    folded = b.to(w_vc.device) @ (w_vc.to(torch.float32) * scale)
    return folded.transpose(1, 2).contiguous().transpose(1, 2)
