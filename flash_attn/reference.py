"""Exact attention as it is defined, in plain PyTorch: what the kernels compute, written to be read.

    s_ij  = scale * (q_i . k_j)                           then softcap * tanh(s_ij / softcap)   if softcap > 0
    s_ij -= slope_h * |i + sk - sq - j|                   if alibi_slopes
    s_ij += bias_ij                                       if attn_bias; -inf hides j from i
    j is visible to i  <=>  i + sk - sq - left <= j <= i + sk - sq + right      (causal: right = 0)
                            and mask_ij                   if attn_mask
    lse_i = log sum_{visible j} exp(s_ij)
    o_i   = sum_{visible j} Z_ij exp(s_ij - lse_i) v_j

It holds the whole sq x sk matrix, works in the dtype of its inputs and is differentiable by autograd, so in
float64 it is the oracle of the tests, and in half precision it is what they allow the kernels' rounding to
cost. A query that sees no key has o = 0, lse = -inf and zero gradients. Z is the dropout mask, 0 or 1 /
P(kept).
"""

import torch

_UINT32 = 0xFFFFFFFF


def attention(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
              alibi_slopes=None, *, seqused_k=None, rng_state=None, attn_bias=None, attn_mask=None):
    """q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv)  ->  out (b, sq, h, dv), lse (b, h, sq).

    attn_bias and attn_mask broadcast to (b, h, sq, sk); a float attn_mask is a bias."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_bias, attn_mask = attn_mask, None
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, rng_state)
    if seqused_k is None or q.shape[0] == 0:
        return _attend(q, k, v, 0, *options, attn_bias, attn_mask)
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    bias, mask = (None if x is None else x.expand(shape) for x in (attn_bias, attn_mask))
    each = [_attend(q[b:b + 1], k[b:b + 1, :used], v[b:b + 1, :used], b, *options,
                    *(None if x is None else x[b:b + 1, ..., :used] for x in (bias, mask)))
            for b, used in enumerate(seqused_k.tolist())]
    return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p=0.0, softmax_scale=None, causal=False,
                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, *, seqused_k=None, rng_state=None):
    """q (total_q, h, d), k (total_k, hk, d), v (total_k, hk, dv)  ->  out (total_q, h, dv), lse (h, total_q).

    Sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1], or its first seqused_k[b] keys. Rows that belong
    to no sequence get out = 0 and lse = -inf."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, rng_state)
    each = [_attend(q[None, rows], k[None, keys], v[None, keys], b, *options)
            for b, (rows, keys) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k, seqused_k))]
    beyond, h = q.shape[0] - int(cu_seqlens_q[-1]), q.shape[1]
    out_beyond = q.new_zeros(beyond, h, v.shape[2])
    lse_beyond = q.new_full((h, beyond), -torch.inf, dtype=_lse_dtype(q.dtype))
    return (torch.cat([*(out[0] for out, _ in each), out_beyond]),
            torch.cat([*(lse[0] for _, lse in each), lse_beyond], dim=1))


