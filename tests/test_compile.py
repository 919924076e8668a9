"""torch.compile keeps a call whole in one graph, with the results, gradients and dropout masks of an eager call."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import compiled, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn._backend import Operands, Options

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SHAPE = (2, 16, 4, 8)                           # batch, queries, heads, channels
KEYS = (2, 20, 2, 8)


def tensors(device, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def results(function, given):
    """Everything that the function returns, and the gradients of what it was given, from one seed."""
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in given]
    torch.manual_seed(3)
    out = function(*given)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((x.float() ** 2).sum() for x in out if x.requires_grad)
    return *[x.detach() for x in out], *torch.autograd.grad(loss, [x for x in given if x.requires_grad])


def check(function, given, backend="aot_eager"):
    torch._dynamo.reset()
    eager = results(function, given)
    ours = results(torch.compile(function, fullgraph=True, backend=backend), given)
    for x, y in zip(eager, ours, strict=True):
        assert x.stride() == y.stride()
        torch.testing.assert_close(y, x)


@pytest.mark.parametrize("options", [
    dict(causal=True), dict(window_size=(3, 4), softcap=2.0, return_attn_probs=True), dict(dropout_p=0.3),
    dict(dropout_p=0.3, return_attn_probs=True), dict(deterministic=True, softmax_scale=0.5)], ids=str)
def test_options(device, options):
    check(lambda q, k, v: flash_attn_func(q, k, v, **options), tensors(device, SHAPE, KEYS, KEYS))


@pytest.mark.parametrize("size", [(2, 4, 16, 20), (1, 4, 1, 20)], ids=str)
def test_bias_and_mask(device, size):
    q, k, v, bias = tensors(device, SHAPE, KEYS, KEYS, size)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool, device=device)
    mask[1, ..., 15:] = False
    check(lambda q, k, v, bias, mask: flash_attn_func(q, k, v, attn_bias=bias, attn_mask=mask),
          (q, k, v, bias, mask))
    check(lambda q, k, v, bias: flash_attn_func(q, k, v, attn_bias=bias.expand(2, 4, 16, 20)), (q, k, v, bias))


def test_packed_and_transposed_tensors(device):
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    check(lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True), tensors(device, (2, 9, 3, 4, 8)))
    check(lambda q, k, v: flash_attn_varlen_func(q, k, v, lengths, lengths, 7, 7),
          tensors(device, *[(12, 4, 8)] * 3))
    check(lambda *given: flash_attn_func(*[x.transpose(1, 2) for x in given]),
          tensors(device, *[(2, 4, 16, 8)] * 3))


def test_lengths_may_be_symbols(device):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda *given: flash_attn_func(*given, causal=True), fullgraph=True, dynamic=True,
                             backend=graphs)
    counts = set()
    for length in 9, 33, 40:
        given = tensors(device, *[(2, length, 4, 8)] * 3)
        assert torch.equal(function(*given), flash_attn_func(*given, causal=True))
        counts.add(graphs.frame_count)
    assert len(counts) == 1


def test_a_checkpoint_draws_the_same_mask_again(device):
    """out is linear in v, so that sum(v dv) = sum(out dout), if backward has the mask of forward. That it is an eager
    call's too is not asked: on a GPU it was not."""
    def attention(q, k, v):
        return flash_attn_func(q.sin(), k.sin(), v, dropout_p=0.3)
    torch._dynamo.reset()
    function = torch.compile(lambda *given: checkpoint(attention, *given, use_reentrant=False), fullgraph=True,
                             backend="aot_eager")
    given = tensors(device, SHAPE, KEYS, KEYS)
    for _ in range(2):
        out, _, _, dv = results(function, given)
        torch.testing.assert_close((given[2] * dv).sum(), 2 * (out ** 2).sum())


def test_modules_through_the_default_compiler(device):
    if device != "cpu":
        pytest.skip("the compiler of the CPU")
    module = flash_attn.nn.MultiheadAttention(32, 4, dropout=0.2, batch_first=True)
    check(lambda x: module(x, x, x, need_weights=False)[0], tensors("cpu", (2, 10, 32)), "inductor")


def test_errors_stay_clear():
    q, k = tensors("cpu", SHAPE, (*SHAPE[:3], 4))
    with pytest.raises(flash_attn.ArgumentValueError, match="headdim of 4"):
        torch.compile(lambda q, k: flash_attn_func(q, k, q), backend="aot_eager")(q, k)
    with pytest.raises(flash_attn.ArgumentValueError, match="dropout_p"):
        torch.compile(lambda q: flash_attn_func(q, q, q, dropout_p=1.5), backend="aot_eager")(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_what_torch_asks_of_them(device, dtype):
    """Fakes of the same sizes and strides, no aliases, nothing written, gradients that are registered right."""
    q, k, v, bias = [x.to(dtype).requires_grad_() for x in tensors(device, SHAPE, KEYS, (2, 20, 2, 5), (1, 4, 16, 20))]
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    operands = Operands(None, None, None, None, compiled.draw_rng_state(q), bias, None)
    options = Options(2, 4, 2, 16, 20, 8, 5, 32, 40, 0.3, 0.0, -1, -1, 0.2, True)
    sizes, scalars = list(options[:compiled.SIZES]), options[compiled.SIZES:]
    described = (*operands, sizes, *scalars)
    torch.library.opcheck(torch.ops.flash_attn.attention.default, (q, k, v, *described, True))
    out, lse, _ = torch.ops.flash_attn.attention(q, k, v, *described, False)
    saved = [x.detach() for x in (out, None, q, k, v, out, lse) if x is not None]
    torch.library.opcheck(torch.ops.flash_attn.attention_backward.default,
                          (saved[0], None, *saved[1:], *described, True), test_utils=("test_schema", "test_faketensor"))


def test_the_package_can_be_imported_again():
    """As notebooks do that reload what has changed."""
    code = """if True:
        import importlib, sys
        import flash_attn, torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]
        flash_attn = importlib.import_module("flash_attn")
        q = torch.randn(1, 9, 2, 8)
        compiled = torch.compile(lambda q: flash_attn.flash_attn_func(q, q, q), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q), flash_attn.flash_attn_func(q, q, q))"""
    subprocess.run([sys.executable, "-c", code], check=True)
