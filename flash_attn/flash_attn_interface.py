"""The public functions, by the names and signatures of flash-attn 2.8, and the one autograd Function behind
them.

A call goes through three steps: `_prepare` makes its arguments uniform and checks what the C side cannot see
(types, dtypes, devices, shapes; values are checked there), `_FlashAttention` records it if a gradient is
wanted, and `_backend` runs it. Packed tensors travel whole, so that their gradient is one tensor too.
"""

from operator import index

import torch
from torch import Tensor

from . import _backend, compiled
from ._backend import ArgumentTypeError, ArgumentValueError, Operands, Options, UnsupportedError


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *,
                    seqused_k=None, rng_state=None, attn_bias=None, attn_mask=None):
    """Exact attention, softmax(softmax_scale * q k^T) v, in memory linear in the sequence lengths.

    Arguments:
        q: (batch, seqlen_q, nheads, headdim), float16, bfloat16, float32 or, on the CPU, float64. Any
            strides; a tensor whose channels are not contiguous is copied.
        k: (batch, seqlen_k, nheads_k, headdim), of q's dtype and device. nheads_k divides nheads: query head
            i uses key head i // (nheads / nheads_k), so nheads_k = 1 is multi-query attention.
        v: (batch, seqlen_k, nheads_k, headdim_v); headdim_v may differ from headdim.
        dropout_p: probability, in [0, 1), of dropping an attention weight; pass 0 in evaluation. It acts in
            steps of 1/256: of 256 weights round(256 (1 - p)), at least 1, are kept on average and scaled by
            256 over that number, so p < 1/512 drops nothing. `flash_attn.info(dropout_p=p)` tells the
            effective value.
        softmax_scale: factor on q k^T, any finite number; None means headdim ** -0.5.
        causal: hide from query i every key j > i + seqlen_k - seqlen_q. The last query is aligned with the
            last key: with seqlen_q < seqlen_k the queries are the newest tokens; with seqlen_q > seqlen_k the
            first seqlen_q - seqlen_k queries see nothing.
        window_size: (left, right), in keys, inclusive: query i sees keys from i + seqlen_k - seqlen_q - left
            to i + seqlen_k - seqlen_q + right. A negative bound or None is unlimited. `causal` sets right to
            0.
        softcap: if positive, scores s become softcap * tanh(s / softcap), before ALiBi and masks.
        alibi_slopes: float32, (nheads,) or (batch, nheads): slope * |i + seqlen_k - seqlen_q - j| is
            subtracted from the scores. They get no gradient.
        deterministic: make the gradient of q bit-reproducible on a GPU too; all else always is. Also on under
            torch.use_deterministic_algorithms(True).
        return_attn_probs: return the log-sum-exp and the dropout mask too.
        seqused_k: int32, (batch,): how many of the first keys of each sequence are used. It replaces
            seqlen_k, alignment included.
        rng_state: int64, (2,), (seed, offset) that decides what is dropped, to repeat a mask. None draws it
            from torch's generator of q's device, so that torch.manual_seed and activation checkpointing work.
        attn_bias: added to the scores, after softcap and ALiBi; broadcastable to (batch, nheads, seqlen_q,
            seqlen_k), of any float dtype (autocast leaves it alone) and any strides: an expanded tensor is
            read as it is, and the gradient that goes back through the expansion is already summed over it
            (ask for the gradient of the tensor that was expanded, not of the expanded view). -inf hides the
            key, with gradient 0.
        attn_mask: bool, broadcastable like attn_bias: True lets the query see the key, as in
            scaled_dot_product_attention; a padding mask is (batch, 1, 1, seqlen_k). A float attn_mask is an
            attn_bias.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v), of q's dtype; with return_attn_probs (out, softmax_lse,
        S_dmask). softmax_lse (batch, nheads, seqlen_q), float32 (float64 for float64), is the natural
        logarithm of the sum of exp(scores) before dropout, and is differentiable. S_dmask is exp(score - row
        maximum), negative where dropped, (batch, nheads, seqlen_q, seqlen_k) with both lengths rounded up to
        128 (undefined in the padding); without dropout it is empty.

    A query that sees no key has out = 0, softmax_lse = -inf and zero gradients. Sizes of zero are legal,
    except those of heads and channels. Under torch.autocast q, k and v are cast to its dtype (float64 is left
    alone).

    Raises ArgumentTypeError (a TypeError), ArgumentValueError (a ValueError) or UnsupportedError (a
    ValueError and a NotImplementedError, for a legal call that this build or machine has no kernel for); all
    are RuntimeErrors.

    Source: FlashAttention (Dao et al., 2022), section 3.1 and appendix B (algorithms 1 to 4);
    FlashAttention-2 (Dao, 2023), section 3.
    """
    return _attention(("q", "k", "v"), (q, k, v), dropout_p, softmax_scale, causal, window_size, softcap,
                      alibi_slopes, deterministic, return_attn_probs, seqused_k, rng_state, attn_bias,
                      attn_mask)


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                             softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *,
                             seqused_k=None, rng_state=None, attn_bias=None, attn_mask=None):
    """flash_attn_func on kv (batch, seqlen_k, 2, nheads_k, headdim), keys first; its gradient is one tensor
    too.

    All else, errors included, is as in flash_attn_func.
    """
    return _attention(("q", "kv"), (q, kv), dropout_p, softmax_scale, causal, window_size, softcap,
                      alibi_slopes, deterministic, return_attn_probs, seqused_k, rng_state, attn_bias,
                      attn_mask)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                              softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *,
                              seqused_k=None, rng_state=None, attn_bias=None, attn_mask=None):
    """flash_attn_func on qkv (batch, seqlen, 3, nheads, headdim); its gradient is one tensor too.

    All else, errors included, is as in flash_attn_func.
    """
    return _attention(("qkv",), (qkv,), dropout_p, softmax_scale, causal, window_size, softcap,
                      alibi_slopes, deterministic, return_attn_probs, seqused_k, rng_state, attn_bias,
                      attn_mask)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                           alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
                           *, seqused_k=None, rng_state=None, attn_bias=None, attn_mask=None):
    """flash_attn_func on a batch of sequences of different lengths, packed one after the other without
    padding.

    Arguments, where they differ from flash_attn_func:
        q: (total_q, nheads, headdim); k: (total_k, nheads_k, headdim); v: (total_k, nheads_k, headdim_v).
        cu_seqlens_q, cu_seqlens_k: int32, (batch + 1,), contiguous, on q's device: sequence b is rows
            cu_seqlens[b] to cu_seqlens[b + 1], so they start at 0 and never decrease; empty sequences are
            legal.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence; an int or an integer tensor.
        block_table: paged keys and values do not exist yet: must be None.
        attn_bias, attn_mask: must be None. They need padded sequences: flash_attn_func takes them.

    Causal masks, windows and ALiBi count within each sequence, whose own lengths stand for seqlen_q and
    seqlen_k. Rows that belong to no sequence get out = 0, softmax_lse = -inf and zero gradients, whatever
    they hold.

    Returns out (total_q, nheads, headdim_v); with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse
    is (nheads, total_q), S_dmask (batch, nheads, max_seqlen_q, max_seqlen_k) with both lengths rounded up to
    128. Errors are as in flash_attn_func.
    """
    if block_table is not None:
        raise UnsupportedError("block_table must be None: paged keys and values are not supported yet. "
                               "Gather the pages into contiguous k and v; seqused_k takes their lengths.")
    return _attention(("q", "k", "v"), (q, k, v), dropout_p, softmax_scale, causal, window_size, softcap,
                      alibi_slopes, deterministic, return_attn_probs, seqused_k, rng_state, attn_bias,
                      attn_mask, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                                    softcap=0.0, alibi_slopes=None, deterministic=False,
                                    return_attn_probs=False, *, seqused_k=None, rng_state=None, attn_bias=None,
                                    attn_mask=None):
    """flash_attn_varlen_func on kv (total_k, 2, nheads_k, headdim), keys first; its gradient is one tensor
    too.

    All else, errors included, is as in flash_attn_varlen_func.
    """
    return _attention(("q", "kv"), (q, kv), dropout_p, softmax_scale, causal, window_size, softcap,
                      alibi_slopes, deterministic, return_attn_probs, seqused_k, rng_state, attn_bias,
                      attn_mask, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None,
                                     causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                                     deterministic=False, return_attn_probs=False, *,
                                     seqused_k=None, rng_state=None, attn_bias=None, attn_mask=None):
    """flash_attn_varlen_func on qkv (total, 3, nheads, headdim); its gradient is one tensor too.

    All else, errors included, is as in flash_attn_varlen_func.
    """
    return _attention(("qkv",), (qkv,), dropout_p, softmax_scale, causal, window_size, softcap,
                      alibi_slopes, deterministic, return_attn_probs, seqused_k, rng_state, attn_bias,
                      attn_mask, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))


