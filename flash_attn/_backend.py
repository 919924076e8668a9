"""Turns tensors into pointers and strides: the only caller of the extension.

Nothing is validated here: the public functions check types and shapes, the C side checks values. A call must
cost little, so its values go by position, in the order of _C.FIELDS, and tensors are asked once. Every output
and all scratch is allocated here, by PyTorch, and left uninitialised: the kernels write every row.
"""

from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor, empty, empty_like, get_num_threads

from . import _C

ArgumentTypeError = _C.ArgumentTypeError
ArgumentValueError = _C.ArgumentValueError
UnsupportedError = _C.UnsupportedError

DTYPES = {torch.float32: _C.FLOAT32, torch.float16: _C.FLOAT16, torch.bfloat16: _C.BFLOAT16,
          torch.float64: _C.FLOAT64}


class Operands(NamedTuple):
    """The tensors of a call beside q, k and v, saved for backward; of them only the bias takes a gradient.
    Bias and mask have four dimensions, each as large as the scores' or 1."""

    cu_seqlens_q: Optional[Tensor]
    cu_seqlens_k: Optional[Tensor]
    seqused_k: Optional[Tensor]
    alibi_slopes: Optional[Tensor]
    rng_state: Optional[Tensor]
    bias: Optional[Tensor]
    mask: Optional[Tensor]


class Options(NamedTuple):
    """The sizes and scalars of a call, under the names and in the order of _C.FIELDS."""

    b: int
    h: int
    hk: int
    sq: int
    sk: int
    d: int
    d_v: int
    total_q: int
    total_k: int
    scale: float
    softcap: float
    window_left: int
    window_right: int
    dropout_p: float
    deterministic: bool


def draw_rng_state(device):
    """(seed, offset) of one call's dropout mask, from torch's own generator."""
    return empty(2, dtype=torch.int64, device=device).random_()


def forward(q, k, v, operands, options, want_s_dmask=False):
    """(out, lse, s_dmask); s_dmask is None unless wanted."""
    out, lse = allocate_results(q, operands, options)
    values = _values(q, k, v, out, lse, operands, options)
    s_dmask = None
    if want_s_dmask:
        s_dmask = allocate_s_dmask(q, options)
        values += *_NO_GRADIENTS, s_dmask.data_ptr(), *s_dmask.shape[2:]
    _C.forward(_scratch(q), *values)
    return out, lse, s_dmask


def backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, operands, options):
    """Writes dq, dk and dv, and dbias if wanted. dlse and dbias may be None."""
    values = _values(q, k, v, out, lse, operands, options)
    _C.backward(_scratch(q), *values, *_gradients(dout, dlse, dq, dk, dv, dbias))


def choose(q, k, v, operands, options, want_backward=False):
    """(name of the kernel that the call would take or None, why others refused it)."""
    out, lse = allocate_results(q, operands, options)
    values = _values(q, k, v, out, lse, operands, options)
    if not want_backward:
        return _C.choose(_C.FORWARD, *values)
    bias = operands.bias
    dbias = bias_gradient_of(bias) if bias is not None and bias.requires_grad else None
    gradients = [gradient_of(x) for x in (q, k, v)]
    return _C.choose(_C.BACKWARD, *values, *_gradients(out, None, *gradients, dbias))


def allocate_results(q, operands, options):
    """Uninitialised memory for out and lse."""
    b, h, _, sq, _, d, d_v, total_q, *_ = options
    dtype, device, packed = q.dtype, q.device, operands.cu_seqlens_q is not None
    if d == d_v and q.is_contiguous():
        out = empty_like(q)
    else:
        out = empty((total_q, h, d_v) if packed else (b, sq, h, d_v), dtype=dtype, device=device)
    lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    if packed:
        return out, empty(h, total_q, dtype=lse_dtype, device=device)
    return out, empty(b, h, sq, dtype=lse_dtype, device=device)


def allocate_s_dmask(q, options):
    """Zeros, for what the kernels do not write of it."""
    rows, columns = [(n + 127) // 128 * 128 for n in (options.sq, options.sk)]
    return torch.zeros(options.b, options.h, rows, columns, dtype=q.dtype, device=q.device)


def gradient_of(given):
    """Uninitialised memory for the gradient of a tensor, in its layout where that keeps channels
    contiguous."""
    gradient = empty_like(given)
    if gradient.stride(-1) == 1:
        return gradient
    return empty(given.shape, dtype=given.dtype, device=given.device)


def bias_gradient_of(bias):
    """Uninitialised memory for the gradient of a bias: where the bias has size 1 the kernels sum."""
    return empty(bias.shape, dtype=bias.dtype, device=bias.device)


def _values(q, k, v, out, lse, operands, options):
    """What describes a call in both passes: the values of _C.FIELDS up to `deterministic`."""
    cu_q, cu_k, seqused_k, alibi, rng, bias, mask = operands
    on_gpu = q.is_cuda
    index = q.get_device() if on_gpu else 0
    return (_C.CUDA if on_gpu else _C.CPU, DTYPES[q.dtype], get_num_threads(), index,
            _cuda_stream(index) if on_gpu else None,
            (q.data_ptr(), q.stride()), (k.data_ptr(), k.stride()), (v.data_ptr(), v.stride()),
            (out.data_ptr(), out.stride()), (lse.data_ptr(), lse.stride()),
            None if cu_q is None else cu_q.data_ptr(), None if cu_k is None else cu_k.data_ptr(),
            None if seqused_k is None else seqused_k.data_ptr(), None if alibi is None else alibi.data_ptr(),
            alibi.stride(0) if alibi is not None and alibi.dim() == 2 else 0,
            None if rng is None else rng.data_ptr(), None if bias is None else _scores(bias),
            None if mask is None else _scores(mask), *options)


def _gradients(dout, dlse, dq, dk, dv, dbias):
    """The values of _C.FIELDS behind them."""
    return (*[_tensor(x) for x in (dout, dlse, dq, dk, dv)], None if dbias is None else _scores(dbias))


_NO_GRADIENTS = (None,) * 6


def _tensor(x):
    return None if x is None else (x.data_ptr(), x.stride())


def _scores(x):
    """(pointer, dtype, stride_b, stride_h, stride_q, stride_k) of a tensor over the scores: stride 0 where it
    has size 1. A mask's dtype does not count."""
    stride_b, stride_h, stride_q, stride_k = [0 if n == 1 else step for n, step in zip(x.shape, x.stride())]
    return x.data_ptr(), DTYPES.get(x.dtype, 0), stride_b, stride_h, stride_q, stride_k


def _cuda_stream(index):
    """The current stream of that device, as an address."""
    return torch._C._cuda_getCurrentRawStream(index)


def _scratch(q):
    """What allocates scratch beside q."""
    return partial(empty, dtype=torch.uint8, device=q.device)
