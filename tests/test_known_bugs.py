"""Bugs that exact-attention kernels have shipped before, one test each, by the number of our list of them.

Left out are those that need what this version or a CPU does not have: split-KV, paged and appended caches,
rotary, bias, CUDA streams, graphs and devices.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import ArgumentValueError, flash_attn_func, flash_attn_varlen_func
from problem import DTYPES, Inputs, Problem

half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
every = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# Lengths, shapes, tails.


@every
def test_01_all_sizes_one_with_large_inputs(device, dtype):
    problem = Problem(dtype, b=1, sq=1, sk=1, h=1, d=16)
    q, k, v, dout, dlse = problem.inputs()
    problem.check(device, Inputs(3 * q, 3 * k, 3 * v, dout, dlse))


@every
def test_02_many_queries_on_single_keys_causal(device, dtype):
    Problem(dtype, seqlens_q=(76, 34, 146), seqlens_k=(1, 1, 1), causal=True, d=64).check(device)


@every
def test_03_odd_length_causal_backward(device, dtype):
    Problem(dtype, sq=238, sk=238, causal=True, d=64).check(device)


@pytest.mark.parametrize("s", [1, 63, 127, 129, 200, 255])
def test_04_backward_mask_of_partial_tiles(device, s):
    Problem(sq=s, sk=s).check(device)


@every
def test_05_sequence_without_keys(device, dtype):
    Problem(dtype, seqlens_q=(13, 40, 9), seqlens_k=(20, 0, 31)).check(device)


@half
def test_06_max_seqlen_one_with_empty_queries_and_groups(device, dtype):
    Problem(dtype, seqlens_q=(1, 0, 1, 0), seqlens_k=(50, 20, 1, 0), h=8, hk=2).check(device)


@half
def test_07_fewer_queries_than_sequences_with_groups(device, dtype):
    Problem(dtype, seqlens_q=(0, 1, 0, 0, 1), seqlens_k=(9, 50, 3, 0, 70), h=6, hk=2,
            causal=True).check(device)


@pytest.mark.parametrize("bug", ["08", "09"])
def test_08_09_no_queries_but_keys(device, bug):
    """dk and dv of such a sequence are exactly 0."""
    ours = Problem(torch.bfloat16, seqlens_q=(0, 30, 0), seqlens_k=(77, 30, 5), d=256 if bug == "08" else 64,
                   h=2).check(device)
    for rows in slice(0, 77), slice(107, 112):
        assert not ours.dk[rows].any() and not ours.dv[rows].any()


@pytest.mark.parametrize("causal", [False, True])
def test_10_dense_without_keys(device, causal):
    ours = Problem(sk=0, causal=causal).check(device)
    assert not ours.out.any() and ours.lse.isneginf().all()


@pytest.mark.parametrize("sizes", [dict(sq=0), dict(b=0), dict(b=0, sq=0, sk=0)], ids=str)
def test_11_no_queries_or_no_batch(device, sizes):
    Problem(**sizes).check(device)


def test_12_tail_padding_with_dropout(device):
    ours = Problem(torch.bfloat16, seqlens_q=(40, 21), seqlens_k=(40, 21), tail=30, extra_max_seqlen=64,
                   dropout_p=0.1).check(device)
    assert not any(x[61:].any() for x in (ours.out, ours.dq, ours.dk, ours.dv))


def test_13_results_start_as_nan(device):
    """Every test runs so; here is the proof that memory is poisoned."""
    assert flash_attn._backend.empty(3).isnan().all()
    assert flash_attn._backend.empty_like(torch.zeros(3)).isnan().all()


def test_14_over_provisioned_lengths_read_no_further_offset(device):
    """cu_seqlens is a view; what lies behind it would send a kernel far outside."""
    problem = Problem(seqlens_q=(10, 20), seqlens_k=(10, 20), causal=True)
    q, k, v = (x.to(device) for x in problem.inputs()[:3])
    offsets = torch.tensor([0, 10, 30, 2 ** 31 - 1, -2 ** 31], dtype=torch.int32, device=device)[:3]
    ours = flash_attn_varlen_func(q, k, v, offsets, offsets, 4096, 4096, causal=True)
    assert torch.equal(ours, problem.call(q, k, v)[0])


def test_15_sequence_longer_than_stated():
    q = torch.zeros(9, 1, 8)
    offsets = torch.tensor([0, 2, 9], dtype=torch.int32)
    for longest in (6, 7), (7, 6):
        with pytest.raises(ArgumentValueError, match="max_seqlen_[qk].*got 6.* 7 "):
            flash_attn_varlen_func(q, q, q, offsets, offsets, *longest)


@pytest.mark.parametrize("sq", [65, 129, 193])
def test_16_last_query_tile_reads_no_row_too_many(device, sq):
    """The tensors end with their memory's page in all likelihood; NaN follows them in any case."""
    problem = Problem(torch.bfloat16, b=1, sq=sq, sk=sq, h=1)
    inputs = problem.inputs()
    memory = [torch.full((x.numel() + 4096,), math.nan, dtype=x.dtype) for x in inputs[:3]]
    problem.check(device, inputs._replace(**{
        name: base[:x.numel()].view(x.shape).copy_(x) for name, base, x in zip("qkv", memory, inputs)}))


