"""The public functions as other people's code calls them: signatures, results, autograd, autocast, host
behaviour."""

import inspect

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import reference
from problem import DTYPES, Problem

TAIL = ["dropout_p=0.0", "softmax_scale=None", "causal=False", "window_size=(-1, -1)", "softcap=0.0",
        "alibi_slopes=None", "deterministic=False", "return_attn_probs=False"]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
OURS = ["seqused_k=None", "rng_state=None", "attn_bias=None", "attn_mask=None"]             # keyword-only
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *TAIL],
    "flash_attn_kvpacked_func": ["q", "kv", *TAIL],
    "flash_attn_qkvpacked_func": ["qkv", *TAIL],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *TAIL, "block_table=None"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *TAIL],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *TAIL],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(flash_attn, name)
    assert inspect.isfunction(function) and function is getattr(flash_attn.flash_attn_interface, name)
    parameters = inspect.signature(function).parameters.values()
    upstream = [str(p) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert upstream == SIGNATURES[name]
    assert [str(p) for p in parameters if p.kind is p.KEYWORD_ONLY] == OURS
    assert "Source:" in flash_attn.flash_attn_func.__doc__ and function.__doc__


def qkv_tensor(device, packed=False, dtype=torch.bfloat16, requires_grad=False):
    shape = (30, 3, 4, 16) if packed else (2, 15, 3, 4, 16)
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(requires_grad)


def lengths(device):
    return torch.tensor([0, 15, 30], dtype=torch.int32, device=device)


def forms(qkv, packed):
    """The three public functions of a layout, each with its tensors made from qkv."""
    q, k, v = qkv.unbind(-3)
    kv = qkv[..., 1:, :, :]
    if not packed:
        return [(flash_attn.flash_attn_func, (q, k, v)), (flash_attn.flash_attn_kvpacked_func, (q, kv)),
                (flash_attn.flash_attn_qkvpacked_func, (qkv,))]
    cu = lengths(qkv.device)
    both = (cu, cu, 15, 15)
    return [(flash_attn.flash_attn_varlen_func, (q, k, v, *both)),
            (flash_attn.flash_attn_varlen_kvpacked_func, (q, kv, *both)),
            (flash_attn.flash_attn_varlen_qkvpacked_func, (qkv, cu, 15))]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "autograd"])
def test_results(device, packed, requires_grad):
    """A tensor, or a tuple of three with return_attn_probs; all forms give the same bits."""
    qkv = qkv_tensor(device, packed, requires_grad=requires_grad)
    results = []
    for function, arguments in forms(qkv, packed):
        out = function(*arguments, causal=True)
        assert type(out) is torch.Tensor and out.dtype == qkv.dtype and out.requires_grad == requires_grad
        assert out.is_contiguous()
        triple = function(*arguments, causal=True, return_attn_probs=True)
        assert type(triple) is tuple and torch.equal(triple[0], out)
        assert triple[1].shape == ((4, 30) if packed else (2, 4, 15)) and triple[1].dtype == torch.float32
        assert triple[2].shape == (0,) and triple[2].dtype == qkv.dtype
        results.append(triple)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_packed_calls_return_one_gradient(device, packed):
    """A packed call's gradient is one contiguous tensor, written by the kernel: no sum of views."""
    qkv = qkv_tensor(device, packed, requires_grad=True)
    gradients = []
    for function, arguments in forms(qkv, packed):
        out = function(*arguments, causal=True)
        given = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
        got = torch.autograd.grad(out, given, torch.ones_like(out))
        assert [x.shape for x in got] == [x.shape for x in given]
        if len(given) < 3:
            assert got[-1].is_contiguous()
        gradients.append(torch.cat([x if x.dim() == qkv.dim() else x.unsqueeze(-3) for x in got], -3))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_positional_arguments(device):
    q = torch.randn(1, 9, 2, 8, device=device)
    slopes = torch.rand(2, device=device)
    by_position = flash_attn.flash_attn_func(q, q, q, 0.0, 0.3, True, (4, 0), 2.0, slopes, True, True)
    by_name = flash_attn.flash_attn_func(q=q, k=q, v=q, softmax_scale=0.3, causal=True, window_size=(4, 0),
                                         softcap=2.0, alibi_slopes=slopes, deterministic=True,
                                         return_attn_probs=True)
    assert torch.equal(by_position[0], by_name[0]) and torch.equal(by_position[1], by_name[1])


@pytest.mark.parametrize("window", [(3, 1), [3, 1], torch.tensor([3, 1]), torch.Size([3, 1])], ids=type)
def test_window_is_anything_indexable(device, window):
    problem = Problem(window=(3, 1), sq=20, sk=30)
    q, k, v = (x.to(device) for x in problem.inputs()[:3])
    expected = problem.call(q, k, v)[0]
    assert torch.equal(problem.call(q, k, v, window_size=window)[0], expected)


