"""Bad input: each error names the argument and its value, is a RuntimeError too, and nothing is written."""

import math
import sys

import numpy as np
import pytest
import torch

import flash_attn
from flash_attn import (ArgumentTypeError, ArgumentValueError, UnsupportedError, flash_attn_func,
                        flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func,
                        flash_attn_varlen_qkvpacked_func)


def tensors(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def dense(**options):
    return lambda: flash_attn_func(*tensors((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)), **options)


def shapes(q=(2, 5, 4, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 8)):
    return lambda: flash_attn_func(*tensors(q, k, v))


def varlen(cu_q=(0, 3, 5), cu_k=(0, 4, 7), max_q=3, max_k=4, **options):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) if isinstance(x, tuple) else x for x in (cu_q, cu_k))
    return lambda: flash_attn_varlen_func(*tensors((5, 4, 8), (7, 2, 8), (7, 2, 8)), cu_q, cu_k, max_q, max_k,
                                          **options)


def function(f, *args):
    return lambda: f(*args)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


Q = torch.zeros(2, 5, 4, 8)

WRONG_TYPE = {
    "list": (function(flash_attn_func, [1.0], Q, Q), "q", "list"),
    "numpy": (function(flash_attn_func, Q, np.zeros((2, 5, 4, 8)), Q), "k", "ndarray"),
    "none": (function(flash_attn_func, Q, Q, None), "v", "NoneType"),
    "integers": (function(flash_attn_func, *[Q.int()] * 3), "q", "int32", "float16"),
    "complex": (function(flash_attn_func, *[Q.to(torch.complex64)] * 3), "q", "complex64"),
    "mixed k": (function(flash_attn_func, Q, Q.half(), Q), "k", "float16", "float32"),
    "mixed v": (function(flash_attn_func, Q.half(), Q.half(), Q.bfloat16()), "v", "bfloat16", "float16"),
    "mixed kv": (function(flash_attn_kvpacked_func, Q, torch.zeros(2, 5, 2, 4, 8).half()), "kv", "float16"),
    "cu_seqlens int64": (varlen(cu_q=torch.tensor([0, 3, 5])), "cu_seqlens_q", "int64", "int32"),
    "cu_seqlens float": (varlen(cu_k=torch.tensor([0.0, 4, 7])), "cu_seqlens_k", "float32", "int32"),
    "cu_seqlens list": (varlen(cu_q=[0, 3, 5]), "cu_seqlens_q", "list"),
    "cu_seqlens none": (varlen(cu_q=None, cu_k=None), "cu_seqlens_q", "NoneType"),
    "max_seqlen float": (varlen(max_q=3.0), "max_seqlen_q", "3.0"),
    "max_seqlen none": (varlen(max_k=None), "max_seqlen_k", "None"),
    "max_seqlen float tensor": (varlen(max_q=torch.tensor(3.0)), "max_seqlen_q"),
    "window float": (dense(window_size=(1.5, 0)), "window_size[0]", "1.5"),
    "alibi bfloat16": (dense(alibi_slopes=torch.ones(4).bfloat16()), "alibi_slopes", "bfloat16", "float32"),
    "alibi list": (dense(alibi_slopes=[1.0] * 4), "alibi_slopes", "list"),
    "bias list": (dense(attn_bias=[0.0] * 7), "attn_bias", "list"),
    "bias bool": (dense(attn_bias=torch.ones(7) > 0), "attn_bias", "bool", "attn_mask"),
    "bias int": (dense(attn_bias=torch.ones(7).int()), "attn_bias", "int32", "float16"),
    "mask list": (dense(attn_mask=[True] * 7), "attn_mask", "list"),
    "mask uint8": (dense(attn_mask=torch.ones(7).byte()), "attn_mask", "uint8", "bool"),
    "mask int": (dense(attn_mask=torch.ones(7).long()), "attn_mask", "int64", "bool"),
    "mask complex": (dense(attn_mask=torch.ones(7) * 1j), "attn_mask", "complex64"),
    "seqused_k int64": (dense(seqused_k=torch.tensor([1, 2])), "seqused_k", "int64", "int32"),
    "rng_state int32": (dense(dropout_p=0.1, rng_state=int32(1, 2)), "rng_state", "int32", "int64"),
    "scale text": (dense(softmax_scale="big"), "scale", "big"),
    "softcap text": (dense(softcap="big"), "softcap", "big"),
    "dropout text": (dense(dropout_p="big"), "dropout_p", "big"),
    "dropout none": (dense(dropout_p=None), "dropout_p", "None"),
}