def _attention(names, given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
               deterministic, return_attn_probs, seqused_k, rng_state, attn_bias, attn_mask, packing=None):
    """All six functions. `given` is (qkv,), (q, kv) or (q, k, v); a name has one letter for each tensor in
    it. `packing` is (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of packed sequences."""
    given, operands, options = _prepare(names, given, dropout_p, softmax_scale, causal, window_size, softcap,
                                        alibi_slopes, deterministic, seqused_k, rng_state, attn_bias,
                                        attn_mask, packing)
    want_s_dmask = return_attn_probs and operands.rng_state is not None and dropout_p > 0
    bias = operands.bias
    if torch.compiler.is_compiling():
        out, lse, s_dmask = compiled.attention(*_unpack(given), operands, options, want_s_dmask)
    elif torch.is_grad_enabled() and (any([x.requires_grad for x in given])
                                      or bias is not None and bias.requires_grad):
        results = _FlashAttention.apply(operands, options, return_attn_probs, want_s_dmask, bias, *given)
        if not return_attn_probs:
            return results
        out, lse, s_dmask = results
    else:
        out, lse, s_dmask = _backend.forward(*_unpack(given), operands, options, want_s_dmask)
    if not return_attn_probs:
        return out
    return out, lse, s_dmask if want_s_dmask else out.new_empty(0)