def test_causal_overrides_the_right_bound(device):
    q = torch.randn(1, 20, 2, 8, device=device)
    assert torch.equal(flash_attn.flash_attn_func(q, q, q, causal=True, window_size=(5, 5)),
                       flash_attn.flash_attn_func(q, q, q, window_size=(5, 0)))


def test_default_scale_is_of_the_query_head_dim(device):
    problem = Problem(d=24, dv=64)
    q, k, v = (x.to(device) for x in problem.inputs()[:3])
    assert torch.equal(problem.call(q, k, v)[0], problem.call(q, k, v, softmax_scale=24 ** -0.5)[0])


# Autograd.


def test_backward_may_be_repeated(device):
    """retain_graph: saved tensors and dout are never modified."""
    inputs = Problem(torch.float16, causal=True).inputs()
    q, k, v = (x.to(device).requires_grad_() for x in inputs[:3])
    out = flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)
    dout = inputs.dout.to(device)
    before = dout.clone()
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(map(torch.equal, first, again))
    assert torch.equal(dout, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_lse_alone(device, dtype):
    """d lse_i / d q_i is the mean key: out with v = k, times the scale."""
    problem = Problem(dtype, sq=20, sk=30)
    inputs = problem.inputs()
    q, k, v = (x.to(device).requires_grad_() for x in inputs[:3])
    lse = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)[1]
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), inputs.dlse.to(device))
    assert not dv.any()
    problem.judge(problem.run(inputs._replace(dout=torch.zeros_like(inputs.dout)), device),
                  inputs._replace(dout=torch.zeros_like(inputs.dout)))
    mean_key, _ = reference.attention(*(x.detach().cpu() for x in (q, k, k)))
    expected = inputs.dlse.transpose(1, 2)[..., None] * mean_key * 32 ** -0.5
    torch.testing.assert_close(dq.cpu().float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_lse_merges_chunks_of_keys(device):
    """What ring attention does: two calls over halves of the keys, merged by lse, gradients included."""
    inputs = Problem(sq=33, sk=80).inputs()
    q, k, v = (x.to(device).requires_grad_() for x in inputs[:3])
    dout = inputs.dout.to(device)
    whole = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v), (q, k, v), dout)
    parts = [flash_attn.flash_attn_func(q, k[:, half], v[:, half], return_attn_probs=True)[:2]
             for half in (slice(0, 50), slice(50, 80))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(out * (part - lse).exp().transpose(1, 2)[..., None] for out, part in parts)
    for ours, expected in zip(torch.autograd.grad(out, (q, k, v), dout), whole):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_only_some_inputs_want_a_gradient(device, wanted):
    inputs = Problem().inputs()
    given = {name: getattr(inputs, name).to(device).requires_grad_(name in wanted) for name in "qkv"}
    expected = Problem().run(inputs, device)
    flash_attn.flash_attn_func(**given).backward(inputs.dout.to(device))
    plain = Problem().run(inputs._replace(dlse=torch.zeros_like(inputs.dlse)), device)
    assert expected.out.shape == plain.out.shape
    for name, x in given.items():
        if name in wanted:
            torch.testing.assert_close(x.grad.cpu(), getattr(plain, "d" + name))
        else:
            assert x.grad is None


def test_no_grad_saves_nothing(device):
    q = torch.randn(1, 9, 2, 8, device=device, requires_grad=True)
    with torch.no_grad():
        assert flash_attn.flash_attn_func(q, q, q).grad_fn is None
    with torch.inference_mode():
        assert flash_attn.flash_attn_func(q, q, q).is_inference()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, use_reentrant):
    """The recomputed forward draws the same dropout mask."""
    inputs = Problem(torch.bfloat16).inputs()
    q, k, v = (x.to(device).requires_grad_() for x in inputs[:3])
    dout = inputs.dout.to(device)

    def attention(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, deterministic=True)

    torch.manual_seed(3)
    plain = torch.autograd.grad(attention(q, k, v), (q, k, v), dout)
    torch.manual_seed(3)
    checkpoint(attention, q, k, v, use_reentrant=use_reentrant).backward(dout)
    assert all(map(torch.equal, plain, (q.grad, k.grad, v.grad)))


