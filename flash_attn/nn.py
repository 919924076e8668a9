"""Attention as a module: torch.nn.MultiheadAttention on our kernels, and `replace`, which puts it into a
model that was built with torch's.

The class is a subclass that adds no state: constructor, initialisation, parameters and state dict are torch's
own code, so that neither a checkpoint nor an optimizer can tell the two apart. What differs is forward:
projections stay packed and in the caller's layout (the kernels take any strides, so nothing is copied between
the projections and attention), and masks go to the kernels in the shape they are given, never expanded to
(batch, heads, seqlen_q, seqlen_k).
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ._backend import ArgumentTypeError, ArgumentValueError, UnsupportedError
from .flash_attn_interface import (
    _unpack,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

# By how many tensors hold q, k and v.
_DENSE = {1: flash_attn_qkvpacked_func, 2: flash_attn_kvpacked_func, 3: flash_attn_func}
_VARLEN = {1: flash_attn_varlen_qkvpacked_func, 2: flash_attn_varlen_kvpacked_func, 3: flash_attn_varlen_func}

# Keys from which a float padding mask goes to a GPU with its bool twin. On an H100, half of the batch padded,
# 8 sequences of 16 heads of 64, forward and backward: 2.8 ms alone and 1.7 with the twin at 2048 keys, 0.53
# and 0.62 ms at 512.
_LONG = 1024


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, in memory linear in the sequence lengths.

    Constructor, arguments of forward, parameters, state dict and results are torch's, and so is the meaning
    of its masks: a bool mask is True where a key is *hidden*, the opposite of flash_attn_func's attn_mask.
    What differs:

    - need_weights=True, torch's default, asks for the matrix of attention weights. It is then computed, in
      O(seqlen_q * seqlen_k) memory. Pass need_weights=False wherever the weights are not used.
    - A query that sees no key has 0 before out_proj, and weights of 0, in every mode; torch has NaN in some.
    - Dropout acts in steps of 1/256, as in flash_attn_func; with need_weights=True it is torch's own.
    - is_causal promises that attn_mask is the causal mask. As in torch it needs attn_mask, here in eval mode
      too, and a square attn_mask without gradient is then not read. With bias_k, bias_v or add_zero_attn the
      mask is used and the promise is not: torch hides the added keys under it, where the mask shows them.
    - Nested tensors of both layouts work, in training too; with them there are no masks.
    - Second derivatives are computed with need_weights=True only; torch.jit.script does not take the class.
    - float64 runs on the CPU only, by the slow reference kernel.
    """

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):
        """(output, weights) in torch's shapes and layouts; weights is None unless need_weights."""
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask,
                                        average_attn_weights, is_causal)
        rank = query.dim()
        self._check_inputs(rank, query, key, value)
        given = self._project(query, key, value)
        if rank == 2:
            given = [x[None] for x in given]
        elif not self.batch_first:
            given = [x.transpose(0, 1) for x in given]
        masks = {}
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            masks = self._masks(given[0].shape[0], query, key, key_padding_mask, attn_mask,
                                is_causal, need_weights)
        if self.bias_k is not None or self.add_zero_attn:
            given = self._with_added_keys(*_unpack(given))
        out, weights = _attend(given, self.dropout if self.training else 0.0, need_weights, masks)
        if rank == 3 and not self.batch_first:
            out = out.transpose(0, 1)
        out = out.reshape(-1, self.embed_dim)               # sequence first: the one copy here
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias).view(query.shape)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if rank == 3 else weights[0]
        return out, weights

    def _check_inputs(self, rank, query, key, value):
        if rank != 3 and rank != 2:
            raise ArgumentValueError(f"query must have 3 dimensions, or 2 without a batch; it has {rank}.")
        if query.shape[-1] != self.embed_dim:
            raise ArgumentValueError(f"query has {query.shape[-1]} channels; expected embed_dim = "
                                     f"{self.embed_dim}.")
        if query is key is value and self._qkv_same_embed_dim:
            return
        for name, x, dim_name, dim in (("key", key, "kdim", self.kdim), ("value", value, "vdim", self.vdim)):
            if x.dim() != rank:
                raise ArgumentValueError(f"{name} must have {rank} dimensions, as query; it has {x.dim()}.")
            if x.shape[-1] != dim:
                raise ArgumentValueError(f"{name} has {x.shape[-1]} channels; expected {dim_name} = {dim}.")
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentValueError(f"value must have the batch and length of key, {tuple(key.shape[:-1])}; "
                                     f"it has {tuple(value.shape[:-1])}.")
        batch_at = 0 if self.batch_first else 1
        if rank == 3 and key.shape[batch_at] != query.shape[batch_at]:
            raise ArgumentValueError(f"key has a batch of {key.shape[batch_at]} (dimension {batch_at}, as "
                                     f"batch_first={self.batch_first}); expected {query.shape[batch_at]}, "
                                     f"the batch of query.")

    def _project(self, query, key, value):
        """(qkv,), (q, kv) or (q, k, v), of shapes (..., 3, heads, head_dim), (..., 2, heads, head_dim) and
        (..., heads, head_dim): as many products as there are different inputs."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            if query is key is value:
                return self._heads(F.linear(query, weight, bias), 3),
            if key is value:
                parts = [self.embed_dim, 2 * self.embed_dim]
                w_q, w_kv = weight.split(parts)
                b_q, b_kv = (None, None) if bias is None else bias.split(parts)
                return self._heads(F.linear(query, w_q, b_q)), self._heads(F.linear(key, w_kv, b_kv), 2)
            weights = weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [self._heads(F.linear(*each)) for each in zip((query, key, value), weights, biases)]

    def _heads(self, x, parts=None):
        shape = (self.num_heads, self.head_dim) if parts is None else (parts, self.num_heads, self.head_dim)
        return x.view(*x.shape[:-1], *shape)

    def _with_added_keys(self, q, k, v):
        """bias_k and bias_v, then a key and value of zeros, after the others."""
        added_k, added_v = [k], [v]
        shape = (k.shape[0], 1, self.num_heads, self.head_dim)
        if self.bias_k is not None:
            for added, bias in (added_k, self.bias_k), (added_v, self.bias_v):
                added.append(bias.to(k.dtype).view(1, *shape[1:]).expand(shape))
        if self.add_zero_attn:
            for added in added_k, added_v:
                added.append(k.new_zeros(shape))
        return q, torch.cat(added_k, 1), torch.cat(added_v, 1)

    def _masks(self, batch, query, key, key_padding_mask, attn_mask, is_causal, need_weights):
        """Torch's masks as keywords of flash_attn_func: causal, attn_mask and attn_bias."""
        length_at = 1 if self.batch_first and query.dim() == 3 else 0
        sq, sk = query.shape[length_at], key.shape[length_at]
        if key_padding_mask is not None:
            shape = (batch, sk) if query.dim() == 3 else (sk,)
            _check_mask("key_padding_mask", key_padding_mask, (shape,), query.device)
            key_padding_mask = key_padding_mask.view(batch, 1, 1, sk)
        added = (self.bias_k is not None) + self.add_zero_attn
        causal = False
        if attn_mask is not None:
            heads = batch * self.num_heads
            _check_mask("attn_mask", attn_mask, ((sq, sk), (heads, sq, sk)), query.device)
            causal = (is_causal and sq == sk and not added and not need_weights
                      and not attn_mask.requires_grad)
            if causal:
                attn_mask = None
            elif attn_mask.dim() == 3:
                attn_mask = attn_mask.view(batch, self.num_heads, sq, sk)
            else:
                attn_mask = attn_mask.view(1, 1, sq, sk)
        elif is_causal:
            raise ArgumentValueError("is_causal=True needs attn_mask: it is a promise that attn_mask is the "
                                     "causal mask, as in torch. Pass torch.nn.Transformer."
                                     "generate_square_subsequent_mask(seqlen) too.")
        masks = _combined(key_padding_mask, attn_mask, query.dtype)
        if added:                               # shown to every query
            masks = {name: F.pad(x, (0, added), value=name == "attn_mask") for name, x in masks.items()}
        if causal:
            masks["causal"] = True
        return masks

    def _forward_nested(self, query, key, value, key_padding_mask, need_weights, attn_mask,
                        average_attn_weights, is_causal):
        """Packed, unless something needs the padded form: the weights' own shape, or added keys."""
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise UnsupportedError("masks are not supported with nested tensors, whose lengths say what is "
                                   "padding. Call x.to_padded_tensor(0.0) and pass key_padding_mask too.")
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise ArgumentValueError("query, key and value must all be nested tensors, or none of them.")
        if not self.batch_first or query.dim() != 3:
            raise ArgumentValueError("nested tensors need batch_first=True and 3 dimensions, (batch, seqlen, "
                                     f"channels); batch_first={self.batch_first}, {query.dim()} dimensions.")
        inputs = {id(x): x for x in (query, key, value)}        # one entry where they are the same tensor
        lengths = {name: [len(row) for row in x.unbind()] for name, x in inputs.items()}
        lengths_q, lengths_k = lengths[id(query)], lengths[id(key)]
        if need_weights or self.bias_k is not None or self.add_zero_attn:
            padded = {name: torch.nested.to_padded_tensor(x, 0.0) for name, x in inputs.items()}
            query_rows, key_rows = (_rows_of(each, query.device) for each in (lengths_q, lengths_k))
            out, weights = self.forward(padded[id(query)], padded[id(key)], padded[id(value)], ~key_rows,
                                        need_weights, None, average_attn_weights)
            if weights is not None:
                weights = weights * (query_rows if average_attn_weights else query_rows[:, None])[..., None]
            return _nested_like(query, out[query_rows], lengths_q), weights
        packed = {name: torch.cat(x.unbind()) for name, x in inputs.items()}
        given = self._project(packed[id(query)], packed[id(key)], packed[id(value)])
        cu_seqlens = [torch.tensor([0, *each], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                      .to(query.device) for each in (lengths_q, lengths_k)]
        longest = max(lengths_q), max(lengths_k)
        if len(given) == 1:
            cu_seqlens, longest = cu_seqlens[:1], longest[:1]
        out = _VARLEN[len(given)](*given, *cu_seqlens, *longest, self.dropout if self.training else 0.0)
        out = F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)
        return _nested_like(query, out, lengths_q), None