def test_17_more_heads_than_a_grid_dimension(device):
    x = torch.randn(1, 2, 71280, 8, device=device)
    out = flash_attn_func(x, x, x)
    expected = flash_attn.reference.attention(*[x[:, :, -5:].cpu()] * 3)[0]
    torch.testing.assert_close(out[:, :, -5:].cpu(), expected)


def test_18_eighty_thousand_sequences(device):
    x = torch.randn(80000 * 16, 1, 8, device=device)
    offsets = torch.arange(0, 80000 * 16 + 1, 16, dtype=torch.int32, device=device)
    out = flash_attn_varlen_func(x, x, x, offsets, offsets, 16, 16, causal=True)
    dense = flash_attn_func(*[x.view(80000, 16, 1, 8)] * 3, causal=True)
    assert torch.equal(out.view_as(dense), dense)
    torch.testing.assert_close(dense[-2:].cpu(), flash_attn.reference.attention(
        *[x.view(80000, 16, 1, 8)[-2:].cpu()] * 3, causal=True)[0])


# Size and overflow.


def test_19_large_batch_of_single_tokens(device):
    problem = Problem(torch.bfloat16, b=8300, sq=1, sk=1, h=4, d=128)
    q = torch.randn(8300, 1, 4, 128, device=device, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in (q, q.clone(), q.flip(0)))
    out, _, _ = problem.call(q, k, v)
    assert torch.equal(out, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), v)
    assert torch.equal(dv, v) and dq.abs().max() < 1e-1 and dk.abs().max() < 1e-1


@pytest.mark.parametrize("bug", ["21", "23"])
def test_21_23_strides_beyond_32_bits(monkeypatch, device, bug):
    """Offsets past 2^31 elements, in q, k and v or in dout: memory that is never touched in between."""
    if device == "cuda":
        monkeypatch.setenv("FLASH_ATTN_KERNEL", "sm80")     # takes odd strides and even ones, so bits can be compared
    problem = Problem(torch.bfloat16, b=2, sq=3, sk=3, h=2, d=8)
    inputs = problem.inputs()

    def spread(x):
        try:
            memory = torch.empty(2 ** 31 + 2 ** 20, dtype=x.dtype, device=device)
        except RuntimeError as error:
            pytest.skip(f"no 4 GB of address space: {error}")
        return memory.as_strided(x.shape, (2 ** 31 + 3, 64, 16, 1)).copy_(x)

    names = ["dout"] if bug == "23" else ["q", "k", "v"]
    ours = problem.run(inputs._replace(**{name: spread(getattr(inputs, name)) for name in names}), device)
    assert all(map(torch.equal, ours, problem.run(inputs, device)))


# Strides and layouts.


@every
def test_26_strided_dout_with_one_key_head(device, dtype):
    problem = Problem(dtype, b=2, sq=32, sk=32, h=4, hk=1, d=128)
    inputs = problem.inputs()
    problem.check(device, inputs._replace(dout=inputs.dout.transpose(0, 1).contiguous().transpose(0, 1)))