def test_saved_tensors_may_move(device):
    """Offloading hooks give backward other copies, with other pointers."""
    problem = Problem(causal=True, alibi="head", dropout_p=0.2, seqlens_q=(5, 9), seqlens_k=(8, 8))
    inputs = problem.inputs()
    expected = problem.run(inputs, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        ours = problem.run(inputs, device)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("which", ["q", "cu_seqlens"])
def test_changes_between_forward_and_backward_are_noticed(device, which):
    cu = lengths(device)
    qkv = qkv_tensor(device, packed=True)
    given = qkv.clone().requires_grad_()
    leaf = given * 1
    out = flash_attn.flash_attn_varlen_qkvpacked_func(leaf, cu, 15)
    with torch.no_grad():
        (leaf if which == "q" else cu).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_rng_state_replays_a_call(device):
    problem = Problem(dropout_p=0.5)
    inputs = problem.inputs()
    first, second = problem.run(inputs, device), problem.run(inputs, device)
    assert all(map(torch.equal, first, second))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    """Mixed dtypes are cast; gradients come back in the callers' dtypes; lse stays float32."""
    inputs = Problem().inputs()
    q = inputs.q.to(device).requires_grad_()
    k = inputs.k.to(device).half().requires_grad_()
    v = inputs.v.to(device).requires_grad_()
    with torch.autocast(device, dtype):
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected = flash_attn.flash_attn_func(*(x.detach().to(dtype) for x in (q, k, v)))
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert (q.grad.dtype, k.grad.dtype, v.grad.dtype) == (torch.float32, torch.float16, torch.float32)


def test_autocast_leaves_float64_alone():
    q = torch.randn(1, 5, 1, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn.flash_attn_func(q, q, q).dtype == torch.float64
        with pytest.raises(flash_attn.ArgumentTypeError, match="float64"):
            flash_attn.flash_attn_func(q, q.float(), q)


def test_autocast_keeps_slopes(device):
    q = torch.randn(1, 9, 2, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = flash_attn.flash_attn_func(q, q, q, alibi_slopes=torch.rand(2, device=device))
    assert out.dtype == torch.bfloat16


# Memory and layout.


def test_only_tensors_with_distant_channels_are_copied(monkeypatch):
    """The kernel gets the caller's own pointers, strided or not."""
    seen, c = {}, flash_attn._backend._C
    call = c.forward
    monkeypatch.setattr(c, "forward", lambda allocate, *values: (seen.update(zip(c.FIELDS, values)), call(allocate, *values)))
    q = torch.randn(2, 4, 20, 8).transpose(1, 2)
    k = torch.randn(2, 20, 4, 16)[..., :8]
    v = torch.randn(2, 20, 8, 4).transpose(2, 3)
    flash_attn.flash_attn_func(q, k, v)
    assert seen["q"] == (q.data_ptr(), q.stride())
    assert seen["k"] == (k.data_ptr(), k.stride())
    assert seen["v"][0] != v.data_ptr()


def test_the_extension_names_a_value_that_is_no_field():
    c = flash_attn._backend._C
    with pytest.raises(flash_attn.ArgumentTypeError, match="n_threads must be an int of at most 64 bits"):
        c.forward(None, c.CPU, c.FLOAT32, 2 ** 63)
    with pytest.raises(flash_attn.ArgumentTypeError, match="q must be None or a tuple"):
        c.forward(None, c.CPU, c.FLOAT32, *[1] * (c.FIELDS.index("q") - 2), (0, 1, 2, 3))
    with pytest.raises(flash_attn.ArgumentTypeError, match="fields"):
        c.choose(c.FORWARD, *[0] * (len(c.FIELDS) + 1))


def test_gradients_take_the_layout_of_their_tensors(device):
    """A transposed view gets a transposed gradient, so that the next step back needs no copy."""
    q = torch.randn(2, 4, 20, 8, device=device, requires_grad=True)
    flash_attn.flash_attn_func(*[q.transpose(1, 2)] * 3).sum().backward()
    assert q.grad.is_contiguous()


def test_inputs_are_not_written(device):
    inputs = Problem(torch.float16, dropout_p=0.1, causal=True).inputs()
    copies = [x.clone() for x in inputs]
    Problem(torch.float16, dropout_p=0.1, causal=True).run(inputs, device)
    assert all(map(torch.equal, inputs, copies))


def test_default_device_and_dtype_do_not_matter():
    """torch.set_default_device and set_default_dtype change what torch.empty returns, not us."""
    q = torch.randn(1, 9, 2, 8, dtype=torch.float16)
    expected = flash_attn.flash_attn_func(q, q, q)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        assert torch.equal(flash_attn.flash_attn_func(q, q, q), expected)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# info().


def test_info_describes_machine_and_kernels(capsys):
    flash_attn.info()
    text = capsys.readouterr().out
    for part in flash_attn.__version__, torch.__version__, "CPU instruction set", "kernels", "1/256":
        assert part in text


def test_info_tells_the_kernel_of_a_call(capsys):
    q = torch.randn(1, 9, 2, 8, dtype=torch.float64)
    flash_attn.info(q, q, q, causal=True, dropout_p=0.1)
    text = capsys.readouterr().out
    assert "forward: reference" in text and "backward: reference" in text and "26/256" in text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_info_takes_every_form(capsys, count):
    qkv = qkv_tensor("cpu")
    flash_attn.info(*forms(qkv, packed=False)[3 - count][1])
    assert "forward: " in capsys.readouterr().out


def test_kernel_can_be_pinned(monkeypatch, capsys):
    q = torch.randn(1, 9, 2, 8)
    monkeypatch.setenv("FLASH_ATTN_KERNEL", "reference")
    flash_attn.info(q, q, q)
    assert "forward: reference" in capsys.readouterr().out
