"""Turns tensors into pointers and strides: the only caller of the extension.

Nothing is validated here: the public functions check types and shapes, the C side checks values. A call costs
a few microseconds, so the fields of struct fa_params are passed in its order, and what is the same in forward
and backward is computed by one function. Every output and all scratch is allocated here, by PyTorch, and left
uninitialised: the kernels write every row.
"""

import os
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
    """The scalars of a call."""

    max_seqlen_q: int
    max_seqlen_k: int
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
    out, lse = _allocate_results(q, v, operands)
    fields = _fields(q, k, v, out, lse, operands, options)
    s_dmask = None
    if want_s_dmask:
        s_dmask = torch.zeros(_s_dmask_shape(fields), dtype=q.dtype, device=q.device)
        fields["s_dmask"] = s_dmask.data_ptr()
        fields["dmask_sq"], fields["dmask_sk"] = s_dmask.shape[2:]
    _run(_C.forward, fields, q)
    return out, lse, s_dmask


def backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, operands, options):
    """Writes dq, dk and dv, and dbias if wanted. dlse and dbias may be None."""
    fields = _fields(q, k, v, out, lse, operands, options)
    fields["dout"] = _tensor(dout)
    fields["dlse"] = _rows(dlse)
    fields["dq"], fields["dk"], fields["dv"] = _tensor(dq), _tensor(dk), _tensor(dv)
    if dbias is not None:
        fields["dbias"] = _scores(dbias)
    _run(_C.backward, fields, q)


def choose(q, k, v, operands, options, want_backward=False):
    """(name of the kernel that the call would take or None, why others refused it)."""
    out, lse = _allocate_results(q, v, operands)
    fields = _fields(q, k, v, out, lse, operands, options)
    if not want_backward:
        return _C.choose(_C.FORWARD, **fields)
    gradients = [gradient_of(x) for x in (q, k, v)]
    fields["dout"] = fields["out"]
    fields["dq"], fields["dk"], fields["dv"] = map(_tensor, gradients)
    if operands.bias is not None and operands.bias.requires_grad:
        fields["dbias"] = _scores(bias_gradient_of(operands.bias))
    return _C.choose(_C.BACKWARD, **fields)


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


def _allocate_results(q, v, operands):
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    if operands.cu_seqlens_q is None:
        b, sq, h, _ = q.shape
        rows = (b, h, sq)
    else:
        total_q, h, _ = q.shape
        rows = (h, total_q)
    out = empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    return out, empty(rows, dtype=lse_dtype, device=q.device)


def _s_dmask_shape(fields):
    sq, sk = ((rows + 127) // 128 * 128 for rows in (fields["sq"], fields["sk"]))
    return fields["b"], fields["h"], sq, sk


def _fields(q, k, v, out, lse, operands, options):
    """struct fa_params, in its order."""
    cu_q, cu_k, seqused_k, alibi, rng, bias, mask = operands
    max_seqlen_q, max_seqlen_k, scale, softcap, window_left, window_right, dropout_p, deterministic = options
    if cu_q is None:
        b, sq, h, d = q.shape
        _, sk, hk, d_v = v.shape
        total_q, total_k = b * sq, b * sk
    else:
        b, sq, sk = cu_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
        total_q, h, d = q.shape
        total_k, hk, d_v = v.shape
    fields = dict(
        device=_C.CUDA if q.is_cuda else _C.CPU, dtype=DTYPES[q.dtype],
        b=b, h=h, hk=hk, sq=sq, sk=sk, d=d, d_v=d_v, total_q=total_q, total_k=total_k,
        q=_tensor(q), k=_tensor(k), v=_tensor(v), out=_tensor(out), lse=_rows(lse),
        dout=None, dlse=None, dq=None, dk=None, dv=None,
        s_dmask=None, dmask_sq=0, dmask_sk=0,
        cu_q=_pointer(cu_q), cu_k=_pointer(cu_k), seqused_k=_pointer(seqused_k),
        scale=scale, softcap=softcap, window_left=window_left, window_right=window_right,
        alibi=_pointer(alibi),
        alibi_stride_b=alibi.stride(0) if alibi is not None and alibi.dim() == 2 else 0,
        dropout_p=dropout_p, rng=_pointer(rng), deterministic=deterministic,
        debug=False, n_threads=get_num_threads(),
        device_index=q.get_device() if q.is_cuda else 0, stream=None)
    if bias is not None:
        fields["bias"] = _scores(bias)
    if mask is not None:
        fields["mask"] = _scores(mask)
    return fields


def _tensor(x):
    """(pointer, stride_b, stride_s, stride_h) of (b, s, h, d), or of packed (total, h, d) with stride_b =
    0."""
    stride = x.stride()
    return x.data_ptr(), stride[0] if len(stride) == 4 else 0, stride[-3], stride[-2]


def _rows(x):
    """The same of lse, whose indices are (b, h, s), or packed (h, total)."""
    if x is None:
        return None
    stride = x.stride()
    return x.data_ptr(), stride[0] if len(stride) == 3 else 0, stride[-1], stride[-2]


def _scores(x):
    """(pointer, dtype, stride_b, stride_h, stride_q, stride_k) of a tensor over the scores: stride 0 where it
    has size 1. A mask's dtype does not count."""
    stride_b, stride_h, stride_q, stride_k = [0 if n == 1 else step for n, step in zip(x.shape, x.stride())]
    return x.data_ptr(), DTYPES.get(x.dtype, 0), stride_b, stride_h, stride_q, stride_k


def _pointer(x):
    return None if x is None else x.data_ptr()


def _run(call, fields, q):
    """Calls the extension: on a GPU in the current stream of q's device, which the C side makes current."""
    if not q.is_cuda:
        return call(_host_scratch, **fields)
    device = q.device
    fields["debug"] = os.environ.get("FLASH_ATTN_DEBUG") == "1"
    fields["stream"] = torch._C._cuda_getCurrentRawStream(device.index)
    return call(lambda nbytes: empty(nbytes, dtype=torch.uint8, device=device), **fields)


def _host_scratch(nbytes):
    return empty(nbytes, dtype=torch.uint8, device="cpu")