WRONG_VALUE = {
    "rank 3": (shapes(q=(5, 4, 8)), "q", "(batch, seqlen_q, nheads, headdim)", "(5, 4, 8)"),
    "rank 5": (shapes(v=(2, 7, 1, 2, 8)), "v", "(2, 7, 1, 2, 8)"),
    "rank 0": (shapes(k=()), "k", "()"),
    "varlen rank 4": (function(flash_attn_varlen_func, Q, Q, Q, int32(0, 5), int32(0, 5), 5, 5), "q",
                      "(total_q, nheads, headdim)"),
    "batch": (shapes(k=(3, 7, 2, 8), v=(3, 7, 2, 8)), "k", "batch", "3", "2"),
    "headdim": (shapes(k=(2, 7, 2, 16), v=(2, 7, 2, 16)), "k", "headdim", "16", "8"),
    "length of v": (shapes(v=(2, 6, 2, 8)), "v", "(2, 6, 2, 8)"),
    "heads of v": (shapes(v=(2, 7, 4, 8)), "v", "(2, 7, 4, 8)"),
    "head ratio": (shapes(k=(2, 7, 3, 8), v=(2, 7, 3, 8)), "heads", "4", "3"),
    "more key heads": (shapes(k=(2, 7, 8, 8), v=(2, 7, 8, 8)), "heads", "4", "8"),
    "no channels": (shapes(q=(2, 5, 4, 0), k=(2, 7, 2, 0)), "head dimension", "0"),
    "no value channels": (shapes(v=(2, 7, 2, 0)), "head dimension", "0"),
    "no heads": (shapes(q=(2, 5, 0, 8)), "heads", "0"),
    "no key heads": (shapes(k=(2, 7, 0, 8), v=(2, 7, 0, 8)), "heads", "0"),
    "packed 2 of 3": (function(flash_attn_qkvpacked_func, torch.zeros(2, 5, 2, 4, 8)),
                      "qkv", "3", "(2, 5, 2, 4, 8)"),
    "packed 3 of 2": (function(flash_attn_kvpacked_func, Q, torch.zeros(2, 5, 3, 4, 8)),
                      "kv", "(2, 5, 3, 4, 8)"),
    "packed varlen": (function(flash_attn_varlen_qkvpacked_func, torch.zeros(5, 4, 3, 8), int32(0, 5), 5),
                      "qkv", "(total, 3, nheads, headdim)"),
    "dropout 1": (dense(dropout_p=1.0), "dropout_p", "1"),
    "dropout negative": (dense(dropout_p=-0.1), "dropout_p", "-0.1"),
    "dropout nan": (dense(dropout_p=math.nan), "dropout_p", "nan"),
    "scale nan": (dense(softmax_scale=math.nan), "softmax_scale", "nan"),
    "scale inf": (dense(softmax_scale=math.inf), "softmax_scale", "inf"),
    "softcap negative": (dense(softcap=-1.0), "softcap", "-1"),
    "softcap nan": (dense(softcap=math.nan), "softcap", "nan"),
    "softcap inf": (dense(softcap=math.inf), "softcap", "inf"),
    "window of 1": (dense(window_size=(1,)), "window_size", "(1,)"),
    "window of 3": (dense(window_size=(1, 2, 3)), "window_size", "(1, 2, 3)"),
    "window int": (dense(window_size=128), "window_size", "128"),
    "alibi shape": (dense(alibi_slopes=torch.ones(3)), "alibi_slopes", "(3,)", "(4,)"),
    "alibi batch": (dense(alibi_slopes=torch.ones(3, 4)), "alibi_slopes", "(3, 4)", "(2, 4)"),
    "bias keys": (dense(attn_bias=torch.ones(5, 6)), "attn_bias", "(2, 4, 5, 7)", "(5, 6)"),
    "bias queries": (dense(attn_bias=torch.ones(7, 7)), "attn_bias", "(2, 4, 5, 7)", "(7, 7)"),
    "bias heads": (dense(attn_bias=torch.ones(2, 5, 7)), "attn_bias", "(2, 5, 7)"),
    "bias batch": (dense(attn_bias=torch.ones(3, 1, 5, 7)), "attn_bias", "(3, 1, 5, 7)"),
    "bias rank 5": (dense(attn_bias=torch.ones(1, 1, 1, 5, 7)), "attn_bias", "(1, 1, 1, 5, 7)"),
    "bias empty": (dense(attn_bias=torch.ones(0)), "attn_bias", "(0,)"),
    "bias of a batch of 0": (dense(attn_bias=torch.ones(0, 4, 5, 7)), "attn_bias", "(0, 4, 5, 7)"),
    "bias device": (dense(attn_bias=torch.ones(7, device="meta")), "attn_bias", "meta", "cpu"),
    "mask keys": (dense(attn_mask=torch.ones(2, 1, 1, 5) > 0), "attn_mask", "(2, 1, 1, 5)", "(2, 4, 5, 7)"),
    "mask 2-d padding": (dense(attn_mask=torch.ones(2, 7) > 0), "attn_mask", "(2, 7)", "(2, 4, 5, 7)"),
    "mask device": (dense(attn_mask=torch.ones(7, device="meta") > 0), "attn_mask", "meta", "cpu"),
    "bias and float mask": (dense(attn_bias=torch.ones(7), attn_mask=torch.ones(7)), "attn_bias", "attn_mask", "sum"),
    "seqused_k shape": (dense(seqused_k=int32(1, 2, 3)), "seqused_k", "(3,)", "(2,)"),
    "seqused_k negative": (dense(seqused_k=int32(1, -1)), "seqused_k", "-1"),
    "seqused_k too large": (dense(seqused_k=int32(1, 8)), "seqused_k", "8", "7"),
    "rng_state shape": (dense(dropout_p=0.1, rng_state=torch.tensor([1, 2, 3])), "rng_state", "(3,)"),
    "cu_seqlens start": (varlen(cu_q=(1, 3, 5)), "cu_seqlens_q", "1"),
    "cu_seqlens decreasing": (varlen(cu_k=(0, 5, 4), max_k=5), "cu_seqlens_k", "4", "5"),
    "cu_seqlens negative": (varlen(cu_k=(0, -5, 4)), "cu_seqlens_k", "-5"),
    "cu_seqlens beyond": (varlen(cu_q=(0, 3, 6)), "cu_seqlens_q", "6", "5"),
    "cu_seqlens lengths": (varlen(cu_k=(0, 7)), "cu_seqlens_k", "(2,)", "(3,)"),
    "cu_seqlens empty": (varlen(cu_q=()), "cu_seqlens_q", "(0,)"),
    "cu_seqlens 2-d": (varlen(cu_q=int32(0, 3, 5)[None]), "cu_seqlens_q", "(1, 3)"),
    "cu_seqlens strided": (varlen(cu_q=int32(0, 9, 3, 9, 5, 9)[::2]), "cu_seqlens_q", "contiguous"),
    "max_seqlen_q short": (varlen(max_q=2), "max_seqlen_q", "2", "3"),
    "max_seqlen_k short": (varlen(max_k=3), "max_seqlen_k", "3", "4"),
    "max_seqlen negative": (varlen(max_q=-1), "-1"),
    "meta device": (function(flash_attn_func, *[Q.to("meta")] * 3), "q", "meta"),
}

