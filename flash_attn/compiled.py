"""The two passes as operators of torch.library: torch.compile keeps them whole in its graphs.

Eager calls do not come this way: an operator costs twice what an autograd Function does. What the operators are
told is what `_backend` takes, and what they return has the sizes and strides of what it returns.
"""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import _backend
from ._backend import Operands, Options

SIZES = Options._fields.index("scale")          # of the Options that are sizes, which may be symbols
OPERANDS = len(Operands._fields)
BIAS = Operands._fields.index("bias")


def attention(q, k, v, operands, options, want_s_dmask):
    """(out, lse, s_dmask), differentiable; s_dmask is empty unless wanted."""
    values = list(options)                      # dynamo of torch 2.4 takes part of an Options for an Options
    return _forward(q, k, v, *operands, values[:SIZES], *values[SIZES:], want_s_dmask)


def draw_rng_state(like):
    """_backend's, beside a tensor: with the same seed the same dropout mask as in an eager call."""
    return torch.ops.flash_attn.draw_rng_state(like)


# The tag keeps a graph from drawing anew where it computes the call a second time, as for activation
# checkpoints. Unlike custom_op this refuses a second definition, which is what reloading the module would be.
if not hasattr(torch.ops.flash_attn, "draw_rng_state"):
    _library = torch.library.Library("flash_attn", "FRAGMENT")
    _library.define("draw_rng_state(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    _library.impl("draw_rng_state", lambda like: _backend.draw_rng_state(like.device), "CompositeExplicitAutograd")
    torch.library.register_fake("flash_attn::draw_rng_state", lambda like: like.new_empty(2, dtype=torch.int64))


def _unpacked(values):
    """The Operands and Options among an operator's arguments."""
    operands, sizes, scalars = values[:OPERANDS], values[OPERANDS], values[OPERANDS + 1:]
    return Operands(*operands), Options(*sizes, *scalars)


@torch.library.custom_op("flash_attn::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Optional[Tensor], cu_seqlens_k: Optional[Tensor],
             seqused_k: Optional[Tensor], alibi_slopes: Optional[Tensor], rng_state: Optional[Tensor],
             bias: Optional[Tensor], mask: Optional[Tensor], sizes: Sequence[int], scale: float, softcap: float,
             window_left: int, window_right: int, dropout_p: float, deterministic: bool,
             want_s_dmask: bool) -> Tuple[Tensor, Tensor, Tensor]:
    operands, options = _unpacked((cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, rng_state, bias, mask, sizes,
                                   scale, softcap, window_left, window_right, dropout_p, deterministic))
    out, lse, s_dmask = _backend.forward(q, k, v, operands, options, want_s_dmask)
    return out, lse, q.new_empty(0) if s_dmask is None else s_dmask


@_forward.register_fake
def _(q, k, v, *values):
    *values, want_s_dmask = values
    operands, options = _unpacked(values)
    out, lse = _backend.allocate_results(q, operands, options)
    return out, lse, _backend.allocate_s_dmask(q, options) if want_s_dmask else q.new_empty(0)


@torch.library.custom_op("flash_attn::attention_backward", mutates_args=())
def _backward(dout: Tensor, dlse: Optional[Tensor], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
              cu_seqlens_q: Optional[Tensor], cu_seqlens_k: Optional[Tensor], seqused_k: Optional[Tensor],
              alibi_slopes: Optional[Tensor], rng_state: Optional[Tensor], bias: Optional[Tensor],
              mask: Optional[Tensor], sizes: Sequence[int], scale: float, softcap: float, window_left: int,
              window_right: int, dropout_p: float, deterministic: bool,
              want_dbias: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    operands, options = _unpacked((cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, rng_state, bias, mask, sizes,
                                   scale, softcap, window_left, window_right, dropout_p, deterministic))
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    *gradients, dbias = _allocate_gradients(q, k, v, bias, want_dbias)
    _backend.backward(dout, dlse, q, k, v, out, lse, *gradients, dbias if want_dbias else None, operands, options)
    return *gradients, dbias


def _allocate_gradients(q, k, v, bias, want_dbias):
    """Of q, k, v and the bias; empty for that one unless wanted."""
    gradients = [_backend.gradient_of(x) for x in (q, k, v)]
    return *gradients, _backend.bias_gradient_of(bias) if want_dbias else q.new_empty(0)


@_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, *values):
    *values, want_dbias = values
    return _allocate_gradients(q, k, v, _unpacked(values)[0].bias, want_dbias)


def _save(ctx, inputs, output):
    out, lse, s_dmask = output
    ctx.save_for_backward(*inputs[:3], out, lse, *inputs[3:3 + OPERANDS])
    ctx.options = inputs[3 + OPERANDS:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(s_dmask)


def _differentiate(ctx, dout, dlse, _):
    q, k, v, out, lse, *operands = ctx.saved_tensors
    want_dbias = ctx.needs_input_grad[3 + BIAS]
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dbias = _backward(dout, dlse, q, k, v, out, lse, *operands, *ctx.options, want_dbias)
    gradients = [None] * len(ctx.needs_input_grad)
    gradients[:3], gradients[3 + BIAS] = (dq, dk, dv), dbias if want_dbias else None
    return tuple(gradients)


_forward.register_autograd(_differentiate, setup_context=_save)