def _attend(given, dropout_p, need_weights, masks):
    """(out (b, sq, h, d), weights (b, h, sq, sk) or None)"""
    if need_weights:
        q, k, v = (x.transpose(1, 2) for x in _unpack(given))
        weights = F.dropout(_attention_weights(q, k, **masks), dropout_p)
        return (weights @ v).transpose(1, 2), weights
    if dropout_p == 1:
        return _everything_dropped(*_unpack(given)), None
    return _DENSE[len(given)](*given, dropout_p, **masks), None


def _attention_weights(q, k, attn_mask=None, attn_bias=None):
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)            # (b, h, sq, sk)
    if attn_bias is not None:
        scores = scores + attn_bias.to(scores.dtype)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if attn_bias is None and attn_mask is None:
        return scores.softmax(-1)
    empty = scores.isneginf().all(-1, keepdim=True)                 # such a row becomes 0, also in backward
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _everything_dropped(q, k, v):
    """dropout = 1, which the kernels do not take: 0, with gradients of 0."""
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    q, k, v = (x.masked_fill(everywhere, 0) for x in (q, k, v))
    return q + (k + v).sum(1, keepdim=True)


def _check_mask(name, mask, shapes, device):
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor; it is a {type(mask).__name__}.")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ArgumentTypeError(f"{name} must have dtype torch.bool (True: hidden) or a float dtype (added "
                                f"to the scores); it has {mask.dtype}. Convert it: {name}.bool().")
    if mask.shape not in shapes:
        raise ArgumentValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; "
                                 f"it has {tuple(mask.shape)}.")
    if mask.device != device:
        raise ArgumentValueError(f"{name} must be on {device}, as query; it is on {mask.device}. "
                                 f"Move it: {name}.to(query.device).")


