"""Forward: out and lse against float64, over sizes, head dimensions, masks, layouts and hard inputs."""

import pytest
import torch

import bounds
import flash_attn
from problem import DTYPES, Problem

SIZES = [(1, 1), (1, 239), (239, 1), (3, 59), (59, 3), (111, 113), (113, 111), (127, 127), (128, 128),
         (129, 129), (239, 129), (17, 257), (300, 300)]
HEAD_DIMS = [1, 2, 3, 7, 8, 15, 16, 31, 32, 40, 59, 64, 65, 72, 80, 96, 104, 111, 113, 127, 128, 129, 160,
             191, 192, 224, 239, 256]
WINDOWS = [(0, 0), (10, 0), (0, 10), (5, 7), (None, 3), (40, None), (400, 1), (1, 400), (100, 2 ** 40)]


def check_forward(problem, device, inputs=None):
    """The path without autograd."""
    inputs = inputs or problem.inputs()
    with torch.no_grad():
        out, lse, _ = problem.call(*(x.to(device) for x in inputs[:3]))
    assert not out.requires_grad
    exact, composed = problem.reference(inputs, torch.float64), problem.reference(inputs, problem.dtype)
    magnitudes = problem.magnitudes(inputs)
    bounds.assert_lse_close(lse.cpu(), exact.lse, magnitudes.lse, problem.dtype)
    bounds.assert_close("out", out.cpu(), exact.out, composed.out, magnitudes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_sizes(device, dtype, sizes, causal):
    check_forward(Problem(dtype, sq=sizes[0], sk=sizes[1], causal=causal, d=64), device)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("sizes", [(512, 512), (449, 600), (600, 449)], ids=str)
@pytest.mark.parametrize("options", [
    dict(causal=True), dict(window=(100, 30)), dict(causal=True, dropout_p=0.1), dict(dropout_p=0.1)], ids=str)
def test_warpgroups_that_see_little_or_have_no_rows(device, d, sizes, options):
    """Tiles of up to 256 rows, in short sequences: some of their rows may lie beyond the sequence or see fewer keys."""
    check_forward(Problem(torch.bfloat16, b=1, sq=sizes[0], sk=sizes[1], h=1, d=d, **options), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_head_dims(device, dtype, d):
    check_forward(Problem(dtype, sq=67, sk=83, d=d, causal=d % 2 == 0), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, dv", [(192, 128), (128, 192), (1, 256), (256, 1), (59, 64), (64, 59), (40, 24)])
def test_value_head_dim_differs(device, dtype, d, dv):
    check_forward(Problem(dtype, sq=67, sk=83, d=d, dv=dv), device)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("sizes", [(129, 129), (113, 59), (59, 239)], ids=str)
def test_windows(device, window, sizes):
    for causal in False, True:
        check_forward(Problem(sq=sizes[0], sk=sizes[1], window=window, causal=causal), device)


@pytest.mark.parametrize("h, hk", [(1, 1), (4, 1), (6, 2), (6, 3), (8, 8), (12, 4)])
@pytest.mark.parametrize("sq", [1, 4, 65])
def test_grouped_heads(device, h, hk, sq):
    check_forward(Problem(torch.bfloat16, sq=sq, sk=90, h=h, hk=hk, causal=True, b=3), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(softcap=5.0), dict(softcap=30.0, causal=True), dict(alibi="head"), dict(alibi="batch", causal=True),
    dict(scale=0.0), dict(scale=-0.3), dict(scale=2.0, softcap=1.0, alibi="head", window=(30, 5)),
    dict(dropout_p=0.3, softcap=8.0, alibi="batch", causal=True)], ids=str)
def test_score_options(device, dtype, options):
    check_forward(Problem(dtype, sq=111, sk=129, h=4, hk=2, **options), device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(device, dtype, sizes):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    b, sq, sk = sizes
    for causal in False, True:
        check_forward(Problem(dtype, b=b, sq=sq, sk=sk, causal=causal), device)


def huge_logits(q, k, v):
    q.mul_(12), k.mul_(12)


def one_key_dominates(q, k, v):
    k[:, 7] = 30 * q[:, 0, :k.shape[2]].sign()


def rising_logits(q, k, v):
    """Every block brings a new maximum."""
    q.fill_(1)
    k.copy_(torch.linspace(-10, 10, k.shape[1])[:, None, None].expand_as(k))


def falling_logits(q, k, v):
    q.fill_(1)
    k.copy_(torch.linspace(10, -10, k.shape[1])[:, None, None].expand_as(k))


def all_equal(q, k, v):
    q.fill_(0.5), k.fill_(-0.5), v.fill_(3)


def outlier_channels(q, k, v):
    """What trained models produce: a few channels far larger than the rest, a sink token, nearly equal
    rows."""
    for x in q, k:
        x.copy_(x[:, :1] + 0.1 * x)
        x[..., 0] *= 10
    k[:, 0] *= 4
    v[:, 0] *= 0.01


def subnormal_values(q, k, v):
    for x in q, k, v:
        x.mul_(torch.finfo(x.dtype).tiny)


def cancelling_values(q, k, v):
    v.mul_(1000)
    v[:, 1::2] = -v[:, :-1:2]


HARD = [huge_logits, one_key_dominates, rising_logits, falling_logits, all_equal, outlier_channels,
        subnormal_values, cancelling_values]


def hard_problem(dtype, harden, causal):
    problem = Problem(dtype, sq=113, sk=128, h=4, hk=2, d=64, causal=causal)
    inputs = problem.inputs()
    harden(*inputs[:3])
    return problem, inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("harden", HARD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_hard_inputs(device, dtype, harden, causal):
    problem, inputs = hard_problem(dtype, harden, causal)
    check_forward(problem, device, inputs)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("scale, dropout_p, causal", [(1, 0.2, False), (100, 0.0, True), (3e4, 0.0, False), (3e4, 0.2, True)])
def test_hard_inputs_over_several_tiles(device, d, scale, dropout_p, causal):
    """Rows whose scores stay small, are huge or become so beside each other, with every kernel's tile."""
    problem = Problem(torch.bfloat16, b=1, sq=140, sk=200, d=d, causal=causal, dropout_p=dropout_p)
    for harden in HARD:
        inputs = problem.inputs()
        harden(*inputs[:3])
        inputs.q.mul_(scale)
        inputs.q[:, ::3].div_(scale)
        check_forward(problem, device, inputs)


def test_infinite_logits_stay_a_softmax(device):
    """Scores that overflow float32 to -inf hide their key; they must not turn the row into NaN."""
    q, k = torch.full((1, 1, 1, 1), 1e30), torch.tensor([-1e30, 0.0, 0.0]).view(1, 3, 1, 1)
    v = torch.tensor([100.0, 1.0, 1.0]).view(1, 3, 1, 1)
    out = flash_attn.flash_attn_func(q.to(device), k.to(device), v.to(device), softmax_scale=1.0)
    assert out.item() == 1


def transposed(x):
    """(b, s, h, d) as a view of (b, h, s, d), as Hugging Face passes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x):
    """Odd offsets and strides: a window into a larger tensor."""
    larger = x.new_full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 1, x.shape[3] + 3), torch.nan)
    view = larger[1:, 1:-1, 1:, 1:-2]
    return view.copy_(x)


def channels_apart(x):
    """stride(-1) != 1, the one layout that is copied."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [transposed, sliced, channels_apart], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_layouts(device, dtype, layout, which):
    problem = Problem(dtype, sq=35, sk=59, h=4, hk=2, d=40, causal=True)
    inputs = problem.inputs()
    changed = inputs._replace(**{name: layout(getattr(inputs, name)) for name in which})
    with torch.no_grad():
        plain = problem.call(*(x.to(device) for x in inputs[:3]))
        viewed = problem.call(*(x.to(device) for x in changed[:3]))
    assert torch.equal(plain[0], viewed[0]) and torch.equal(plain[1], viewed[1])


def test_expanded_heads_and_batch(device):
    """Stride 0 in k and v (multi-query attention by expand) and in q."""
    problem = Problem(torch.float16, b=3, sq=20, sk=33, h=4, d=16)
    inputs = problem.inputs()
    k, v = (x[:1, :, :1].expand(3, -1, 4, -1) for x in (inputs.k, inputs.v))
    inputs = inputs._replace(q=inputs.q[:1].expand(3, -1, -1, -1), k=k, v=v)
    assert device != "cpu" or k.stride(2) == 0         # a copy to a GPU fills such tensors in: test_cuda.py has their views
    check_forward(problem, device, inputs)
