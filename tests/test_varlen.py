"""Packed sequences: ragged lengths, empty sequences, unused rows, seqused_k, and agreement with dense
calls."""

import pytest
import torch

import flash_attn
from problem import DTYPES, Problem

RAGGED = [
    ((1,), (1,)), ((5, 0, 3), (0, 7, 3)), ((76, 34, 146), (1, 1, 1)), ((0, 0), (0, 0)), ((), ()),
    ((1, 1, 1, 1), (9, 130, 1, 64)), ((129, 1, 65), (65, 129, 1)), ((113, 3), (59, 239)), ((300,), (17,)),
    (tuple(range(12)), tuple(range(24, 0, -2))),
]
FEATURES = [dict(), dict(causal=True), dict(window=(7, 3)), dict(causal=True, window=(20, 0), softcap=4.0),
            dict(alibi="batch"), dict(causal=True, alibi="head", dropout_p=0.25, d=59)]


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_ragged(device, lengths, features):
    for dtype in DTYPES:
        Problem(dtype, seqlens_q=lengths[0], seqlens_k=lengths[1], h=4, hk=2, **features).check(device)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("features", [dict(), dict(causal=True), dict(causal=True, dropout_p=0.1)], ids=str)
def test_warpgroups_that_have_no_rows(device, d, features):
    """Tiles of up to 256 rows, of which a sequence may fill one warpgroup's."""
    lengths = (512, 0, 129, 300, 64, 257), (512, 70, 300, 129, 64, 257)
    Problem(torch.bfloat16, seqlens_q=lengths[0], seqlens_k=lengths[1], tail=9, h=1, d=d, **features).check(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_rows_beyond_the_sequences_are_zero(device, dtype, features):
    """They hold NaN, in dout too, and max_seqlen is too large."""
    problem = Problem(dtype, seqlens_q=(30, 0, 61), seqlens_k=(45, 9, 20), tail=13, extra_max_seqlen=100, h=4,
                      hk=2, **features)
    ours = problem.check(device)
    assert ours.lse[:, 91:].isneginf().all()
    for x, used in (ours.out, 91), (ours.dq, 91), (ours.dk, 74), (ours.dv, 74):
        assert not x[used:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", [(0, 0, 0), (128, 1, 77), (5, 128, 0)], ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_seqused_k_dense(device, dtype, used, features):
    """Keys beyond seqused_k hold NaN, and the alignment follows the used length."""
    ours = Problem(dtype, b=3, sq=70, sk=128, seqused_k=used, h=4, hk=2, **features).check(device)
    for b, length in enumerate(used):
        assert not ours.dk[b, length:].any() and not ours.dv[b, length:].any()


@pytest.mark.parametrize("used", [(0, 0, 0), (45, 1, 12), (44, 0, 20)], ids=str)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_seqused_k_packed(device, used, features):
    Problem(torch.bfloat16, seqlens_q=(30, 5, 61), seqlens_k=(45, 9, 20), seqused_k=used, tail=3, h=4, hk=2,
            **features).check(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_lengths_agree_with_dense(device, dtype):
    """The same sequences, dense and packed: the same bits, dropout included."""
    dense = Problem(dtype, b=3, sq=67, sk=90, h=4, hk=2, causal=True, dropout_p=0.2)
    packed = Problem(dtype, seqlens_q=(67,) * 3, seqlens_k=(90,) * 3, h=4, hk=2, causal=True, dropout_p=0.2)
    inputs = dense.inputs()
    q, k, v, dout = (x.flatten(0, 1) for x in inputs[:4])
    dlse = inputs.dlse.transpose(0, 1).flatten(1)
    expected, ours = dense.run(inputs, device), packed.run(type(inputs)(q, k, v, dout, dlse), device)
    assert torch.equal(ours.lse, expected.lse.transpose(0, 1).flatten(1))
    for name in "out", "dq", "dk", "dv":
        assert torch.equal(getattr(ours, name), getattr(expected, name).flatten(0, 1)), name


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    alone = Problem(torch.bfloat16, seqlens_q=(50,), seqlens_k=(77,), causal=True)
    among = Problem(torch.bfloat16, seqlens_q=(50, 3, 128), seqlens_k=(77, 200, 1), causal=True)
    inputs = among.inputs()
    expected = alone.run(type(inputs)(*(x[:77] if i in (1, 2) else x[:50] for i, x in enumerate(inputs[:4])),
                                      inputs.dlse[:, :50]), device)
    ours = among.run(inputs, device)
    assert torch.equal(ours.out[:50], expected.out) and torch.equal(ours.lse[:, :50], expected.lse)
    assert torch.equal(ours.dq[:50], expected.dq) and torch.equal(ours.dk[:77], expected.dk)


@pytest.mark.parametrize("largest", ["first", "last"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_neighbours_without_a_number(device, d, largest):
    """Their queries share tiles with those of a sequence whose maximum grows from one block of keys to the next. Tiles may differ with
    the batch, and when a maximum moves with the rows beside, so results agree to the last bit but a few."""
    alone = Problem(torch.bfloat16, seqlens_q=(9,), seqlens_k=(400,), d=d)
    among = Problem(torch.bfloat16, seqlens_q=(9, 150), seqlens_k=(400, 30), d=d)
    inputs = among.inputs()
    inputs.q[9:] = torch.nan
    growth = torch.linspace(1, 30, 400)[:, None, None]
    inputs.k[:400] *= (growth.flip(0) if largest == "first" else growth).to(inputs.k.dtype)
    own = type(inputs)(*(x[:400] if i in (1, 2) else x[:9] for i, x in enumerate(inputs[:4])), inputs.dlse[:, :9])
    alone.check(device, own)
    expected, ours = alone.run(own, device), among.run(inputs, device)
    torch.testing.assert_close(ours.lse[:, :9], expected.lse, rtol=1e-5, atol=1e-5)
    for x, y in (ours.out[:9], expected.out), (ours.dq[:9], expected.dq), (ours.dk[:400], expected.dk), (ours.dv[:400], expected.dv):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=4e-3 * y.abs().max().item())


@pytest.mark.parametrize("function", ["qkv", "kv"])
def test_packed_functions_agree_with_the_plain_one(device, function):
    lengths = torch.tensor([0, 30, 30, 91], dtype=torch.int32, device=device)
    qkv = torch.randn(100, 3, 4, 32, device=device, dtype=torch.bfloat16)
    expected = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), lengths, lengths, 61, 61, causal=True)
    if function == "qkv":
        ours = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, lengths, 61, causal=True)
    else:
        ours = flash_attn.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], lengths, lengths, 61, 61,
                                                          causal=True)
    assert torch.equal(ours, expected)


def test_max_seqlen_may_be_a_tensor(device):
    problem = Problem(seqlens_q=(5, 9), seqlens_k=(7, 7))
    q, k, v = (x.to(device) for x in problem.inputs()[:3])
    cu_q, cu_k = (x.to(device) for x in problem.cu_seqlens())
    expected = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 7)
    ours = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, cu_q.diff().max(), cu_k.diff().max())
    assert torch.equal(ours, expected)