def _combined(key_padding_mask, attn_mask, dtype):
    """{"attn_mask": visible, "attn_bias": added} of both masks, (b, 1, 1, sk) and (1 or b, 1 or h, sq, sk).
    Together they are not expanded: what is hidden goes one way, or one of them each way."""
    padding, mask = _hiding_if_plain(key_padding_mask), attn_mask
    if padding is None:
        return {} if mask is None else _as_keyword(mask)
    if mask is None:
        if padding.is_cuda and padding.dtype is not torch.bool and padding.shape[-1] >= _LONG:
            return {"attn_bias": padding, "attn_mask": padding != -torch.inf}
        return _as_keyword(padding)
    if padding.dtype is not torch.bool and mask.dtype is not torch.bool:
        return {"attn_bias": padding + mask}
    if padding.dtype is mask.dtype:
        if mask.shape[0] == padding.shape[0]:
            return _as_keyword(mask | padding)
        mask = mask.new_zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)
    return {**_as_keyword(padding), **_as_keyword(mask)}


def _as_keyword(mask):
    return {"attn_mask": ~mask} if mask.dtype is torch.bool else {"attn_bias": mask}


def _hiding_if_plain(mask):
    """A float mask of 0 and -inf, as torch's TransformerEncoder makes of every bool one, as a bool mask, with
    which kernels skip what is hidden. Its values are looked at on the CPU only: a GPU would have to be waited
    for, and gets both masks instead where that is faster."""
    if mask is None or mask.dtype is torch.bool or mask.is_cuda or mask.requires_grad:
        return mask
    hidden = mask.isneginf()
    return hidden if (hidden | (mask == 0)).all() else mask


