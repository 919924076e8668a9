"""Backward: the gradients of q, k and v, from out and from lse, against float64."""

import pytest
import torch

from problem import DTYPES, Problem
from test_forward import HARD, HEAD_DIMS, SIZES, WINDOWS, channels_apart, hard_problem, sliced, transposed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_sizes(device, dtype, sizes, causal):
    Problem(dtype, sq=sizes[0], sk=sizes[1], causal=causal, d=64).check(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_head_dims(device, dtype, d):
    Problem(dtype, sq=67, sk=83, d=d, causal=d % 2 == 0).check(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, dv", [(192, 128), (128, 192), (1, 256), (256, 1), (59, 64), (64, 59), (40, 24)])
def test_value_head_dim_differs(device, dtype, d, dv):
    Problem(dtype, sq=67, sk=83, d=d, dv=dv).check(device)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("sizes", [(129, 129), (113, 59), (59, 239)], ids=str)
def test_windows(device, window, sizes):
    for causal in False, True:
        Problem(sq=sizes[0], sk=sizes[1], window=window, causal=causal).check(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h, hk", [(1, 1), (4, 1), (6, 2), (6, 3), (12, 4)])
def test_grouped_heads(device, dtype, h, hk):
    for sq in 1, 4, 65:
        Problem(dtype, sq=sq, sk=90, h=h, hk=hk, causal=True, b=3).check(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(softcap=5.0), dict(softcap=30.0, causal=True), dict(alibi="head"), dict(alibi="batch", causal=True),
    dict(scale=0.0), dict(scale=-0.3), dict(scale=2.0, softcap=1.0, alibi="head", window=(30, 5)),
    dict(dropout_p=0.3, softcap=8.0, alibi="batch", causal=True), dict(dropout_p=0.9)], ids=str)
def test_score_options(device, dtype, options):
    Problem(dtype, sq=111, sk=129, h=4, hk=2, **options).check(device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(device, dtype, sizes):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    b, sq, sk = sizes
    for hk in 1, 2:
        ours = Problem(dtype, b=b, sq=sq, sk=sk, hk=hk).check(device)
        assert not any(x.any() for x in ours[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("harden", HARD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_hard_inputs(device, dtype, harden, causal):
    problem, inputs = hard_problem(dtype, harden, causal)
    problem.check(device, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_get_zero(device, dtype):
    """Bottom-right alignment: with sq > sk the first sq - sk causal queries see nothing, whatever reaches
    them."""
    problem = Problem(dtype, sq=90, sk=50, causal=True)
    inputs = problem.inputs()
    inputs.dlse[..., :40] = 1e3
    ours = problem.check(device, inputs)
    assert not ours.out[:, :40].any() and not ours.dq[:, :40].any()
    assert ours.lse[..., :40].isneginf().all()


def broadcast_heads(x):
    return x[:, :, :1].expand_as(x)


def scalar(x):
    """What `out.sum().backward()` sends: all strides 0."""
    return x.new_ones(()).expand_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [transposed, sliced, channels_apart, broadcast_heads, scalar],
                         ids=lambda f: f.__name__)
def test_layouts_of_dout(device, dtype, layout):
    problem = Problem(dtype, sq=35, sk=59, h=4, hk=2, d=40, causal=True)
    inputs = problem.inputs()
    problem.check(device, inputs._replace(dout=layout(inputs.dout)))


@pytest.mark.parametrize("layout", [transposed, sliced, channels_apart], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_layouts_of_inputs(device, layout, which):
    problem = Problem(torch.bfloat16, sq=35, sk=59, h=4, hk=2, d=40, causal=True)
    inputs = problem.inputs()
    problem.check(device, inputs._replace(**{name: layout(getattr(inputs, name)) for name in which}))


def test_transposed_dlse(device):
    problem = Problem(sq=35, sk=59, h=4, hk=2)
    inputs = problem.inputs()
    problem.check(device, inputs._replace(dlse=inputs.dlse.transpose(1, 2).contiguous().transpose(1, 2)))


def test_expanded_inputs(device):
    problem = Problem(torch.float16, b=3, sq=20, sk=33, h=4, d=16)
    inputs = problem.inputs()
    k, v = (x[:1, :, :1].expand(3, -1, 4, -1) for x in (inputs.k, inputs.v))
    problem.check(device, inputs._replace(q=inputs.q[:1].expand(3, -1, -1, -1), k=k, v=v))
