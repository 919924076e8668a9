"""From a padded batch to packed sequences and back, by the names of flash-attn 2.8: what stands around
flash_attn_varlen_func in a model whose batches have padding.

    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
    packed = flash_attn_varlen_func(..., cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    x = pad_input(packed, indices, batch, seqlen)

The number of tokens is the size of a tensor, so the host has to know it: unpadding a batch on a GPU waits for
it once, and reads everything else that it needs then. Nothing else here waits.
"""

import torch
from torch.nn.functional import pad

from ._backend import ArgumentTypeError, ArgumentValueError


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """The tokens of a padded batch, packed one sequence after the other.

    Arguments:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or numbers; not 0 where there is a token to attend to. The
            tokens of a sequence may lie anywhere in its row.
        unused_mask: the same for tokens that are packed too, but not attended to.

    Returns:
        (hidden_states (nnz, ...), indices (nnz,), cu_seqlens (batch + 1,), max_seqlen, seqused (batch,)):
        indices, int64, are the tokens' rows in hidden_states.flatten(0, 1), and undo this with pad_input;
        cu_seqlens, int32, are where sequences start; max_seqlen, an int, is the longest one's length;
        seqused, int32, counts the tokens of attention_mask alone. Differentiable in hidden_states.
    """
    _check_rows("attention_mask", attention_mask, hidden_states)
    attended = kept = attention_mask != 0
    if unused_mask is not None:
        _check_rows("unused_mask", unused_mask, hidden_states)
        kept = attended | (unused_mask != 0)
    seqused = attended.sum(-1, dtype=torch.int32)
    seqlens = seqused if unused_mask is None else kept.sum(-1, dtype=torch.int32)
    cu_seqlens = _starts(seqlens)
    total, longest = _read(cu_seqlens[-1], _largest(seqlens))
    indices = _true_places(kept, total)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, seqused


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """unpad_input of rows that hold several sequences each.

    Arguments:
        hidden_states: (batch, seqlen, ...): the sequences of a row follow each other from its start.
        attention_mask_in_length: (batch, seqlen), integers: their lengths, in any columns; 0 elsewhere.
            [[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]] is a row of 2 + 3 tokens and one of 6.

    Returns (hidden_states (nnz, ...), indices (nnz,), cu_seqlens (sequences + 1,), max_seqlen), as in
    unpad_input.
    """
    lengths = attention_mask_in_length
    _check_rows("attention_mask_in_length", lengths, hidden_states)
    if lengths.is_floating_point() or lengths.dtype is torch.bool:
        raise ArgumentTypeError(f"attention_mask_in_length must hold integers; it has dtype {lengths.dtype}.")
    position = torch.arange(lengths.shape[1], device=lengths.device)
    kept = position < lengths.sum(-1, keepdim=True)
    total, sequences, longest = _read(kept.sum(), lengths.count_nonzero(), _largest(lengths))
    seqlens = lengths.flatten()[_true_places(lengths != 0, sequences)]
    indices = _true_places(kept, total)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(seqlens), longest


def pad_input(hidden_states, indices, batch, seqlen):
    """The padded batch (batch, seqlen, ...) of packed tokens (nnz, ...), 0 where there is none: undoes
    unpad_input. Differentiable in hidden_states."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


class IndexFirstAxis(torch.autograd.Function):
    """input[indices] along the first of two or more dimensions; an index may occur more than once."""

    @staticmethod
    def forward(ctx, input, indices):
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx, gradient):
        indices, = ctx.saved_tensors
        zeros = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return zeros.index_add(0, indices, gradient), None


class IndexPutFirstAxis(torch.autograd.Function):
    """Zeros of `first_axis_dim` rows in which row indices[i] is values[i]; indices are distinct."""

    @staticmethod
    def forward(ctx, values, indices, first_axis_dim):
        ctx.save_for_backward(indices)
        return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy_(0, indices, values)

    @staticmethod
    def backward(ctx, gradient):
        indices, = ctx.saved_tensors
        return gradient.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """(input[indices], input) for a residual connection: both gradients meet in one tensor."""

    @staticmethod
    def forward(ctx, input, indices):
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx, gradient, residual_gradient):
        indices, = ctx.saved_tensors
        return residual_gradient.index_add(0, indices, gradient), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def __getattr__(name):
    """`rearrange` and `repeat`, which other people's code imports from here, are einops' own; nothing here
    needs them."""
    if name in ("rearrange", "repeat"):
        try:
            import einops
        except ImportError as error:
            raise ImportError(f"{__name__}.{name} is einops.{name}: pip install einops") from error
        return getattr(einops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_rows(name, mask, hidden_states):
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        raise ArgumentValueError(f"{name} must have shape (batch, seqlen), {tuple(hidden_states.shape[:2])} "
                                 f"as hidden_states; it has {tuple(mask.shape)}.")


def _starts(seqlens):
    return pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))


def _largest(lengths):
    return lengths.max() if lengths.numel() else lengths.sum()


def _read(*scalars):
    """Their values on the host, with one wait for a GPU."""
    return torch.stack([x.long() for x in scalars]).tolist()


def _true_places(mask, count):
    """nonzero() of the flattened mask, whose number of trues is known, so that no GPU is waited for: place i
    is where the number of trues so far first reaches i + 1."""
    if not mask.is_cuda:
        return mask.flatten().nonzero().flatten()
    seen = mask.flatten().cumsum(0)
    return torch.searchsorted(seen, torch.arange(1, count + 1, device=mask.device))