class _FlashAttention(torch.autograd.Function):
    """Saves its inputs, out and lse; backward recomputes the scores from them (the paper's algorithm 4).
    `bias` is the one of the operands: autograd must see it as an argument. A result costs as much as an
    argument: lse and s_dmask are results only where they are asked for."""

    @staticmethod
    def forward(ctx, operands, options, return_attn_probs, want_s_dmask, bias, *given):
        out, lse, s_dmask = _backend.forward(*_unpack(given), operands, options, want_s_dmask)
        ctx.save_for_backward(out, lse, *operands, *given)
        ctx.options = options
        ctx.set_materialize_grads(False)
        if s_dmask is not None:
            ctx.mark_non_differentiable(s_dmask)
        return (out, lse, s_dmask) if return_attn_probs else out

    @staticmethod
    def backward(ctx, dout, dlse=None, _=None):
        if torch.is_grad_enabled():
            raise UnsupportedError("create_graph=True is not supported: second derivatives are not computed. "
                                   "flash_attn.reference.attention has them, in quadratic memory.")
        out, lse, *saved = ctx.saved_tensors
        count = len(Operands._fields)
        operands, given = Operands(*saved[:count]), saved[count:]
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        gradients = [_backend.gradient_of(x) for x in given]
        dbias = _backend.bias_gradient_of(operands.bias) if ctx.needs_input_grad[4] else None
        _backend.backward(dout, dlse, *_unpack(given), out, lse, *_unpack(gradients), dbias, operands,
                          ctx.options)
        return None, None, None, None, dbias, *gradients


def _unpack(given):
    """q, k and v as views of the given tensors."""
    if len(given) == 3:
        return given
    return (*given[:-1], *given[-1].unbind(-3))


