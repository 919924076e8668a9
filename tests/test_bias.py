"""Biases and masks: every broadcast, dtype and layout, alone and with everything else, values and gradients."""

from itertools import combinations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import _backend, flash_attn_func
from problem import DTYPES, Problem

INDICES = ["".join(chosen) for count in range(5) for chosen in combinations("bhqk", count)]


@pytest.fixture
def repeatable(monkeypatch):
    """dq has the same bits every time on a GPU too."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def check_allowing_cpu_only(problem, device):
    if device == "cuda" and problem.dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    return problem.check(device)


# Values and gradients.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("hides", [False, True], ids=["finite", "hides"])
def test_bias(device, dtype, indices, hides):
    sizes = dict(sq=23, sk=31, d=8) if dtype == torch.float64 else dict(sq=99, sk=203, d=40)
    problem = Problem(dtype, b=2, h=4, hk=2, bias=indices, bias_hides=hides, **sizes)
    check_allowing_cpu_only(problem, device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("indices", INDICES)
def test_mask(device, dtype, indices):
    sizes = dict(sq=23, sk=31, d=8) if dtype == torch.float64 else dict(sq=65, sk=400, d=64)
    check_allowing_cpu_only(Problem(dtype, b=2, h=4, hk=2, mask=indices, **sizes), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("indices", ["hqk", "bk"])
def test_dtype_of_bias_is_its_own(device, dtype, bias_dtype, indices):
    """Its gradient has it too."""
    ours = Problem(dtype, sq=70, sk=130, h=2, bias=indices, bias_dtype=bias_dtype).check(device)
    assert ours.dbias.dtype == bias_dtype


OPTIONS = [
    dict(causal=True), dict(causal=True, sq=200, sk=90), dict(window=(40, 9)), dict(window=(0, 0)),
    dict(dropout_p=0.3), dict(softcap=4.0), dict(alibi="batch"), dict(scale=0.0), dict(scale=-0.2),
    dict(seqused_k=(7, 150, 0)), dict(seqused_k=(200, 64, 199), causal=True), dict(h=3, hk=1, d=128, dv=64),
    dict(h=6, hk=3, softcap=9.0, alibi="head", dropout_p=0.2, causal=True, window=(150, 3), scale=0.3)]
BOTH = [("hqk", None), (None, "qk"), (None, "bk"), ("bhqk", "hqk"), ("qk", "bk"), ("bk", "bhqk"), ("hq", "h")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias, mask", BOTH)
def test_with_everything_else(device, options, bias, mask):
    dtype = DTYPES[(OPTIONS.index(options) + BOTH.index((bias, mask))) % len(DTYPES)]
    sizes = dict(b=3, sq=99, sk=200, h=2, d=32)
    Problem(dtype, **{**sizes, **options}, bias=bias, mask=mask, bias_hides=True).check(device)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (300, 1), (2, 17), (97, 193), (192, 192), (95, 385)], ids=str)
@pytest.mark.parametrize("bias, mask", [("bhqk", None), ("hqk", "bk"), ("k", "q"), ("q", "qk")])
def test_sizes(device, sizes, bias, mask):
    for hk in 1, 4:
        Problem(sq=sizes[0], sk=sizes[1], h=4, hk=hk, d=16, bias=bias, mask=mask).check(device)


ALIGNED = [dict(bias="hqk"), dict(bias="bhqk", bias_hides=True), dict(bias="qk", causal=True), dict(bias="bqk", window=(90, 30)),
           dict(mask="bqk"), dict(mask="k", causal=True), dict(mask="hq", window=(200, 0)), dict(bias="hqk", mask="bk", bias_hides=True),
           dict(bias="bhqk", mask="bhqk", hk=1, causal=True)]


@pytest.mark.parametrize("sizes", [(300, 200, 64, 64), (130, 520, 128, 96), (90, 1000, 40, 64), (1, 2056, 64, 64)], ids=str)
@pytest.mark.parametrize("options", ALIGNED, ids=str)
def test_rows_of_whole_vectors(device, sizes, options):
    """Biases that may travel 16 bytes at a time."""
    sq, sk, d, dv = sizes
    dtype = [torch.bfloat16, torch.float16][(ALIGNED.index(options) + d // 64) % 2]
    Problem(dtype, b=2, sq=sq, sk=sk, h=4, d=d, dv=dv, **options).check(device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("indices", ["", "k", "q", "b", "qk", "hqk", "bhqk"])
def test_zero_sizes(device, dtype, sizes, indices):
    """Where a bias still has elements, their gradient is 0."""
    b, sq, sk = sizes
    ours = check_allowing_cpu_only(Problem(dtype, b=b, sq=sq, sk=sk, bias=indices, mask=indices), device)
    assert not ours.dbias.any()


@pytest.mark.parametrize("hidden_by", ["bias", "mask"])
def test_hidden_rows_get_zero(device, hidden_by):
    """out 0, lse -inf and gradients 0, whatever reaches them."""
    problem = Problem(torch.bfloat16, sq=50, sk=70, h=2, bias="hqk", mask="qk")
    options, inputs = problem.options(), problem.inputs()
    hide = {"bias": ("attn_bias", -torch.inf), "mask": ("attn_mask", False)}[hidden_by]
    options[hide[0]][..., 20:31, :] = hide[1]
    inputs.dlse[..., 20:31] = 1e3
    ours = problem.run(inputs, device, attn_bias=options["attn_bias"], attn_mask=options["attn_mask"].to(device))
    assert not ours.out[:, 20:31].any() and not ours.dq[:, 20:31].any() and not ours.dbias[..., 20:31, :].any()
    assert ours.lse[..., 20:31].isneginf().all()
    assert all(x.isfinite().all() for x in (ours.out, ours.dq, ours.dk, ours.dv, ours.dbias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_biases(device, dtype):
    """Far beyond what exp can take, of either sign, and all but -inf."""
    problem = Problem(dtype, sq=60, sk=80, h=2, d=64, bias="hqk")
    bias = min(1e30, torch.finfo(dtype).max / 4) * problem.options()["attn_bias"].sign()
    bias[..., ::7] = torch.finfo(dtype).min
    ours = problem.run(device=device, attn_bias=bias)
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_finite_bias_hides(device, dtype):
    """As models that mask by addition have it: rows with nothing else are uniform, all others see only the rest."""
    problem = Problem(dtype, b=1, sq=200, sk=400, h=2, d=64, bias="qk")
    inputs, least = problem.inputs(), torch.finfo(dtype).min
    seen = torch.arange(400) < torch.arange(200)[:, None]                   # none in row 0; the last block is hidden from all
    ours = problem.run(inputs, device, attn_bias=torch.zeros(1, 1, 200, 400, dtype=dtype).masked_fill(~seen, least))
    theirs = problem.run(inputs, device, attn_bias=torch.zeros(1, 1, 200, 400, dtype=dtype), attn_mask=seen.to(device))
    torch.testing.assert_close(ours.out[:, 1:], theirs.out[:, 1:], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours.lse[..., 1:], theirs.lse[..., 1:], rtol=1e-3, atol=1e-3)
    if dtype != torch.float16:                                              # whose least does not swallow the score
        mean = inputs.v.float().mean(1)
        torch.testing.assert_close(ours.out[:, 0].float(), mean, rtol=2e-2, atol=1e-2)
        assert (ours.lse[..., 0] < least / 2).all() and ours.lse[..., 0].isfinite().all()


@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_hidden_keys_cost_nothing(device, kind):
    """What a tile holds that mask or bias hide from everyone is not read: NaN would show. On a GPU this holds for masks."""
    if device == "cuda" and kind == "bias":
        pytest.skip("a GPU does not look for tiles of -inf")
    problem = Problem(torch.bfloat16, b=2, sq=300, sk=2048, h=2, d=64)
    inputs = problem.inputs()
    seen = torch.arange(2048) < torch.tensor([500, 1000]).view(2, 1, 1, 1)
    expected = problem.run(inputs, device, attn_mask=seen.to(device))
    for x in inputs.k, inputs.v:
        x[:, 1536:] = torch.nan
    option = seen if kind == "mask" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    ours = problem.run(inputs, device, **{f"attn_{kind}": option.to(device)})
    for name, a, b in zip(ours._fields[:5], ours, expected):            # of a block one may be cut where the other is not
        close = {} if name == "lse" else dict(atol=1e-3, rtol=1.6e-2)
        torch.testing.assert_close(a, b, msg=name, **close)
    assert not ours.dk[:, 1536:].any() and not ours.dv[:, 1536:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_inside_a_window(device, dtype):
    """Keys that nobody sees, at the end of one block of keys and the start of the next, with a window over both."""
    problem = Problem(dtype, sq=66, sk=223, window=(57, -1), d=40)
    mask = torch.ones(2, 1, 1, 223, dtype=torch.bool)
    mask[..., 90:140] = False
    inputs = problem.inputs()
    ours = problem.run(inputs, device, attn_mask=mask.to(device))
    expected = problem.run(inputs, device, attn_mask=mask.expand(-1, -1, 66, -1).contiguous().to(device))
    for name, a, b in zip(ours._fields[:5], ours, expected):
        close = {} if dtype == torch.float32 or name == "lse" else dict(atol=4e-3, rtol=1.6e-2)
        torch.testing.assert_close(a, b, msg=name, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sk", [1024, 1101])
def test_large_gradients(device, dtype, sk):
    """More than a cache holds."""
    Problem(dtype, b=1, sq=1100, sk=sk, h=4, hk=2, d=16, bias="hqk").check(device)


# Against other definitions.


@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_as_scaled_dot_product_attention(device, kind):
    """Its attn_mask, its values and its gradients, the bias's included."""
    b, h, s, d = 2, 3, 90, 16
    q, k, v = (torch.randn(b, h, s, d, device=device, requires_grad=True) for _ in range(3))
    mask = {"bool": torch.rand(b, 1, s, s) < 0.7, "float": torch.randn(h, s, s),
            "padding": torch.arange(s) < torch.tensor([50, 90]).view(b, 1, 1, 1)}[kind].to(device)
    given = [q, k, v] + ([mask.requires_grad_()] if kind == "float" else [])
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    dout = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(out, given, dout) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_float_causal_mask_is_causal(device):
    q, k, v = (torch.randn(2, 150, 2, 32, device=device) for _ in range(3))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(150, device=device)
    for bias in dict(attn_bias=mask), dict(attn_mask=mask), dict(attn_mask=mask == 0):
        torch.testing.assert_close(flash_attn_func(q, k, v, **bias), flash_attn_func(q, k, v, causal=True))