def _rows_of(lengths, device):
    """(b, longest), True where the sequence has a row."""
    lengths = torch.tensor(lengths, device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]


def _nested_like(x, packed, lengths):
    """Packed rows as a nested tensor of x's layout; of a jagged one with x's own offsets, so that the two can
    be added."""
    if x.layout is torch.jagged:
        return torch.nested.nested_tensor_from_jagged(packed, x.offsets())
    return torch.nested.as_nested_tensor(list(packed.split(lengths)))


# -------------------------------------------------------------------------------------------------- replacing


class Replacement:
    """What `replace` did: `swapped`, the names of the modules that now run on our kernels, and `left`, {name:
    reason} of the other attention modules."""

    def __init__(self, swapped, left):
        self.swapped, self.left = list(swapped), left
        self._modules = dict(swapped)

    def undo(self):
        """Makes the swapped modules torch's again, all or none of them."""
        changed = [name for name, module in self._modules.items() if type(module) is not MultiheadAttention]
        if changed:
            raise ArgumentValueError(f"nothing is undone, as other code has changed the class of {changed}; "
                                     f"undo that first (remove parametrizations, for example).")
        for module in self._modules.values():
            module.__class__ = torch.nn.MultiheadAttention
        self._modules = {}

    def __repr__(self):
        lines = [f"{len(self.swapped)} of {len(self.swapped) + len(self.left)} attention modules swapped"]
        lines += [f"  swapped  {name or '(the model)'}" for name in self.swapped]
        lines += [f"  left     {name or '(the model)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace(model):
    """Makes every torch.nn.MultiheadAttention inside `model` a flash_attn.nn.MultiheadAttention, in place.

    The modules stay the objects they are and only their class changes, so parameters, their names, the
    optimizer, training mode and every other reference to a module stay valid. Modules whose behaviour would
    change are left as they are: subclasses, and those with hooks, parametrizations or a replaced forward;
    and those that our kernels do not serve. All is decided before anything is changed.

    torch.nn.TransformerEncoder and TransformerDecoder work like any model. One thing to know: in eval mode
    without gradients torch.nn.TransformerEncoderLayer with batch_first=True runs a fused inference path of
    torch's that reads the parameters and calls no attention module, replaced or not;
    torch.backends.mha.set_fastpath_enabled(False) turns it off.

    Returns a Replacement: print it to see what was swapped, and what was left and why; its undo() restores
    torch's modules.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module; it is a {type(model).__name__}.")
    swapped, left = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            reason = _reason_to_leave(module)
            if reason is None:
                swapped[name] = module
            else:
                left[name] = reason
        elif getattr(module, "original_name", None) == "MultiheadAttention":
            left[name] = "compiled by torch.jit"
    for module in swapped.values():
        module.__class__ = MultiheadAttention
    return Replacement(swapped, left)


def _reason_to_leave(module):
    """Why a module cannot be swapped without a change in what it does, or None."""
    if type(module) is MultiheadAttention:
        return "is a flash_attn.nn.MultiheadAttention already"
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        return "has parametrizations"
    if type(module) is not torch.nn.MultiheadAttention:
        return f"is a subclass, {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in vars(module):
        return "has a forward of its own, set on the instance"
    if any(getattr(part, hooks) for part in (module, module.out_proj) for hooks in _HOOKS):
        return "has hooks"
    if module.head_dim > 256:
        return f"has a head dimension of {module.head_dim}; the kernels' limit is 256"
    parameter = module.out_proj.weight
    if parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"has parameters of {parameter.dtype}; the kernels take float16, bfloat16 and float32"
    if parameter.device.type not in ("cpu", "cuda", "meta"):
        return f"is on {parameter.device}; the kernels run on cpu and cuda"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