def _prepare(names, given, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
             deterministic, seqused_k, rng_state, attn_bias, attn_mask, packing):
    """Given tensors with contiguous channels in the dtype of the call, and its Operands and Options,
    checked."""
    given = [_given_tensor(name, x, 3 if packing else 4) for name, x in zip(names, given)]
    _check_kind(names[0], given[0])
    if torch.is_autocast_enabled("cuda" if given[0].is_cuda else "cpu"):
        given = [_autocast(x) for x in given]
    q, k, v = _unpack(given)
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    _check_agreement(names, q, k, v, shape_q, shape_k, shape_v)
    if packing:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packing
        batch = _check_packing(cu_seqlens_q, cu_seqlens_k, q.device)
        max_seqlen_q = _integer("max_seqlen_q", max_seqlen_q)
        max_seqlen_k = _integer("max_seqlen_k", max_seqlen_k)
        total_q, heads, headdim = shape_q
        total_k, heads_k, headdim_v = shape_v
    else:
        cu_seqlens_q = cu_seqlens_k = None
        batch, max_seqlen_q, heads, headdim = shape_q
        batch_k, max_seqlen_k, heads_k, headdim_v = shape_v
        total_q, total_k = batch * max_seqlen_q, batch * max_seqlen_k
        if batch_k != batch:
            raise ArgumentValueError(f"{names[1]} has a batch of {batch_k}; expected {batch}, the batch of "
                                     f"q.")
    if seqused_k is not None:
        _check_operand("seqused_k", seqused_k, torch.int32, [(batch,)], q.device)
    if alibi_slopes is not None:
        alibi_slopes = _prepared_slopes(alibi_slopes, batch, q)
    if rng_state is not None:
        _check_operand("rng_state", rng_state, torch.int64, [(2,)], q.device)
    elif _is_dropping(dropout_p):
        rng_state = (compiled.draw_rng_state(q) if torch.compiler.is_compiling()
                     else _backend.draw_rng_state(q.device))
    if attn_bias is not None or attn_mask is not None:
        attn_bias, attn_mask = _prepared_scores(attn_bias, attn_mask, q, k, packing)
    operands = Operands(cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, rng_state, attn_bias, attn_mask)
    if softmax_scale is None:
        softmax_scale = max(headdim, 1) ** -0.5
    left, right = _window(window_size)
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    return given, operands, Options(batch, heads, heads_k, max_seqlen_q, max_seqlen_k, headdim, headdim_v,
                                    total_q, total_k, softmax_scale, softcap, left, 0 if causal else right,
                                    dropout_p, deterministic)


