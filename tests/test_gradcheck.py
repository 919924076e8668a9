"""Gradients against finite differences: torch.autograd.gradcheck on every feature, in float64 on the CPU."""

import pytest
import torch
from torch.autograd import gradcheck

import flash_attn
from problem import Problem

FEATURES = [
    dict(), dict(causal=True), dict(sq=7, sk=4, causal=True), dict(window=(2, 1)), dict(softcap=1.5),
    dict(scale=-0.7), dict(scale=0.0), dict(alibi="head"), dict(alibi="batch", causal=True),
    dict(dropout_p=0.3), dict(h=4, hk=2),
    dict(h=4, hk=1, dv=5), dict(d=1, dv=1), dict(seqused_k=(3, 0)),
    dict(seqlens_q=(3, 0, 2), seqlens_k=(2, 4, 0), tail=2),
    dict(seqlens_q=(3, 2), seqlens_k=(2, 4), seqused_k=(1, 4)),
    dict(h=4, hk=2, causal=True, window=(3, 0), softcap=2.0, alibi="head", dropout_p=0.2),
    dict(bias="bhqk"), dict(bias="hqk", bias_hides=True), dict(bias="bk", causal=True), dict(bias="hq", softcap=1.5),
    dict(bias="", dropout_p=0.3), dict(mask="qk"), dict(mask="bk", bias="qk", h=4, hk=2, seqused_k=(3, 5)),
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_out_and_lse(features):
    problem = Problem(torch.float64, **{**dict(b=2, sq=4, sk=5, h=2, d=3), **features})
    inputs = [x.nan_to_num().requires_grad_() for x in problem.inputs()[:3]]
    if problem.bias is not None:
        inputs.append(problem.options()["attn_bias"].nan_to_num(neginf=-torch.inf).requires_grad_())

    def attention(q, k, v, *bias):
        out, lse, _ = problem.call(q, k, v, **({"attn_bias": bias[0]} if bias else {}))
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert gradcheck(attention, inputs)


@pytest.mark.parametrize("function, shapes", [
    (flash_attn.flash_attn_qkvpacked_func, [(2, 5, 3, 2, 3)]),
    (flash_attn.flash_attn_kvpacked_func, [(2, 4, 2, 3), (2, 5, 2, 1, 3)])], ids=["qkv", "kv"])
def test_packed(function, shapes):
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert gradcheck(lambda *tensors: function(*tensors, causal=True), given)


def test_second_derivatives_are_refused():
    q = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(flash_attn.UnsupportedError, match="create_graph=True"):
        torch.autograd.grad(flash_attn.flash_attn_func(q, q, q).sum(), q, create_graph=True)
