"""One attention problem, described by its sizes and options, and its judgement: ours against the reference.

`Problem(...).check(device)` makes inputs, runs forward and backward through the public functions, and holds
out, lse and all gradients to the bound of bounds.py. Rows outside the data (beyond cu_seqlens or seqused_k)
hold NaN.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

import bounds
import flash_attn
from flash_attn import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor


class Results(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dbias: torch.Tensor = torch.empty(0)


@dataclass(frozen=True)
class Problem:
    """Dense with b, sq, sk; packed with seqlens_q, seqlens_k, then `tail` unused rows follow the
    sequences."""

    dtype: torch.dtype = torch.float32
    b: int = 2
    sq: int = 64
    sk: int = 64
    h: int = 2
    hk: Optional[int] = None            # h
    d: int = 32
    dv: Optional[int] = None            # d
    causal: bool = False
    window: tuple = (-1, -1)
    softcap: float = 0.0
    scale: Optional[float] = None
    alibi: Optional[str] = None         # "head": (h,) slopes, "batch": (b, h)
    bias: Optional[str] = None          # the indices, of "bhqk", that it varies along: "hk" is (1, h, 1, sk)
    bias_dtype: Optional[torch.dtype] = None    # dtype
    bias_hides: bool = False            # holds -inf too
    mask: Optional[str] = None          # as bias
    dropout_p: float = 0.0
    seqlens_q: Optional[tuple] = None
    seqlens_k: Optional[tuple] = None
    seqused_k: Optional[tuple] = None
    tail: int = 0
    extra_max_seqlen: int = 0           # how far the stated max_seqlen exceeds the longest sequence
    seed: int = 0

    @property
    def packed(self):
        return self.seqlens_q is not None

    @property
    def batch(self):
        return len(self.seqlens_q) if self.packed else self.b

    def cu_seqlens(self):
        return tuple(torch.tensor([0, *lengths]).cumsum(0).int() for lengths in self._seqlens())

    def _seqlens(self):
        return self.seqlens_q, self.seqlens_k

    def options(self):
        """Keywords that the public functions and the reference share."""
        generator = torch.Generator().manual_seed(self.seed)
        slopes = {None: None, "head": (self.h,), "batch": (self.batch, self.h)}[self.alibi]
        return dict(
            dropout_p=self.dropout_p, softmax_scale=self.scale, causal=self.causal, window_size=self.window,
            softcap=self.softcap,
            alibi_slopes=None if slopes is None else torch.rand(slopes, generator=generator),
            seqused_k=None if self.seqused_k is None else torch.tensor(self.seqused_k, dtype=torch.int32),
            rng_state=torch.randint(-2 ** 62, 2 ** 62, (2,), generator=generator) if self.dropout_p else None,
            **self._dense_options())

    def _dense_options(self):
        """attn_bias and attn_mask, where there are any: normal random values, and what `_seen` draws."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        options = {}
        if self.bias is not None:
            bias = torch.randn(self._score_shape(self.bias), generator=generator)
            if self.bias_hides:
                bias[~self._seen(self.bias, generator)] = -torch.inf
            for b, used in enumerate(self.seqused_k or ()):         # outside the data
                if "k" in self.bias and ("b" in self.bias or used == max(self.seqused_k)):
                    bias[b if "b" in self.bias else 0, ..., used:] = torch.nan
            options["attn_bias"] = bias.to(self.bias_dtype or self.dtype)
        if self.mask is not None:
            options["attn_mask"] = self._seen(self.mask, generator)
        return options

    def _score_shape(self, indices):
        sizes = dict(b=self.b, h=self.h, q=self.sq, k=self.sk)
        return [n if index in indices else 1 for index, n in sizes.items()]

    def _seen(self, indices, generator):
        """Most elements, but none of a stretch of keys: whole tiles are hidden, and some rows see nothing."""
        shape = self._score_shape(indices)
        seen = torch.rand(shape, generator=generator) < 0.8
        if "k" in indices:
            first, last = torch.randint(self.sk + 1, (2,), generator=generator).sort().values
            seen[..., first:last] = False
        if "q" in indices and self.sq:
            seen[:, :, torch.randint(self.sq, (1 + self.sq // 20,), generator=generator)] = False
        return seen

    def inputs(self):
        """Normal random values; NaN outside the data."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        h, hk, d, dv = self.h, self.hk or self.h, self.d, self.dv or self.d
        if self.packed:
            queries, keys = ((sum(lengths) + self.tail,) for lengths in self._seqlens())
        else:
            queries, keys = (self.b, self.sq), (self.b, self.sk)
        q, k, v, dout = (torch.randn(shape, generator=generator).to(self.dtype) for shape in (
            (*queries, h, d), (*keys, hk, d), (*keys, hk, dv), (*queries, h, dv)))
        lse_dtype = torch.promote_types(self.dtype, torch.float32)
        dlse = torch.randn(*queries[:-1], h, queries[-1], generator=generator).to(lse_dtype)
        inputs = Inputs(q, k, v, dout, dlse)
        self._poison_outside(inputs)
        return inputs

    def _poison_outside(self, inputs):
        if self.packed:
            used_q, used_k = sum(self.seqlens_q), sum(self.seqlens_k)
            for x in inputs.q, inputs.dout:
                x[used_q:] = torch.nan
            for x in inputs.k, inputs.v:
                x[used_k:] = torch.nan
            inputs.dlse[:, used_q:] = torch.nan
        if self.seqused_k is not None:
            for b, used in enumerate(self.seqused_k):
                for x in inputs.k, inputs.v:
                    if self.packed:
                        start, end = sum(self.seqlens_k[:b]), sum(self.seqlens_k[:b + 1])
                        x[start + used:end] = torch.nan
                    else:
                        x[b, used:] = torch.nan

    def call(self, q, k, v, **overrides):
        """(out, lse, S_dmask) of the public function, on the device of q."""
        options = {**self.options(), "return_attn_probs": True, **overrides}
        options = {name: x.to(q.device) if isinstance(x, torch.Tensor) and name != "window_size" else x
                   for name, x in options.items()}
        if not self.packed:
            return flash_attn.flash_attn_func(q, k, v, **options)
        cu_seqlens_q, cu_seqlens_k = (x.to(q.device) for x in self.cu_seqlens())
        longest = (max(lengths, default=0) + self.extra_max_seqlen for lengths in self._seqlens())
        return flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, **options)

    def run(self, inputs=None, device="cpu", **overrides):
        """Our Results, on the CPU."""
        inputs = inputs or self.inputs()
        given = [x.to(device).detach().requires_grad_() for x in inputs[:3]]
        bias = overrides.get("attn_bias", self.options().get("attn_bias"))
        if bias is not None:
            given.append(bias.to(device).detach().requires_grad_())
            overrides = {**overrides, "attn_bias": given[3]}
        out, lse, _ = self.call(*given[:3], **overrides)
        incoming = inputs.dout.to(device), inputs.dlse.to(device)
        gradients = torch.autograd.grad((out, lse), given, incoming)
        return Results(*(x.detach().cpu() for x in (out, lse, *gradients)))

    def reference(self, inputs, dtype):
        """The Results of reference.py in `dtype`."""
        given, options = [x.to(dtype).detach().requires_grad_() for x in inputs[:3]], self.options()
        if self.bias is not None:
            bias = options["attn_bias"]
            given.append((bias.double() if dtype == torch.float64 else bias).requires_grad_())
            options["attn_bias"] = given[3]
        if self.packed:
            out, lse = reference.attention_varlen(*given[:3], *self.cu_seqlens(), **options)
        else:
            out, lse = reference.attention(*given[:3], **options)
        if not out.requires_grad:               # a batch without sequences: nothing depends on its inputs
            return Results(out, lse, *map(torch.zeros_like, given))
        incoming = inputs.dout.to(dtype), inputs.dlse.to(lse.dtype)
        gradients = torch.autograd.grad((out, lse), given, incoming)
        return Results(out.detach(), lse.detach(), *gradients)

    def magnitudes(self, inputs):
        """bounds.Magnitudes of the whole problem, 0 in rows outside the data."""
        total = bounds.Magnitudes(*(torch.zeros(x.shape, dtype=torch.float64) for x in (
            inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v)),
            torch.zeros(() if self.bias is None else self._score_shape(self.bias), dtype=torch.float64))
        for b, (rows, keys) in enumerate(self._sequences()):
            one = self._magnitudes_of(b, *(x.double() for x in (
                inputs.q[rows], inputs.k[keys], inputs.v[keys], inputs.dout[rows],
                inputs.dlse[self._lse_rows(rows)])))
            total.out[rows], total.dq[rows] = one.out[0], one.dq[0]
            total.dk[keys], total.dv[keys] = one.dk[0], one.dv[0]
            total.lse[self._lse_rows(rows)] = one.lse[0]
            if self.bias is not None:
                shared = [n for n, index in enumerate("bhqk") if index not in self.bias]
                of_bias = one.dbias.sum(shared, keepdim=True) if shared else one.dbias
                total.dbias[b if "b" in self.bias else 0, ..., :of_bias.shape[-1]] += of_bias[0]
        return total

    def _magnitudes_of(self, b, q, k, v, dout, dlse):
        options = self.options()
        q, k, v, dout, dlse = (x[None] for x in (q, k, v, dout, dlse))
        slopes = options["alibi_slopes"]
        slopes = slopes[b] if self.alibi == "batch" else slopes
        scores = self._of_sequence(b, q.shape[1], k.shape[1], options)
        p, _ = reference.probabilities(q, k, self.scale, self.causal, self.window, self.softcap, slopes, *scores)
        z, bias = torch.ones_like(p), torch.zeros_like(p)
        if self.dropout_p > 0:
            z = reference.dropout_mask(options["rng_state"], self.dropout_p, p.shape, b)
        if slopes is not None:
            i, j = torch.arange(p.shape[2])[:, None], torch.arange(p.shape[3])
            bias = slopes.double()[:, None, None] * (i + p.shape[3] - p.shape[2] - j).abs()
        if scores[0] is not None:
            bias = bias + scores[0].abs()
        scale = self.d ** -0.5 if self.scale is None else self.scale
        return bounds.magnitudes(q, k, v, dout, dlse, p, z, scale, bias)

    def _of_sequence(self, b, sq, sk, options):
        """The bias, in float64, and the mask of one sequence of dense tensors."""
        bias, mask = (options.get(name) for name in ("attn_bias", "attn_mask"))
        bias = None if bias is None else bias.double()
        shape = self.b, self.h, sq, self.sk
        return [None if x is None else x.expand(shape)[b:b + 1, ..., :sk] for x in (bias, mask)]

    def _sequences(self):
        """Indices of the query rows and of the key rows of each sequence."""
        if self.packed:
            yield from reference.sequences(*self.cu_seqlens(), self.seqused_k)
            return
        for b in range(self.b):
            yield (b,), (b, slice(0, self.sk if self.seqused_k is None else self.seqused_k[b]))

    def _lse_rows(self, rows):
        return (slice(None), rows) if self.packed else rows

    def check(self, device="cpu", inputs=None, **overrides):
        """Forward and backward, values and all gradients, within the bound. Returns our Results."""
        inputs = inputs or self.inputs()
        ours = self.run(inputs, device, **overrides)
        self.judge(ours, inputs)
        return ours

    def judge(self, ours, inputs):
        plain = Inputs(*(x.cpu() for x in inputs))
        exact, composed = self.reference(plain, torch.float64), self.reference(plain, self.dtype)
        composed = composed._replace(dbias=composed.dbias.to(ours.dbias.dtype))
        magnitudes = self.magnitudes(plain)
        bounds.assert_lse_close(ours.lse, exact.lse, magnitudes.lse, self.dtype)
        for name in "out", "dq", "dk", "dv", "dbias":
            bounds.assert_close(name, *(getattr(x, name) for x in (ours, exact, composed)), magnitudes,
                                self.dtype if name == "dbias" else None)

    def __str__(self):
        """What differs from the default, for test ids."""
        default = Problem()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "default"