def _given_tensor(name, x, rank):
    """x, copied if its channels are not contiguous."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor; it is a {type(x).__name__}.")
    parts, stride = len(name), x.stride()
    if parts > 1:
        rank += 1
    if len(stride) != rank or (parts > 1 and x.shape[-3] != parts):
        raise ArgumentValueError(f"{name} must have shape {_LAYOUTS[name, rank]}; it has {tuple(x.shape)}.")
    return x if stride[-1] == 1 else x.contiguous()


def _check_kind(name, x):
    """Of the first tensor; the others are of its dtype and on its device."""
    if x.dtype not in _backend.DTYPES:
        raise ArgumentTypeError(f"{name} has dtype {x.dtype}; only float16, bfloat16, float32 and float64 "
                                f"are supported. Cast it, for example {name}.float().")
    if not (x.is_cuda or x.is_cpu):
        raise UnsupportedError(f"{name} is on {x.device}; only cpu and cuda tensors are supported. "
                               f"Move it, for example {name}.cpu().")


def _autocast(x):
    """As torch does: float64 and what is no number with a fraction stay."""
    if x.dtype is torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


_LAYOUTS = {
    ("q", 4): "(batch, seqlen_q, nheads, headdim)", ("q", 3): "(total_q, nheads, headdim)",
    ("k", 4): "(batch, seqlen_k, nheads_k, headdim)", ("k", 3): "(total_k, nheads_k, headdim)",
    ("v", 4): "(batch, seqlen_k, nheads_k, headdim_v)", ("v", 3): "(total_k, nheads_k, headdim_v)",
    ("kv", 5): "(batch, seqlen_k, 2, nheads_k, headdim)", ("kv", 4): "(total_k, 2, nheads_k, headdim)",
    ("qkv", 5): "(batch, seqlen, 3, nheads, headdim)", ("qkv", 4): "(total, 3, nheads, headdim)",
}


def _check_agreement(names, q, k, v, shape_q, shape_k, shape_v):
    """k and v against q, in dtype, device and shape. In a packed tensor they agree by construction."""
    name_k, name_v, dtype = names[min(1, len(names) - 1)], names[-1], q.dtype
    if not (k.dtype is dtype and v.dtype is dtype and q.get_device() == k.get_device() == v.get_device()):
        _refuse_strangers((name_k, k), (name_v, v), q=q)
    if shape_k[-1] != shape_q[-1]:
        raise ArgumentValueError(f"{name_k} has a headdim of {shape_k[-1]}; expected {shape_q[-1]}, "
                                 f"the headdim of q.")
    if shape_v != shape_k and shape_v[:-1] != shape_k[:-1]:
        raise ArgumentValueError(f"{name_v} must have shape {(*shape_k[:-1], 'headdim_v')}, as k; "
                                 f"it has {tuple(shape_v)}.")


def _refuse_strangers(*others, q):
    """Raises what one of these disagrees in."""
    for name, x in others:
        if x.dtype is not q.dtype:
            raise ArgumentTypeError(f"{name} has dtype {x.dtype}; expected {q.dtype}, the dtype of q. "
                                    f"Cast it: {name}.to(q.dtype), or call under torch.autocast.")
        if x.device != q.device:
            raise ArgumentValueError(f"{name} is on {x.device}; expected {q.device}, the device of q. "
                                     f"Move it: {name}.to(q.device).")


def _check_packing(cu_seqlens_q, cu_seqlens_k, device):
    """The number of sequences."""
    for name, x in ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k):
        _check_operand(name, x, torch.int32, None, device)
        if x.dim() != 1 or x.shape[0] == 0:
            raise ArgumentValueError(f"{name} must have shape (batch + 1,); it has {tuple(x.shape)}.")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ArgumentValueError(f"cu_seqlens_k must have shape {tuple(cu_seqlens_q.shape)}, as "
                                 f"cu_seqlens_q; it has {tuple(cu_seqlens_k.shape)}.")
    return cu_seqlens_q.shape[0] - 1


def _prepared_slopes(slopes, batch, q):
    _check_operand("alibi_slopes", slopes, torch.float32, [(q.shape[-2],), (batch, q.shape[-2])], q.device,
                   contiguous=False)
    if slopes.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("alibi_slopes requires a gradient, which is not computed. "
                               "Pass alibi_slopes.detach().")
    return slopes if slopes.stride(-1) == 1 else slopes.contiguous()


def _prepared_scores(attn_bias, attn_mask, q, k, packing):
    """(bias, mask) as four-dimensional views whose sizes are those of the scores or 1."""
    if packing:
        name = "attn_bias" if attn_bias is not None else "attn_mask"
        raise UnsupportedError(f"{name} is not supported with packed sequences. Pad them to (batch, seqlen, "
                               f"nheads, headdim) and call flash_attn_func, where seqused_k or a bool "
                               f"attn_mask hides the padding.")
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        if attn_bias is not None:
            raise ArgumentValueError("attn_bias and a float attn_mask are both added to the scores: pass "
                                     "their sum as attn_bias, or a bool attn_mask.")
        attn_bias, attn_mask = attn_mask, None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if attn_bias is not None:
        if isinstance(attn_bias, Tensor) and attn_bias.dtype not in _backend.DTYPES:
            raise ArgumentTypeError(f"attn_bias has dtype {attn_bias.dtype}; only float16, bfloat16, float32 "
                                    f"and float64 are supported. A bool tensor goes to attn_mask.")
        attn_bias = _prepared_score_tensor("attn_bias", attn_bias, shape, q.device)
    if attn_mask is not None:
        if isinstance(attn_mask, Tensor) and attn_mask.dtype is not torch.bool:
            raise ArgumentTypeError(f"attn_mask must have dtype torch.bool (True: visible) or a float dtype "
                                    f"(added to the scores); it has {attn_mask.dtype}. Convert it: "
                                    f"attn_mask.bool().")
        attn_mask = _prepared_score_tensor("attn_mask", attn_mask, shape, q.device)
    return attn_bias, attn_mask


def _prepared_score_tensor(name, x, shape, device):
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor; it is a {type(x).__name__}.")
    if x.device != device:
        raise ArgumentValueError(f"{name} must be on {device}, as q; it is on {x.device}. "
                                 f"Move it: {name}.to(q.device).")
    missing = 4 - x.dim()
    if missing < 0 or any([n != 1 and n != full for n, full in zip(x.shape, shape[missing:])]):
        raise ArgumentValueError(f"{name} must be broadcastable to (batch, nheads, seqlen_q, seqlen_k) = "
                                 f"{shape}; it has shape {tuple(x.shape)}.")
    if any([step == 0 and n > 1 for n, step in zip(x.shape, x.stride())]):
        x = _unexpanded(x)
    return x.view((1,) * missing + x.shape) if missing else x


def _unexpanded(x):
    """x with expanded dimensions cut down to size 1, so that its gradient is as small.

    Autograd's own way there, through the view that was expanded, would fill a tensor of the expanded shape:
    the tensor whose memory x shows takes the gradient instead. Where there is none (x is a leaf, say), every
    element of x has a gradient of its own, and x stays as it is."""
    if torch.compiler.is_compiling():               # a graph fuses that fill with the sum over it
        return x[tuple([slice(0, 1) if step == 0 else slice(None) for step in x.stride()])]
    size, stride = [1 if step == 0 else n for n, step in zip(x.shape, x.stride())], x.stride()
    if not x.requires_grad or not torch.is_grad_enabled():
        return x.as_strided(size, stride)
    owner = x._base
    if x.is_leaf or owner is None or not owner.requires_grad or owner.dtype is not x.dtype \
            or 0 in owner.stride():
        return x
    return owner.as_strided(size, stride, x.storage_offset())


def _check_operand(name, x, dtype, shapes, device, contiguous=True):
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor; it is a {type(x).__name__}.")
    if x.dtype is not dtype:
        raise ArgumentTypeError(f"{name} must have dtype {dtype}; it has {x.dtype}. "
                                f"Convert it: {name}.to({dtype}).")
    if x.device != device:
        raise ArgumentValueError(f"{name} must be on {device}, as q; it is on {x.device}. "
                                 f"Move it: {name}.to(q.device).")
    if shapes is not None and x.shape not in shapes:
        raise ArgumentValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; "
                                 f"it has {tuple(x.shape)}.")
    if contiguous and not x.is_contiguous():
        raise ArgumentValueError(f"{name} must be contiguous; it has strides {x.stride()}. "
                                 f"Pass {name}.contiguous().")


def _window(window_size):
    """(left, right) as ints; negative is unlimited."""
    if window_size is None or (type(window_size) is tuple and window_size == (-1, -1)):
        return -1, -1
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ArgumentValueError(f"window_size must be (left, right); it is {window_size!r}.") from None
    return _bound("window_size[0]", left), _bound("window_size[1]", right)


def _bound(name, value):
    """Bounds of 2^40 and more reach every key, as no sequence is longer: sys.maxsize means unlimited too."""
    return -1 if value is None else max(-1, min(_integer(name, value), 2 ** 40))


def _is_dropping(dropout_p):
    try:
        return 0 < dropout_p < 1
    except TypeError:
        raise ArgumentTypeError(f"dropout_p must be a float in [0, 1); it is {dropout_p!r}.") from None


def _integer(name, value):
    try:
        return index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an int; it is {value!r}.") from None
