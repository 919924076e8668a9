"""The same bits every time: on repeats, and on the CPU for any number of threads."""

import pytest
import torch

from problem import DTYPES, Problem

PROBLEMS = [
    dict(sq=300, sk=300, causal=True, h=4, hk=2, d=64), dict(sq=1, sk=300, h=8, hk=1),
    dict(sq=300, sk=17, b=1, h=1),
    dict(sq=129, sk=257, dropout_p=0.2, softcap=10.0, alibi="head", window=(100, 20)),
    dict(sq=300, sk=400, b=3, bias="hqk", mask="bk"), dict(sq=200, sk=300, b=3, h=6, hk=2, bias="qk", mask="bqk"),
    dict(sq=200, sk=300, h=4, bias="bqk", seqused_k=(300, 100)), dict(sq=300, sk=300, h=4, bias="hk", bias_hides=True),
    dict(sq=300, sk=300, h=4, hk=2, bias="q"),
    dict(seqlens_q=(200, 0, 3, 77), seqlens_k=(150, 5, 1, 90), h=6, hk=3, causal=True),
]
# Enough blocks for a race in Hopper's ring of bias boxes to show where other processes use the GPU too.
LARGE = dict(b=2, sq=600, sk=704, h=8, hk=2, d=128, causal=True, bias="bqk", mask="bhqk")


def assert_same(first, second):
    for name, a, b in zip(first._fields, first, second):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [*PROBLEMS, LARGE], ids=str)
def test_repeats(device, dtype, problem):
    problem = Problem(dtype, **problem)
    inputs = problem.inputs()
    first = problem.run(inputs, device, deterministic=True)
    for _ in range(5):
        assert_same(first, problem.run(inputs, device, deterministic=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_threads(restore_threads, dtype, problem):
    problem = Problem(dtype, **problem)
    inputs = problem.inputs()
    torch.set_num_threads(1)
    first = problem.run(inputs)
    for threads in 2, 3:
        torch.set_num_threads(threads)
        assert_same(first, problem.run(inputs))


def test_only_dq_depends_on_the_flag(device):
    """All but dq is reproducible without it; on the CPU dq is too."""
    problem = Problem(torch.bfloat16, sq=300, sk=300, h=4, hk=2)
    inputs = problem.inputs()
    first = problem.run(inputs, device)
    for _ in range(5):
        again = problem.run(inputs, device)
        if device != "cpu":
            again = again._replace(dq=first.dq)
        assert_same(first, again)


def test_torch_flag_is_heard(device, monkeypatch):
    """torch.use_deterministic_algorithms(True) does what deterministic=True does."""
    problem = Problem(torch.bfloat16, sq=300, sk=300, h=4, hk=2)
    inputs = problem.inputs()
    expected = problem.run(inputs, device, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(expected, problem.run(inputs, device))
    finally:
        torch.use_deterministic_algorithms(False)