@every
def test_27_every_tensor_in_another_layout(device, dtype):
    problem = Problem(dtype, sq=40, sk=50, h=4)
    q, k, v, dout, dlse = problem.inputs()
    problem.check(device, Inputs(q.transpose(1, 2).contiguous().transpose(1, 2),
                                 k.transpose(0, 2).contiguous().transpose(0, 2), v,
                                 dout.transpose(0, 1).contiguous().transpose(0, 1), dlse))


@every
def test_28_channels_that_are_not_contiguous(device, dtype):
    problem = Problem(dtype, sq=40, sk=50)
    inputs = problem.inputs()
    problem.check(device, Inputs(*(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs[:4]),
                                 inputs.dlse))


@half
def test_29_views_of_a_fused_projection(device, dtype):
    """q, k, v sliced from one (b, s, 3 h d) activation, at head dimension 256."""
    problem = Problem(dtype, b=1, sq=4, sk=4, h=2, d=256)
    inputs = problem.inputs()
    fused = torch.cat([x.flatten(2) for x in inputs[:3]], -1)
    views = (x.unflatten(-1, (2, 256)) for x in fused.chunk(3, -1))
    problem.check(device, Inputs(*views, inputs.dout, inputs.dlse))


@half
def test_30_transposed_views(device, dtype):
    problem = Problem(dtype, sq=65, sk=65, h=3, causal=True)
    inputs = problem.inputs()
    views = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4])
    problem.check(device, Inputs(*views, inputs.dlse))


@half
def test_32_single_query_of_grouped_heads_with_strides(device, dtype):
    problem = Problem(dtype, b=3, sq=1, sk=90, h=8, hk=2, d=64)
    inputs = problem.inputs()
    views = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4])
    problem.check(device, Inputs(*views, inputs.dlse))


# Masks, windows, softmax edge rows.


@pytest.mark.parametrize("sizes", [(2, 5), (5, 2)], ids=str)
def test_33_causal_is_aligned_bottom_right(device, sizes):
    """The visible keys by hand: with equal scores, out is the mean of what is seen."""
    sq, sk = sizes
    q, k = torch.zeros(1, sq, 1, 8, device=device), torch.zeros(1, sk, 1, 8, device=device)
    out = flash_attn_func(q, k, torch.eye(sk, device=device)[None, :, None], causal=True)[0, :, 0].cpu()
    expected = {(2, 5): [[1 / 4] * 4 + [0], [1 / 5] * 5],
                (5, 2): [[0, 0], [0, 0], [0, 0], [1, 0], [1 / 2, 1 / 2]]}[sizes]
    torch.testing.assert_close(out, torch.tensor(expected))


@every
@pytest.mark.parametrize("bug", ["34", "35"])
def test_34_35_rows_without_keys(device, dtype, bug):
    """out 0, lse -inf (not +inf, which breaks merging), gradients 0."""
    ours = Problem(dtype, sq=150, sk=70, causal=True).check(device)
    assert not ours.out[:, :80].any() and not ours.dq[:, :80].any()
    assert (ours.lse[..., :80] == -math.inf).all() and ours.lse[..., 80:].isfinite().all()


@pytest.mark.parametrize("right", [50, 60, 79, 80, 1000])
def test_36_right_bound_beyond_the_keys_with_more_queries(device, right):
    Problem(sq=130, sk=50, window=(5, right)).check(device)
    Problem(sq=130, sk=50, window=(-1, right)).check(device)


