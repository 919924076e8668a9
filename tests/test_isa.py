"""Every instruction-set level that this CPU has, in one process: FLASH_ATTN_CPU_ISA is read at each call."""

import pytest
import torch

from flash_attn import _C
from problem import DTYPES, Problem
from test_forward import HARD

LEVELS = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]

PROBLEMS = [
    dict(sq=1, sk=1, d=1), dict(sq=129, sk=239, d=59), dict(sq=239, sk=129, causal=True, d=64),
    dict(d=111, dv=40), dict(sq=65, sk=127, d=256, dv=128), dict(h=6, hk=2, window=(20, 3), sq=100),
    dict(softcap=3.0, d=128, causal=True),
    dict(alibi="batch", h=4, hk=1, sq=33, sk=300), dict(dropout_p=0.3, d=80, causal=True, sq=70),
    dict(bias="hqk", mask="bqk", sq=111, sk=203, d=40, causal=True), dict(bias="bk", mask="k", sq=70, sk=401, bias_hides=True),
    dict(bias="hq", sq=35, sk=97, softcap=3.0, h=4, hk=2), dict(bias="", mask="h", bias_dtype=torch.float16),
    dict(seqlens_q=(3, 0, 113), seqlens_k=(59, 7, 100), tail=5, causal=True),
    dict(seqused_k=(1, 63), softcap=5.0, alibi="head", dropout_p=0.1, window=(50, 9)),
]


@pytest.fixture(params=LEVELS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_CPU_ISA", request.param)
    if f"CPU instruction set: {request.param}\n" not in _C.info():
        pytest.skip(f"this CPU lacks {request.param}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_level(isa, dtype, problem):
    Problem(dtype, **problem).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 16, 24, 31, 33, 40, 48, 63, 96, 192, 255])
def test_head_dims(isa, dtype, d):
    Problem(dtype, sq=37, sk=53, d=d, h=1).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("harden", HARD, ids=lambda f: f.__name__)
def test_hard_inputs(isa, dtype, harden):
    problem = Problem(dtype, sq=77, sk=97, d=40, causal=True)
    inputs = problem.inputs()
    harden(*inputs[:3])
    problem.check(inputs=inputs)


def test_levels_drop_the_same(isa, monkeypatch):
    """The mask does not depend on the level: with equal scores, out is Z averaged."""
    problem = Problem(sq=40, sk=100, dropout_p=0.5, scale=0.0)
    inputs = problem.inputs()
    ours = problem.run(inputs)
    monkeypatch.setenv("FLASH_ATTN_CPU_ISA", "generic")
    torch.testing.assert_close(ours.out, problem.run(inputs).out, rtol=1e-5, atol=1e-6)


def test_conversions_round_to_nearest_even(isa):
    """One key: out is v exactly, for every bfloat16 and float16 that is finite; instructions for bfloat16 take subnormals as 0."""
    for dtype in torch.bfloat16, torch.float16:
        values = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16).view(dtype)
        v = values[values.isfinite()].view(1, 1, -1, 64)
        ours = Problem(dtype, b=1, sq=1, sk=1, h=v.shape[2], dv=64).call(*(
            torch.zeros(1, 1, v.shape[2], 8, dtype=dtype) for _ in range(2)), v)[0]
        if isa in ("avx512_bf16", "amx") and dtype == torch.bfloat16:
            v = v.where(v.abs() >= torch.finfo(dtype).smallest_normal, 0)
        assert torch.equal(ours, v)