UNSUPPORTED = {
    "block_table": (varlen(block_table=torch.zeros(2, 1, dtype=torch.int32)), "block_table"),
    "bias of packed": (varlen(attn_bias=torch.zeros(5, 7)), "attn_bias", "seqused_k", "flash_attn_func"),
    "mask of packed": (varlen(attn_mask=torch.ones(7) > 0), "attn_mask", "seqused_k", "flash_attn_func"),
    "slopes with gradient": (dense(alibi_slopes=torch.ones(4, requires_grad=True)), "alibi_slopes", "detach"),
}


def check(call, kind, parts):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, RuntimeError)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is missing in: {caught.value}"


@pytest.mark.parametrize("case", WRONG_TYPE)
def test_wrong_type(case):
    call, *parts = WRONG_TYPE[case]
    check(call, ArgumentTypeError, parts)


@pytest.mark.parametrize("case", WRONG_VALUE)
def test_wrong_value(case):
    call, *parts = WRONG_VALUE[case]
    check(call, ArgumentValueError if case != "meta device" else UnsupportedError, parts)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case):
    call, *parts = UNSUPPORTED[case]
    check(call, UnsupportedError, parts)


def test_kinds_of_errors():
    assert issubclass(ArgumentTypeError, TypeError) and issubclass(ArgumentTypeError, RuntimeError)
    assert issubclass(ArgumentValueError, ValueError) and issubclass(ArgumentValueError, RuntimeError)
    assert issubclass(UnsupportedError, ValueError) and issubclass(UnsupportedError, NotImplementedError)


def test_head_dimension_beyond_every_kernel_is_refused_or_served():
    """A legal call without a kernel says so; it never crashes."""
    q = torch.randn(1, 3, 1, 300)
    try:
        out = flash_attn_func(q, q, q)
    except UnsupportedError as error:
        assert "256" in str(error)
    else:
        expected = flash_attn.reference.attention(q, q, q)[0]
        torch.testing.assert_close(out, expected)


def test_a_refused_call_draws_no_random_numbers():
    before = torch.get_rng_state()
    for p in 1.0, -0.5, math.nan:
        with pytest.raises(ArgumentValueError):
            flash_attn_func(Q, Q, Q, p)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("window", [(sys.maxsize, sys.maxsize), (2 ** 70, -1), (-5, None),
                                    (-2 ** 70, 2 ** 40), torch.tensor([-1, 2 ** 40]), [None, None], None],
                         ids=str)
def test_unlimited_windows(window):
    """Whatever callers write for "no bound" is one."""
    q = torch.randn(1, 9, 2, 8)
    assert torch.equal(flash_attn_func(q, q, q, window_size=window), flash_attn_func(q, q, q))