def test_37_window_that_equals_causal(device):
    """(s - 1, 0) is causal: the same bits here."""
    causal, window = Problem(sq=129, sk=129, causal=True), Problem(sq=129, sk=129, window=(128, 0))
    inputs = causal.inputs()
    for ours, expected in zip(window.run(inputs, device), causal.run(inputs, device)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_38_bounds_are_inclusive(device):
    q = torch.zeros(1, 5, 1, 8, device=device)
    out = flash_attn_func(q, q, torch.eye(5, device=device)[None, :, None], window_size=(1, 2))[0, :, 0].cpu()
    visible = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert torch.equal(out > 0, torch.tensor(visible).bool())


@pytest.mark.parametrize("window", [(-1, -1), (-2, -7), (None, None), (-1, None)], ids=str)
def test_39_unlimited_bounds(device, window):
    q = torch.randn(1, 70, 1, 8, device=device)
    assert torch.equal(flash_attn_func(q, q, q, window_size=window), flash_attn_func(q, q, q))


@pytest.mark.parametrize("score", [-5e4, -1e6, 5e4, 1e6])
def test_40_scores_below_a_sentinel(device, score):
    """Real scores below a finite stand-in for -inf are still scores."""
    q, k = torch.full((1, 3, 1, 1), 1.0, device=device), torch.full((1, 70, 1, 1), score, device=device)
    v = torch.randn(1, 70, 1, 4, device=device)
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=1.0, causal=True, return_attn_probs=True)
    for i in range(3):
        torch.testing.assert_close(out[0, i, 0], v[0, :68 + i, 0].mean(0))
    visible = torch.tensor([68.0, 69.0, 70.0], device=device)
    torch.testing.assert_close(lse[0, 0], score + visible.log())


@pytest.mark.parametrize("score", [-1e12, -1e31, -3e38, 1e12, 1e31, 3e38])
def test_40_single_scores_beyond_any_sentinel(device, score):
    """A row that sees one key has out = v, whatever the score, up to the end of float32."""
    q, k = torch.full((1, 3, 1, 1), 1.0, device=device), torch.full((1, 70, 1, 1), score, device=device)
    v = torch.randn(1, 70, 1, 4, device=device)
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=1.0, window_size=(0, 0), return_attn_probs=True)
    torch.testing.assert_close(out, v[:, 67:])
    torch.testing.assert_close(lse, torch.full_like(lse, score))


@every
@pytest.mark.parametrize("bug", ["41", "42"])
def test_41_42_unused_keys_hold_nan(device, dtype, bug):
    """Tails of key tiles, and slots of a cache beyond the used length."""
    Problem(dtype, b=3, sq=9, sk=200, seqused_k=(1, 65, 130) if bug == "41" else (0, 199, 100), h=4,
            hk=2).check(device)


@every
def test_43_half_empty_key_tile_with_very_low_lse(device, dtype):
    """sk % 128 = 64 and every score near -100: hidden columns must not count as score 0."""
    problem = Problem(dtype, sq=64, sk=192, d=16)
    inputs = problem.inputs()
    inputs.q.mul_(0.1)[..., 0] = 20
    inputs.k.mul_(0.1)[..., 0] = -20
    ours = problem.check(device, inputs)
    assert ours.lse.max() < -88.8


@every
def test_45_masked_probabilities_in_varlen_backward(device, dtype):
    Problem(dtype, seqlens_q=(100, 37), seqlens_k=(37, 100), causal=True, window=(20, 0)).check(device)


# Groups of heads.


@half
@pytest.mark.parametrize("sq", [2, 4, 8])
def test_46_as_many_queries_as_heads_in_a_group(device, dtype, sq):
    Problem(dtype, b=1, sq=sq, sk=sq, h=8, hk=2, causal=True).check(device)


@half
def test_50_lse_layout_of_grouped_heads(device, dtype):
    ours = Problem(dtype, b=2, sq=1, sk=200, h=8, hk=2).check(device)
    assert ours.lse.shape == (2, 8, 1)


@half
def test_55_causal_limit_of_every_row_in_a_group(device, dtype):
    Problem(dtype, b=1, sq=5, sk=9, h=12, hk=2, causal=True).check(device)