def sequences(cu_seqlens_q, cu_seqlens_k, seqused_k=None):
    """Slices (query rows, key rows) of each packed sequence."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        end_k = starts_k[b + 1] if seqused_k is None else starts_k[b] + int(seqused_k[b])
        yield slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], end_k)


def _attend(q, k, v, first_sequence, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            rng_state, bias=None, mask=None):
    """Sequences first_sequence, first_sequence + 1, ... of the batch, all of one length."""
    p, lse = probabilities(q, k, softmax_scale, causal, window_size, softcap,
                           _slopes_of(alibi_slopes, first_sequence, q.shape[0]), bias, mask)
    if dropout_p > 0:
        p = p * dropout_mask(rng_state, dropout_p, p.shape, first_sequence).to(p.dtype)
    return torch.einsum("bhij,bjhc->bihc", p, _per_query_head(v, q.shape[2])), lse


def probabilities(q, k, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                  alibi_slopes=None, attn_bias=None, attn_mask=None):
    """exp(s_ij - lse_i), 0 where j is hidden from i, as (b, h, sq, sk); and lse (b, h, sq)."""
    sq, sk, d = q.shape[1], k.shape[1], q.shape[3]
    scale = d ** -0.5 if softmax_scale is None else softmax_scale
    s = scale * torch.einsum("bihc,bjhc->bhij", q, _per_query_head(k, q.shape[2]))
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        distance = _distance(sq, sk, q.device).abs().to(s.dtype)
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * distance
    if attn_bias is not None:
        s = s + attn_bias.to(s.dtype)

    hidden = ~visible(sq, sk, causal, window_size, q.device) | s.isneginf()
    if attn_mask is not None:
        hidden = hidden | ~attn_mask
    empty = hidden.all(-1, keepdim=True)                    # such a row of s becomes 0, a finite stand-in
    s = s.masked_fill(hidden, -torch.inf).masked_fill(empty, 0)
    lse = torch.logsumexp(s.to(_lse_dtype(s.dtype)), -1).masked_fill(empty[..., 0], -torch.inf)
    return torch.softmax(s, -1).masked_fill(empty, 0), lse


def visible(sq, sk, causal=False, window_size=(-1, -1), device=None):
    """Which key j (column) a query i (row) sees. Queries are aligned with the last keys; bounds are
    inclusive."""
    left, right = (-1, -1) if window_size is None else (-1 if w is None else int(w) for w in window_size)
    if causal:
        right = 0
    ahead = _distance(sq, sk, device)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _distance(sq, sk, device):
    """j - (i + sk - sq): how far key j lies ahead of query i."""
    i, j = torch.arange(sq, device=device)[:, None], torch.arange(sk, device=device)
    return j - (i + sk - sq)


def _per_query_head(x, h):
    """Query head i uses key/value head i // (h / hk)."""
    return x.repeat_interleave(h // x.shape[2], dim=2)


def _slopes_of(alibi_slopes, first_sequence, b):
    if alibi_slopes is None or alibi_slopes.dim() == 1:
        return alibi_slopes
    return alibi_slopes[first_sequence:first_sequence + b]


def _lse_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


# Dropout: Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call
# gives the bytes of 16 elements, rows {i, i+1, i+8, i+9} x columns {j, j+1, j+8, j+9} of a 16 x 16 piece of
# S, so that a GPU lane finds the bytes of its matrix fragment in few calls. csrc/common/philox.h is the same
# function in C.


def keep256(dropout_p):
    """How many of the 256 values of a random byte keep an element: p acts in steps of 1/256."""
    return min(max(int(256 * (1 - dropout_p) + 0.5), 1), 256)


def dropout_mask(rng_state, dropout_p, shape, first_sequence=0):
    """Z for `shape` = (b, h, sq, sk), float64: 0 where dropped, 256 / keep256 where kept (the mean is exactly
    1)."""
    b, h, sq, sk = shape
    seed, offset = rng_state.tolist()
    device = rng_state.device
    head = first_sequence * h + torch.arange(b * h, device=device).view(b, h, 1, 1)
    i, j = torch.arange(sq, device=device).view(sq, 1), torch.arange(sk, device=device).view(1, sk)
    kept = keep256(dropout_p)
    return (_random_byte(seed, offset, head, i, j) < kept).double() * (256 / kept)


def _random_byte(seed, offset, head, i, j):
    group = 4 * (i // 2 % 4) + j // 2 % 4
    counter = [j // 16 * 16 + group, i // 16, head + (offset >> 32), torch.full_like(head, offset & _UINT32)]
    words = torch.stack(torch.broadcast_tensors(*_philox(seed, [c & _UINT32 for c in counter])))
    word = torch.gather(words, 0, (2 * (i % 2) + j % 2).expand(words.shape[1:])[None])[0]
    return word >> 8 * (2 * (i // 8 % 2) + j // 8 % 2) & 255


def _philox(seed, counter):
    """Seven rounds of Philox-4x32; 32-bit words are held in int64."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _UINT32, seed >> 32 & _UINT32
    for _ in range(7):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & _UINT32, key1 + 0xBB67AE85 & _UINT32
    return c0, c1, c2, c3


def _multiply(a, b):
    """High and low 32 bits of a 64-bit product. In two steps of 16 bits of b, as int64 has one bit too
    few."""
    upper = a * (b >> 16)
    lower = a * (b & 0xFFFF) + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (lower >> 32), lower & _UINT32