def test_a_padding_mask_is_seqused_k(device):
    problem = Problem(torch.bfloat16, b=3, sq=130, sk=300, h=4, hk=2, seqused_k=(300, 1, 170))
    inputs = problem.inputs()
    plain = type(inputs)(*(x.nan_to_num() for x in inputs))
    seen = torch.arange(300, device=device) < torch.tensor([300, 1, 170], device=device).view(3, 1, 1, 1)
    ours = Problem(torch.bfloat16, b=3, sq=130, sk=300, h=4, hk=2).run(plain, device, attn_mask=seen)
    for name, a, b in zip(ours._fields, ours, problem.run(inputs, device)):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, msg=name)


# Shapes and layouts.


@pytest.mark.parametrize("shape", [(), (1,), (70,), (50, 1), (50, 70), (2, 1, 70), (2, 50, 70), (1, 50, 70)], ids=str)
@pytest.mark.usefixtures("repeatable")
def test_fewer_dimensions(device, shape):
    """As torch broadcasts; the gradient has the bias's shape."""
    problem = Problem(b=3, sq=50, sk=70, h=2)
    bias = torch.randn(shape)
    full = (1,) * (4 - len(shape)) + shape
    short, long = (problem.run(device=device, attn_bias=x) for x in (bias, bias.view(full)))
    assert short.dbias.shape == shape and torch.equal(short.dbias, long.dbias.view(shape))
    assert all(map(torch.equal, short[:5], long[:5]))


