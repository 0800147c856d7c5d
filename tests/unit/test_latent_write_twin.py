"""Cache writes: the twin is tested against complex numbers in float64, the kernel against the twin (interpreted)."""

import numpy as np
import pytest
import torch
from write_case import WriteCase, random_write

from sglang_tpla.attention.cache_write import reference
from sglang_tpla.attention.interface import AttentionInputError
from sglang_tpla.transfer.memory.projection import project_latent
from tests.triton_interpreter import interpret

SIZES = [(1, 512, 256, 64), (3, 40, 24, 6), (17, 33, 7, 2), (5, 96, None, 20), (0, 16, 8, 4)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-3}


def rotated(vectors: torch.Tensor, case: WriteCase, neox: bool) -> np.ndarray:
    """Rotate [tokens, .., rope] by each token's position in float64, as products of complex numbers."""
    v = vectors.double().numpy()
    if case.cos_sin is None:
        return v
    assert case.positions is not None
    half = v.shape[-1] // 2
    table = case.cos_sin.double().numpy()[case.positions.numpy()]
    turn = (table[:, :half] + 1j * table[:, half:]).reshape(len(v), *[1] * (v.ndim - 2), half)
    pairs = v[..., :half] + 1j * v[..., half:] if neox else v[..., 0::2] + 1j * v[..., 1::2]
    parts = ((pairs * turn).real, (pairs * turn).imag)
    return np.concatenate(parts, -1) if neox else np.stack(parts, -1).reshape(v.shape)


def in_complex_numbers(case: WriteCase, eps: float, neox: bool) -> np.ndarray:
    """Return the rows that should be written, in float64."""
    latent = case.latent.double().numpy()
    normed = latent / np.sqrt((latent**2).mean(1, keepdims=True) + eps) * case.weight.double().numpy()
    if case.latent.dtype == torch.bfloat16:
        normed = torch.from_numpy(normed).to(torch.bfloat16).double().numpy()
    kept = normed if case.z is None else normed @ case.z.double().numpy()
    return np.concatenate([kept, rotated(case.k_rope, case, neox)], 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotate", [None, "pairs", "halves"])
@pytest.mark.parametrize(("tokens", "d", "w", "rope"), SIZES)
def test_twin(tokens: int, d: int, w: int | None, rope: int, rotate: str | None, dtype: torch.dtype) -> None:
    case = random_write(tokens, d, w, rope, rotate is not None, dtype, seed=tokens + d, heads=3)
    assert case.q_rope is not None
    turned = rotated(case.q_rope, case, rotate == "halves")
    reference.write(case.write(1e-5, rotate))
    assert np.linalg.norm(case.q_rope.double().numpy() - turned) <= TOLERANCE[dtype] * np.linalg.norm(turned)
    right = in_complex_numbers(case, 1e-5, rotate == "halves")
    written = case.cache.squeeze(1)[case.slots].double().numpy()
    assert np.linalg.norm(written - right) <= TOLERANCE[dtype] * np.linalg.norm(right)
    others = torch.ones(len(case.cache), dtype=torch.bool)
    others[case.slots] = False
    assert case.cache[others].isnan().all()


def test_rows_are_those_of_a_transfer() -> None:
    """The rows have the same bits as a sender's, which norms and then calls `project_latent`."""
    case = random_write(9, 64, 24, 8, rotated=False, dtype=torch.bfloat16, seed=1)
    reference.write(case.write(1e-6))
    assert case.z is not None
    normed = torch.nn.functional.rms_norm(case.latent.float(), (64,), case.weight.float(), 1e-6).bfloat16()
    assert torch.equal(case.cache[case.slots, 0, :24], project_latent(normed, case.z))
    assert torch.equal(case.cache[case.slots, 0, 24:], case.k_rope)


INTERPRETED = """
import sys, torch
from write_case import random_write
from sglang_tpla.attention.cache_write import plain, reference
for tokens in (1, 3, 19):
    for d, w, rope in ((40, 24, 6), (130, 33, 2), (24, None, 4)):
        for rotate in (None, "pairs", "halves"):
            heads = {24: 5, 33: 0, None: 17}[w]
            cases = [
                random_write(tokens, d, w, rope, rotate is not None, torch.float32, 5, heads=heads) for _ in range(2)
            ]
            reference.write(cases[0].write(1e-6, rotate))
            plain.launch(cases[1].write(1e-6, rotate))
            a, b = (torch.nan_to_num(case.cache, nan=-7.0) for case in cases)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (tokens, d, w, rope, rotate)
            if heads:
                queries = [case.q_rope for case in cases]
                assert torch.allclose(*queries, rtol=1e-5, atol=1e-6), (tokens, heads, rope, rotate)
"""


def test_kernel_in_tritons_interpreter() -> None:
    """The kernel's code runs at odd sizes without a GPU."""
    pytest.importorskip("triton")
    interpret(INTERPRETED)


def test_what_does_not_fit_is_refused() -> None:
    case = random_write(4, 32, 16, 8, rotated=True, dtype=torch.bfloat16, seed=2, heads=3)
    for name, value, said in (
        ("latent", case.latent[:, :31], "weight must be"),
        ("latent", case.latent[0], "latent must be"),
        ("k_rope", case.k_rope[:3], "k_rope must be"),
        ("q_rope", case.latent, "q_rope must be"),
        ("weight", case.weight.float(), "weight must be"),
        ("weight", None, "weight must be given"),
        ("z", case.z.bfloat16() if case.z is not None else None, "z must be"),
        ("z", None, "cache must be"),
        ("cos_sin", None, "come together"),
        ("positions", torch.zeros(4), "positions must be"),
        ("slots", case.slots[:2], "slots must be"),
        ("cache", case.cache.float(), "latent must be"),
        ("latent", case.latent.T.contiguous().T, "contiguous rows"),
    ):
        with pytest.raises(AttentionInputError, match=said):
            case.write(1e-6, **{name: value})