def test_56_alibi_with_cross_lengths(device):
    """The shift sk - sq is each sequence's own, dense and packed alike; slopes must be float32."""
    dense = Problem(b=1, sq=20, sk=70, alibi="head", h=4)
    packed = Problem(seqlens_q=(20,), seqlens_k=(70,), alibi="head", h=4)
    inputs = dense.inputs()
    ours, expected = packed.run(Inputs(*(x[0] for x in inputs)), device), dense.check(device, inputs)
    assert torch.equal(ours.out, expected.out[0]) and torch.equal(ours.dk, expected.dk[0])
    q = torch.zeros(1, 3, 2, 8, device=device)
    with pytest.raises(TypeError, match="float32.*bfloat16"):
        flash_attn_func(q, q, q, alibi_slopes=torch.ones(2, device=device, dtype=torch.bfloat16))


# Random numbers, autograd.


def test_65_every_call_draws_a_new_mask_and_none_without_dropout(device):
    q = torch.randn(1, 64, 2, 16, device=device)
    torch.manual_seed(1)
    first, second = flash_attn_func(q, q, q, 0.5), flash_attn_func(q, q, q, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    flash_attn_func(q, q, q)
    assert torch.equal(flash_attn_func(q, q, q, 0.5), first)


@pytest.mark.parametrize("p", [1e-30, 1e-16])
def test_66_tiny_dropout_drops_nothing(device, p):
    q = torch.randn(1, 64, 2, 16, device=device)
    out, lse, s_dmask = flash_attn_func(q, q, q, p, return_attn_probs=True)
    torch.testing.assert_close(out, flash_attn_func(q, q, q))
    assert lse.isfinite().all() and (s_dmask[:, :, :64, :64] >= 0).all()


@every
def test_67_softcap_has_a_backward(device, dtype):
    problem = Problem(dtype, sq=100, sk=100, causal=True, softcap=2.0, d=64)
    inputs = problem.inputs()
    problem.check(device, inputs._replace(q=4 * inputs.q))


def test_68_gradients_exist_and_nothing_is_saved_without(device):
    q = torch.randn(1, 9, 2, 8, device=device, requires_grad=True)
    flash_attn_func(q, q, q).sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        assert flash_attn_func(q, q, q).grad_fn is None


def test_69_checkpointing_that_is_not_reentrant(device):
    q = torch.randn(1, 9, 2, 8, device=device, requires_grad=True)
    checkpoint(flash_attn_func, q, q, q, use_reentrant=False).sum().backward()
    expected, = torch.autograd.grad(flash_attn_func(q, q, q).sum(), q)
    torch.testing.assert_close(q.grad, expected)


# Head dimensions, and failures that depend on data.


@half
@pytest.mark.parametrize("d", [160, 192, 224, 256])
def test_73_large_head_dimensions(device, dtype, d):
    Problem(dtype, sq=130, sk=130, d=d, causal=True).check(device)


@half
@pytest.mark.parametrize("d", [72, 104])
def test_74_head_dimensions_between_the_usual(device, dtype, d):
    Problem(dtype, sq=130, sk=130, d=d).check(device)


@half
@pytest.mark.parametrize("d, dv", [(128, 96), (192, 128), (96, 128), (64, 40)])
def test_75_value_head_dimension_of_its_own(device, dtype, d, dv):
    Problem(dtype, sq=130, sk=130, d=d, dv=dv, causal=True).check(device)


@every
@pytest.mark.parametrize("causal", [False, True])
def test_76_activations_as_models_have_them(device, dtype, causal):
    """d = 256, b = 2: few large channels, nearly equal rows, a sink token. Gaussian inputs show nothing."""
    problem = Problem(dtype, b=2, sq=120, sk=120, h=2, d=256, causal=causal)
    q, k, v, dout, dlse = problem.inputs()
    for x in q, k:
        x.copy_(x[:, :1] + 0.05 * x)
        x[..., :3] *= 8
    k[:, 0] *= 3
    dout *= torch.linspace(0, 1, 120)[:, None, None].to(dtype) ** 8
    problem.check(device, Inputs(q, k, v, dout, dlse))


@every
def test_77_padding_only_at_the_tail(device, dtype):
    Problem(dtype, seqlens_q=(64, 64, 5), seqlens_k=(64, 64, 5), seqused_k=(64, 64, 3), tail=59, causal=True,
            extra_max_seqlen=64).check(device)
