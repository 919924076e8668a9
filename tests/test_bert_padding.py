"""Padded batches to packed sequences and back: values, order, gradients, and the one wait for a GPU."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from flash_attn import ArgumentTypeError, ArgumentValueError, bert_padding, flash_attn_func
from flash_attn import flash_attn_varlen_func
from flash_attn.bert_padding import (
    IndexFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)


def random_mask(b, s, seed, dtype=torch.bool, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(b, s, generator=generator) < share).to(dtype)


@settings(max_examples=60)
@given(b=st.integers(0, 4), s=st.integers(0, 9), trailing=st.sampled_from([(), (3,), (2, 3)]),
       dtype=st.sampled_from([torch.bool, torch.int32, torch.int64, torch.uint8]),
       share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), unused=st.booleans(), seed=st.integers(0, 99))
def test_unpad_then_pad(b, s, trailing, dtype, share, unused, seed):
    """Against a loop over the rows, with any trailing dimensions and any dtype of mask."""
    x = torch.randn(b, s, *trailing)
    mask = random_mask(b, s, seed, dtype, share)
    unused_mask = random_mask(b, s, seed + 1, dtype, 0.3) if unused else None
    kept = mask.bool() if unused_mask is None else mask.bool() | unused_mask.bool()
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused_mask)

    rows = [x[i][kept[i]] for i in range(b)]
    lengths = [len(row) for row in rows]
    assert torch.equal(packed, torch.cat([*rows, x.new_empty(0, *trailing)]))
    assert torch.equal(indices, kept.flatten().nonzero()[:, 0]) and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    assert max_seqlen == max(lengths, default=0) and type(max_seqlen) is int
    assert torch.equal(seqused, mask.bool().sum(1).int()) and seqused.dtype == torch.int32
    shape = (b, s) + (1,) * len(trailing)
    assert torch.equal(pad_input(packed, indices, b, s), x * kept.view(shape))


def test_on_a_device(device):
    """The same values as on the CPU, whose path to the indices is another."""
    x, mask = torch.randn(5, 37, 4), random_mask(5, 37, 0)
    mask[2] = False
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x.to(device), mask.to(device))
    assert indices.tolist() == mask.flatten().nonzero()[:, 0].tolist()
    assert torch.equal(packed.cpu(), x[mask])
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert max_seqlen == mask.sum(1).max() and seqused.tolist() == mask.sum(1).tolist()
    assert torch.equal(pad_input(packed, indices, 5, 37).cpu(), x * mask[..., None])


def test_concatenated_sequences(device):
    x = torch.arange(2 * 6 * 2.0).view(2, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [0, 6, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x.to(device),
                                                                                     lengths.to(device))
    assert torch.equal(packed.cpu(), torch.cat([x[0, :5], x[1]]))
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 2, 5, 11] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6 and type(max_seqlen) is int
    nothing = unpad_input_for_concatenated_sequences(x.to(device), torch.zeros_like(lengths).to(device))
    assert nothing[0].shape == (0, 2) and nothing[2].tolist() == [0] and nothing[3] == 0


def test_gradients():
    """First and second order, with indices that repeat and rows that none selects."""
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 4, 2])
    distinct = torch.tensor([3, 0, 6, 2, 1])
    for function in (lambda x: index_first_axis(x, indices),
                     lambda x: index_first_axis_residual(x, indices),
                     lambda x: index_put_first_axis(x, distinct, 7)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_gradients_through_a_padded_batch(device):
    """Attention of packed sequences has the gradients of attention under a key padding mask."""
    b, s, h, d = 3, 33, 2, 16
    lengths = torch.tensor([33, 1, 20])
    mask = (torch.arange(s) < lengths[:, None]).to(device)
    base = torch.randn(b, s, 3, h, d, device=device)
    weight = torch.randn(b, s, h, d, device=device) * mask[..., None, None]
    padded, packed = base.clone().requires_grad_(), base.clone().requires_grad_()

    out = flash_attn_func(*padded.unbind(2), seqused_k=lengths.int().to(device))
    (out * weight).sum().backward()
    tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(packed, mask)
    tokens = flash_attn_varlen_func(*tokens.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    (pad_input(tokens, indices, b, s) * weight).sum().backward()
    torch.testing.assert_close(packed.grad, padded.grad, rtol=1e-5, atol=1e-5)


def test_residual_is_one_tensor_and_leaves_the_incoming_gradient_alone():
    x = torch.randn(4, 3, requires_grad=True)
    selected, residual = index_first_axis_residual(x, torch.tensor([1, 1]))
    assert torch.equal(selected, x[[1, 1]]) and residual.data_ptr() == x.data_ptr()
    incoming = torch.ones(4, 3)
    torch.autograd.backward((selected, residual), (torch.ones(2, 3), incoming))
    assert torch.equal(incoming, torch.ones(4, 3))
    assert x.grad[:, 0].tolist() == [1, 3, 1, 1]


def test_a_gpu_is_waited_for_once(device):
    if device == "cpu":
        pytest.skip("a CPU is never waited for")
    x, mask = torch.randn(4, 64, 8, device=device), random_mask(4, 64, 1).to(device)
    lengths = torch.zeros(4, 64, dtype=torch.int64, device=device)
    lengths[:, 0] = 5
    for call in (lambda: unpad_input(x, mask), lambda: unpad_input_for_concatenated_sequences(x, lengths)):
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert sum("called a synchronizing" in str(wait.message) for wait in waits) == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = index_first_axis(x.flatten(0, 1), torch.arange(9, device=device))
        pad_input(packed, torch.arange(9, device=device), 4, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_names_of_einops(monkeypatch):
    """`rearrange` and `repeat` are einops' where it is installed, and an error that says so where not."""
    monkeypatch.setitem(sys.modules, "einops", SimpleNamespace(rearrange=len, repeat=max))
    from flash_attn.bert_padding import rearrange, repeat
    assert (rearrange, repeat) == (len, max)
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match="pip install einops"):
        from flash_attn.bert_padding import rearrange  # noqa: F811
    with pytest.raises(AttributeError):
        bert_padding.nothing


def test_autograd_callables():
    assert index_first_axis == IndexFirstAxis.apply
    assert {"IndexPutFirstAxis", "IndexFirstAxisResidual"} <= set(vars(bert_padding))


def test_bad_input():
    x = torch.randn(2, 5, 3)
    for mask in torch.ones(2, 4), torch.ones(5), torch.ones(2, 5, 1):
        with pytest.raises(ArgumentValueError, match=r"attention_mask must have shape .*\(2, 5\)"):
            unpad_input(x, mask)
    with pytest.raises(ArgumentValueError, match="unused_mask"):
        unpad_input(x, torch.ones(2, 5), torch.ones(2, 6))
    with pytest.raises(ArgumentTypeError, match="integers"):
        unpad_input_for_concatenated_sequences(x, torch.ones(2, 5))
    with pytest.raises((IndexError, RuntimeError)):
        index_first_axis(x, torch.tensor([2]))
