"""How far a result may lie from float64. The only place where these numbers stand; no test overrides them.

    max |ours - exact|  <=  factor * max |composed - exact|  +  FLOOR * eps(dtype) * M

`exact` is reference.py in float64, `composed` the same code in the dtype of the tensors: what plain PyTorch's
own rounding costs. M is the largest sum of |terms| of that output, so that a gradient whose terms cancel has
a floor. In float64 `composed` is `exact`, whose own rounding then stands for it: eps times the largest
score's terms, times M.
"""

from typing import NamedTuple

import torch

OUT_FACTOR = 2
GRADIENT_FACTOR = 3
FLOOR = 4
LSE_HALF = 1e-3                     # absolute
LSE_FLOAT32 = 2e-5                  # relative to 1 + |lse|
LSE_FLOAT64 = 1e-13                 # the same
LSE_SCORE_ULPS = 32                 # of float32 (float64), relative to the terms of the score


class Magnitudes(NamedTuple):
    """Sums of |terms|, element by element: the formulas of attention and its gradients with every sign
    positive."""

    out: torch.Tensor
    lse: torch.Tensor               # of the row's largest score
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dbias: torch.Tensor             # (b, h, sq, sk), of each score


def magnitudes(q, k, v, dout, dlse, p, z, scale, bias):
    """Of one batch of dense sequences in float64; p, z and bias (>= 0) are (b, h, sq, sk)."""
    b, sk, hk, _ = k.shape
    q, k, v, dout, dlse = (x.abs() for x in (q, k, v, dout, dlse))
    k, v = (x.repeat_interleave(q.shape[2] // hk, dim=2) for x in (k, v))
    pz = p * z
    out = torch.einsum("bhij,bjhc->bihc", pz, v)
    delta = torch.einsum("bihc,bihc->bhi", dout, out) + dlse
    dbias = p * (z * torch.einsum("bihc,bjhc->bhij", dout, v) + delta[..., None])
    ds = abs(scale) * dbias
    scores = abs(scale) * torch.einsum("bihc,bjhc->bhij", q, k) + bias
    return Magnitudes(
        out=out,
        lse=scores.masked_fill(p == 0, 0).amax(-1) if sk else torch.zeros_like(dlse),
        dq=torch.einsum("bhij,bjhc->bihc", ds, k),
        dk=torch.einsum("bhij,bihc->bjhc", ds, q).unflatten(2, (hk, -1)).sum(3),
        dv=torch.einsum("bhij,bihc->bjhc", pz, dout).unflatten(2, (hk, -1)).sum(3),
        dbias=dbias)


def assert_close(name, ours, exact, composed, magnitudes, dtype=None):
    """The bound of this file's head; `ours` and `composed` have the dtype of the call, `exact` is float64.
    The gradient of a bias has the bias's own dtype: `dtype` is then the call's, and the coarser one counts."""
    assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == composed.dtype
    if exact.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    assert torch.isfinite(composed).all(), f"{name}: the composition overflows, so this test proves nothing"
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(dtype or ours.dtype).eps)
    m = getattr(magnitudes, name).max().item()
    if eps == torch.finfo(torch.float64).eps:
        composed_error = eps * magnitudes.lse.max().item() * m if magnitudes.lse.numel() else 0
    else:
        composed_error = (composed.double() - exact).abs().max().item()
    error = (ours.double() - exact).abs().max().item()
    allowed = (OUT_FACTOR if name == "out" else GRADIENT_FACTOR) * composed_error + FLOOR * eps * m
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_lse_close(ours, exact, magnitude, dtype):
    assert ours.shape == exact.shape
    assert torch.equal(ours.isneginf(), exact.isneginf()), "lse must be -inf exactly where no key is visible"
    seen = ~exact.isneginf()
    ours, exact, magnitude = ours.double()[seen], exact[seen], magnitude[seen]
    eps = torch.finfo(torch.float64).eps if dtype == torch.float64 else 2.0 ** -24
    allowed = LSE_SCORE_ULPS * eps * magnitude
    if dtype == torch.float64:
        allowed += LSE_FLOAT64 * (1 + exact.abs())
    elif dtype == torch.float32:
        allowed += LSE_FLOAT32 * (1 + exact.abs())
    else:
        allowed += LSE_HALF
    error = (ours - exact).abs()
    assert (error <= allowed).all(), f"lse: error {error.max():.3g}, allowed {allowed[error.argmax()]:.3g}"