def as_t5(x):
    """Heads side by side in memory, as an embedding of distances yields them."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def queries_side_by_side(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def inside(x):
    """A window at an odd address into a tensor of other values."""
    larger = x.new_full([n + 3 for n in x.shape], True if x.dtype == torch.bool else torch.nan)
    view = larger[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def every_other_key(x):
    larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), True if x.dtype == torch.bool else torch.nan)
    larger[..., ::2] = x
    return larger[..., ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [as_t5, queries_side_by_side, inside, every_other_key], ids=lambda f: f.__name__)
@pytest.mark.usefixtures("repeatable")
def test_layouts(device, dtype, layout):
    """The same bits as from contiguous tensors."""
    problem = Problem(dtype, sq=67, sk=203, h=4, hk=2, bias="bhqk", mask="bqk", bias_hides=True)
    options = {name: problem.options()[name].to(device) for name in ("attn_bias", "attn_mask")}
    plain = problem.run(device=device, **options)
    viewed = problem.run(device=device, **{name: layout(x) for name, x in options.items()})
    assert all(map(torch.equal, plain, viewed))


@pytest.mark.parametrize("indices", ["qk", "bk", "hq", "k", "q"])
@pytest.mark.parametrize("first_by", ["view", "reshape", "copy"])
@pytest.mark.usefixtures("repeatable")
def test_expanded_biases(device, indices, first_by):
    """What was expanded gets the gradient of the unexpanded call, through views or anything else before it."""
    problem = Problem(b=3, sq=40, sk=60, h=2, bias=indices)
    inputs, small = problem.inputs(), problem.options()["attn_bias"].to(device)
    leaf = {"view": small[:, :, :, :], "reshape": small.flatten(), "copy": small}[first_by].clone().requires_grad_()
    bias = leaf.view(small.shape) if first_by != "copy" else leaf * 1
    q, k, v = (x.to(device).requires_grad_() for x in inputs[:3])
    out, lse, _ = problem.call(q, k, v, attn_bias=bias.expand(3, 2, 40, 60))
    given = (leaf, q, k, v)
    dbias, dq, dk, dv = torch.autograd.grad((out, lse), given, (inputs.dout.to(device), inputs.dlse.to(device)))
    expected = problem.run(inputs, device)
    assert torch.equal(dbias.view(small.shape).cpu(), expected.dbias)
    assert all(map(torch.equal, (dq.cpu(), dk.cpu(), dv.cpu()), expected[2:5]))


@pytest.mark.usefixtures("repeatable")
def test_an_expanded_leaf_has_a_gradient_of_its_own_shape(device):
    """Nobody sums it: each element gets its own."""
    problem = Problem(b=3, sq=40, sk=60, h=2, bias="qk")
    full = problem.options()["attn_bias"].expand(3, 2, 40, 60)
    ours = problem.run(device=device, attn_bias=full)               # run makes a leaf of it
    expected = problem.run(device=device, attn_bias=full.contiguous())
    assert ours.dbias.shape == full.shape and torch.equal(ours.dbias, expected.dbias)
    assert not torch.equal(ours.dbias[0], ours.dbias[1])


def test_expansion_costs_no_memory(device, monkeypatch):
    """Neither a copy of the bias, nor a gradient of the expanded shape, nor scratch of it."""
    b, s, h = 4, 512, 4
    bias, q = torch.randn(s, s, device=device, requires_grad=True), torch.randn(b, s, h, 16, device=device)
    q.requires_grad_()
    sizes = []

    def counted(allocate):
        return lambda *args, **kwargs: sizes.append(x := allocate(*args, **kwargs)) or x

    monkeypatch.setattr(_backend, "empty", counted(_backend.empty))
    flash_attn_func(q, q, q, attn_bias=bias.expand(b, h, s, s)).sum().backward()
    assert bias.grad.shape == (s, s)
    assert max(x.nbytes for x in sizes) < b * h * s * s * 4 / 2


@pytest.mark.parametrize("which", ["mask", "bias"])
def test_padding_masks_take_linear_memory(device, monkeypatch, which):
    taken = {}

    def counted(allocate, s):
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            taken[s] = taken.get(s, 0) + x.nbytes
            return x
        return call

    allocate, heads = _backend.empty, 1 if device == "cpu" else 64     # enough for a GPU not to split the keys, which takes memory
    for s in 1024, 4096:
        monkeypatch.setattr(_backend, "empty", counted(allocate, s))
        q = torch.randn(1, s, heads, 16, device=device, requires_grad=True)
        seen = torch.arange(s, device=device).view(1, 1, 1, s) < s // 5
        given = dict(attn_mask=seen) if which == "mask" else dict(attn_bias=seen.float().requires_grad_())
        flash_attn_func(q, q, q, **given).sum().backward()
    assert taken[4096] < 5 * taken[1024]


# Autograd.


@pytest.mark.parametrize("wanted", ["bias", "q", "v", "none"])
@pytest.mark.usefixtures("repeatable")
def test_each_tensor_may_want_its_gradient_alone(device, wanted):
    problem = Problem(sq=30, sk=40, bias="hqk", mask="k")
    inputs, expected = problem.inputs(), problem.run(device=device)
    tensors = dict(zip("qkv", (x.to(device) for x in inputs[:3])), bias=problem.options()["attn_bias"].to(device))
    for name, x in tensors.items():
        x.requires_grad_(name == wanted)
    out, lse, _ = problem.call(*(tensors[name] for name in "qkv"), attn_bias=tensors["bias"])
    assert out.requires_grad == (wanted != "none")
    if wanted == "none":
        return
    torch.autograd.backward((out, lse), (inputs.dout.to(device), inputs.dlse.to(device)))
    for name, x in tensors.items():
        assert (x.grad is not None) == (name == wanted)
    assert torch.equal(tensors[wanted].grad.cpu(), getattr(expected, f"d{wanted}"))


@pytest.mark.usefixtures("repeatable")
def test_packed_tensors(device):
    qkv = torch.randn(2, 30, 3, 2, 16, device=device, requires_grad=True)
    bias = torch.randn(2, 30, 30, device=device, requires_grad=True)
    mask = torch.rand(2, 1, 1, 30, device=device) < 0.8
    kinds = [flash_attn.flash_attn_func(*qkv.unbind(2), attn_bias=bias, attn_mask=mask),
             flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], attn_bias=bias, attn_mask=mask),
             flash_attn.flash_attn_qkvpacked_func(qkv, attn_bias=bias, attn_mask=mask)]
    gradients = [torch.autograd.grad(out.square().sum(), (qkv, bias)) for out in kinds]
    for out, gradient in zip(kinds, gradients):
        assert torch.equal(out, kinds[0]) and all(map(torch.equal, gradient, gradients[0]))


def test_autocast_leaves_the_bias_alone(device):
    q = torch.randn(1, 40, 2, 16, device=device, requires_grad=True)
    bias = torch.full((40, 40), 1 + 2.0 ** -12, device=device).tril().requires_grad_()      # lost in bfloat16
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse, _ = flash_attn_func(q, q, q, attn_bias=bias, return_attn_probs=True)
    half = q.detach().bfloat16().requires_grad_()
    out_half, lse_half, _ = flash_attn_func(half, half, half, attn_bias=bias, return_attn_probs=True)
    assert torch.equal(out, out_half) and torch.equal(lse, lse_half)
    dbias, = torch.autograd.grad(out.float().sum(), bias)
    assert dbias.dtype == torch.float32
    rounded = flash_attn_func(half, half, half, attn_bias=bias.bfloat16(), return_attn_probs=True)[1]
    assert not torch.equal(rounded, lse)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.usefixtures("repeatable")
def test_checkpointing(device, use_reentrant):
    q = torch.randn(1, 40, 2, 16, device=device, requires_grad=True)
    bias = torch.randn(2, 40, 40, device=device, requires_grad=True)
    mask = torch.rand(40, 40, device=device) < 0.7

    def attention(q, bias):
        return flash_attn_func(q, q, q, attn_bias=bias, attn_mask=mask)

    plain = torch.autograd.grad(attention(q, bias).square().sum(), (q, bias))
    checkpoint(attention, q, bias, use_reentrant=use_reentrant).square().sum().backward()
    assert all(map(torch.equal, plain, (q.grad, bias.grad)))


@pytest.mark.parametrize("which", ["bias", "mask"])
def test_changes_between_forward_and_backward_are_noticed(device, which):
    q = torch.randn(1, 9, 2, 8, device=device, requires_grad=True)
    bias, mask = torch.randn(9, 9, device=device), torch.ones(9, 9, dtype=torch.bool, device=device)
    out = flash_attn_func(q, q, q, attn_bias=bias, attn_mask=mask)
    bias.zero_() if which == "bias" else mask.fill_(False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_not_written(device):
    problem = Problem(sq=30, sk=40, bias="hqk", mask="bk", bias_hides=True)
    options = {name: problem.options()[name].to(device) for name in ("attn_bias", "attn_mask")}
    copies = {name: x.clone() for name, x in options.items()}
    problem.run(device=device, **options)
    assert all(torch.equal(x, copies[name]) for name, x in options.items())


def test_info_takes_them(device):
    from flash_attn.info import report
    q = torch.zeros(1, 5, 2, 8, device=device)
    text = report(q, q, q, attn_bias=torch.zeros(5, 5, device=device, requires_grad=True),
                  attn_mask=torch.ones(5, dtype=torch.bool, device=device))
    assert "forward: no kernel" not in text and "backward: no kernel" not in text
