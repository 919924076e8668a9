"""flash_attn.nn.MultiheadAttention against torch's over the product of their options, values and all
gradients; and what is ours alone: empty rows, nested tensors in training, linear memory, refusals.

A result may be as far from torch's module in float64 as torch's own in the same dtype is, times FACTOR, plus
FLOOR roundings of the largest value, or of 1: inputs are of order 1, and gradients may cancel to 0.
"""

import copy
import io
import itertools
import pickle
from dataclasses import dataclass, fields, replace as changed
from typing import Optional

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import flash_attn
from flash_attn import ArgumentTypeError, ArgumentValueError, UnsupportedError
from flash_attn.nn import MultiheadAttention

FACTOR, FLOOR = 4, 32

# A bool mask beside a float one: torch warns, and takes it.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


@dataclass(frozen=True)
class Case:
    """One way to build and call the module."""

    layout: str = "batch first"         # or "sequence first", "unbatched"
    inputs: str = "one"                 # or "two" (key is value), "three"
    dims: tuple = (None, None)          # kdim, vdim
    bias: bool = True
    bias_kv: bool = False
    zero_attn: bool = False
    padding: Optional[str] = None       # or "bool", "float", "plain float": 0 and -inf
    mask: Optional[str] = None          # or "bool", "float", "3-d bool", "3-d float", "causal"
    hint: bool = False                  # is_causal, where the mask is causal
    weights: Optional[str] = None       # or "mean", "each head"
    training: bool = True
    dtype: torch.dtype = torch.float32
    b: int = 2
    sq: int = 7
    sk: int = 7
    heads: int = 2
    channels: int = 24
    seed: int = 0

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def build(self, cls, dtype, device):
        torch.manual_seed(self.seed)
        kdim, vdim = self.dims
        module = cls(self.channels, self.heads, bias=self.bias, add_bias_kv=self.bias_kv,
                     add_zero_attn=self.zero_attn, kdim=kdim, vdim=vdim,
                     batch_first=self.layout == "batch first")
        with torch.no_grad():           # torch initialises biases with 0, which hides what they do
            for parameter in module.parameters():
                parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
        return module.to(self.dtype).to(device, dtype).train(self.training)

    def arguments(self):
        """(query, key, value, keywords) in the dtype of the case, on the CPU; the same tensor more than once
        where `inputs` says so."""
        generator = self.generator()
        kdim, vdim = (dim or self.channels for dim in self.dims)
        sk = self.sq if self.inputs == "one" else self.sk

        def rows(length, channels):
            shape = {"batch first": (self.b, length, channels), "sequence first": (length, self.b, channels),
                     "unbatched": (length, channels)}[self.layout]
            return torch.randn(shape, generator=generator).to(self.dtype)
        query = rows(self.sq, self.channels)
        key = query if self.inputs == "one" else rows(sk, kdim)
        value = key if self.inputs != "three" else rows(sk, vdim)
        b = 1 if self.layout == "unbatched" else self.b
        options = dict(need_weights=self.weights is not None, average_attn_weights=self.weights == "mean")
        if self.padding:
            hidden = torch.rand(b, sk, generator=generator) < 0.4
            hidden[:, 0] = False                            # no query sees nothing: a test of its own
            padding = self.as_mask(hidden, self.padding, generator)
            options["key_padding_mask"] = padding[0] if self.layout == "unbatched" else padding
        if self.mask:
            shape = (b * self.heads, self.sq, sk) if self.mask.startswith("3-d") else (self.sq, sk)
            hidden = torch.rand(shape, generator=generator) < 0.4
            hidden[..., 0] = False
            if self.mask == "causal":
                hidden = torch.ones(shape, dtype=torch.bool).triu(1)
            kind = "bool" if self.mask == "causal" and self.padding != "float" else self.mask.split()[-1]
            options["attn_mask"] = self.as_mask(hidden, kind, generator)
            options["is_causal"] = self.hint and self.mask == "causal"
        return query, key, value, options

    def as_mask(self, hidden, kind, generator):
        if kind == "bool":
            return hidden
        values = torch.zeros(hidden.shape) if kind != "float" else torch.randn(hidden.shape,
                                                                               generator=generator)
        return values.masked_fill(hidden, -torch.inf).to(self.dtype)

    def run(self, cls, dtype, device="cpu"):
        """{name: value} of the outputs and of the gradients of all that has one."""
        module, leaves = self.build(cls, dtype, device), {}

        def moved(name, x):
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) not in leaves:
                x_moved = x.to(device) if x.dtype is torch.bool else x.to(device, dtype)
                fixed = {"key_padding_mask": self.padding == "plain float",
                         "attn_mask": self.mask == "causal"}
                wants = x.is_floating_point() and not fixed.get(name)
                leaves[id(x)] = name, x_moved.detach().requires_grad_(wants), x
            return leaves[id(x)][1]
        query, key, value, options = self.arguments()
        options = {name: moved(name, x) for name, x in options.items()}
        out, weights = module(moved("query", query), moved("key", key), moved("value", value), **options)
        results = {"out": out} if weights is None else {"out": out, "weights": weights}
        generator = self.generator().manual_seed(self.seed + 1)
        incoming = [torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in results.values()]
        wanted = {name: x for name, x, _ in leaves.values() if x.requires_grad}
        wanted.update(module.named_parameters())
        gradients = torch.autograd.grad(tuple(results.values()), tuple(wanted.values()), incoming)
        results.update(zip(wanted, gradients))
        return {name: x.detach().cpu() for name, x in results.items()}

    def check(self, device="cpu"):
        exact = self.run(nn.MultiheadAttention, torch.float64)
        composed = self.run(nn.MultiheadAttention, self.dtype, device)
        ours = self.run(MultiheadAttention, self.dtype, device)
        assert ours.keys() == exact.keys()
        for name, x in ours.items():
            assert x.shape == exact[name].shape and x.dtype == composed[name].dtype, name
            assert_as_close(name, x, exact[name], composed[name])


def assert_as_close(name, ours, exact, composed):
    if exact.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name} is not finite"
    error, theirs = ((x.double() - exact).abs().max().item() for x in (ours, composed))
    allowed = FACTOR * theirs + FLOOR * torch.finfo(ours.dtype).eps * max(1, exact.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


CASES = st.builds(
    Case,
    layout=st.sampled_from(["batch first", "sequence first", "unbatched"]),
    inputs=st.sampled_from(["one", "two", "three"]),
    bias=st.booleans(), bias_kv=st.booleans(), zero_attn=st.booleans(),
    padding=st.sampled_from([None, "bool", "float", "plain float"]),
    mask=st.sampled_from([None, "bool", "float", "3-d bool", "3-d float", "causal"]),
    hint=st.booleans(), weights=st.sampled_from([None, None, "mean", "each head"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    b=st.integers(1, 3), sq=st.integers(1, 18), sk=st.integers(1, 18), heads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000))


def settled(case, device="cpu"):
    """The case with what torch or the device does not take made legal."""
    if device == "cuda" and case.dtype is torch.float64:
        case = changed(case, dtype=torch.float32)
    if case.inputs == "three":
        dims = [(None, None), (8, None), (24, 40), (16, 16)][case.seed % 4]
    else:
        dims = (None, None) if case.inputs == "one" or case.seed % 2 else (16, 16)
    if case.hint and (case.bias_kv or case.zero_attn):      # torch hides the added keys: a test of its own
        case = changed(case, hint=False)
    return changed(case, dims=dims)


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """Sizes of tests take longer to share than to compute."""
    torch.set_num_threads(1)


@settings(max_examples=250)
@given(case=CASES)
def test_as_torch(device, case):
    settled(case, device).check(device)


def pairs():
    """Few cases in which every pair of options meets: each row of choices is drawn where most pairs are
    new."""
    choices = dict(
        layout=["batch first", "sequence first", "unbatched"], inputs=["one", "two", "three"],
        bias=[True, False], bias_kv=[False, True], zero_attn=[False, True],
        padding=[None, "bool", "float", "plain float"],
        mask=[None, "bool", "float", "3-d bool", "3-d float", "causal"], hint=[False, True],
        weights=[None, "mean", "each head"], dtype=[torch.float32, torch.bfloat16])
    generator, seen = torch.Generator().manual_seed(5), set()

    def draw():
        return tuple(values[int(torch.randint(len(values), (), generator=generator))]
                     for values in choices.values())

    def new(row):
        return set(itertools.combinations(enumerate(row), 2)) - seen
    total = sum(len(a) * len(b) for a, b in itertools.combinations(choices.values(), 2))
    while len(seen) < total:
        row = max((draw() for _ in range(60)), key=lambda row: len(new(row)))
        if new(row):
            seen |= new(row)
            yield settled(Case(**dict(zip(choices, row)), sq=33, sk=20, seed=len(seen)))


@pytest.mark.parametrize("case", list(pairs()), ids=lambda case: "-".join(
    f"{field.name}={getattr(case, field.name)}" for field in fields(Case)
    if getattr(case, field.name) != field.default
    and field.name not in ("seed", "sq", "sk")).replace(" ", "_"))
def test_every_pair_of_options(device, case):
    settled(case, device).check(device)


def twins(device="cpu", channels=16, heads=2, batch_first=True, **options):
    """(torch's module, ours) of the same parameters."""
    theirs = nn.MultiheadAttention(channels, heads, batch_first=batch_first, **options).to(device)
    ours = MultiheadAttention(channels, heads, batch_first=batch_first, **options).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# --------------------------------------------------------------------------------------- a module of torch's


@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(add_bias_kv=True, add_zero_attn=True),
                                     dict(kdim=8, vdim=12), dict(dropout=0.5, batch_first=True)], ids=str)
def test_construction_and_state(options):
    """Same draws, same generator afterwards, same keys; state dicts load both ways."""
    built, states = [], []
    for cls in nn.MultiheadAttention, MultiheadAttention:
        torch.manual_seed(3)
        built.append(cls(16, 2, **options))
        states.append(torch.get_rng_state())
    theirs, ours = built
    assert torch.equal(*states)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))
    with torch.no_grad():
        ours.out_proj.weight.add_(1)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.out_proj.weight, ours.out_proj.weight)
    assert isinstance(ours, nn.MultiheadAttention) and repr(ours) == repr(theirs)
    assert MultiheadAttention(16, 2, dtype=torch.bfloat16, device="meta").in_proj_weight.is_meta
    with pytest.raises(AssertionError, match="divisible"):
        MultiheadAttention(16, 3)


def test_copies():
    """deepcopy, pickle and torch.save give a module that computes the same and owns its parameters."""
    module, x = MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)),
                 torch.load(stored, weights_only=False)):
        assert type(twin) is MultiheadAttention
        assert torch.equal(twin(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0])
        assert twin.in_proj_weight is not module.in_proj_weight


def test_grad_modes(device):
    """Without gradients the values stay; a frozen parameter gets none."""
    _, module = twins(device)
    x = torch.randn(2, 9, 16, device=device)
    out = module(x, x, x, need_weights=False)[0]
    for mode in torch.no_grad(), torch.inference_mode():
        with mode:
            plain = module(x, x, x, need_weights=False)[0]
        assert torch.equal(plain, out) and not plain.requires_grad
    module.in_proj_weight.requires_grad_(False)
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert module.in_proj_weight.grad is None and module.in_proj_bias.grad is not None


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype, weights):
    """Results have torch's dtypes and lie near those in float32; parameters' gradients are float32."""
    theirs, ours = twins(device)
    x = torch.randn(2, 33, 16, device=device)
    padding = torch.arange(33, device=device) >= torch.tensor([[20], [33]], device=device)
    exact = theirs(x, x, x, key_padding_mask=padding)[0]
    with torch.autocast(device, dtype):
        reference = theirs(x, x, x, key_padding_mask=padding, need_weights=weights)
        results = ours(x, x, x, key_padding_mask=padding, need_weights=weights)
    for a, b in zip(results, reference):
        assert a is b is None or a.dtype is b.dtype
    torch.testing.assert_close(results[0].float(), exact, rtol=0.02, atol=0.02)
    results[0].sum().backward()
    assert ours.in_proj_weight.grad.dtype is torch.float32


def test_dropout(device):
    """It is flash_attn_func's, drawn from torch's generator; off in eval mode."""
    theirs, ours = twins(device, dropout=0.25)
    x = torch.randn(2, 33, 16, device=device)
    torch.manual_seed(1)
    out = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    qkv = nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).view(2, 33, 3, 2, 8)
    assert torch.equal(out, ours.out_proj(flash_attn.flash_attn_qkvpacked_func(qkv, 0.25).flatten(2)))
    assert not torch.equal(out, ours(x, x, x, need_weights=False)[0])
    torch.manual_seed(2)
    with_weights = ours(x, x, x)
    assert (with_weights[1] == 0).any()
    torch.manual_seed(2)
    torch.testing.assert_close(with_weights, theirs(x, x, x))
    theirs.eval(), ours.eval()
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("inputs", [1, 3])
def test_dropout_of_everything(device, inputs, weights):
    """p = 1 as torch has it: out_proj's bias remains, and gradients are 0, not None."""
    for module in twins(device, dropout=1.0)[device == "cuda":]:        # torch's has NaN on a GPU
        torch.nn.init.ones_(module.out_proj.bias)
        xs = [torch.randn(2, 5, 16, device=device, requires_grad=True) for _ in range(inputs)] * (3 // inputs)
        out = module(*xs, need_weights=weights)[0]
        assert torch.equal(out, torch.ones_like(out))
        out.sum().backward()
        for x in (*xs, module.in_proj_weight, module.in_proj_bias):
            assert torch.equal(x.grad, torch.zeros_like(x))


def test_distributed_data_parallel(tmp_path):
    """Every parameter gets its gradient in every step, in the process group too."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = MultiheadAttention(16, 2, batch_first=True, dropout=1.0, kdim=8, vdim=8)
        parallel = nn.parallel.DistributedDataParallel(module)
        q, kv = torch.randn(2, 5, 16), torch.randn(2, 6, 8)
        for dropout in 1.0, 0.0:
            module.dropout = dropout
            for _ in range(2):                              # an unused parameter is an error in the second
                parallel(q, kv, kv, need_weights=False)[0].sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_gradcheck_in_float64():
    module = MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(4, 4, dtype=torch.float64).masked_fill(torch.eye(4).bool(), -torch.inf)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    assert torch.autograd.gradcheck(lambda x: module(x, x, x, padding, False, mask)[0], x)


# ------------------------------------------------------------------------------------------------- ours alone


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing(device, kind, training, weights):
    """Has 0 before out_proj in every mode, and leaves no trace in the gradients of what others see."""
    _, module = twins(device)
    module.train(training)
    torch.nn.init.normal_(module.out_proj.bias)
    x = torch.randn(2, 9, 16, device=device, requires_grad=True)
    hidden = torch.rand(9, 9, device=device) < 0.3
    hidden[:, 0], hidden[4] = False, True
    padding = torch.zeros(2, 9, dtype=torch.bool, device=device)
    padding[1] = True

    def as_mask(x):
        return x if kind == "bool" else torch.zeros(x.shape, device=device).masked_fill(x, -torch.inf)
    out, matrix = module(x, x, x, as_mask(padding), weights, as_mask(hidden))
    bias = module.out_proj.bias.expand(9, 16)
    torch.testing.assert_close(out[1], bias)
    torch.testing.assert_close(out[0, 4], bias[0])
    assert not weights or torch.equal(matrix[1], torch.zeros_like(matrix[1])) and (matrix[0, 4] == 0).all()
    gradient, = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0, 0] != 0).any()


def test_a_learned_mask_is_read_whatever_is_promised(device):
    """is_causal lets us skip a mask, but not one that learns."""
    _, module = twins(device)
    x = torch.randn(2, 9, 16, device=device)
    mask = torch.randn(9, 9, device=device, requires_grad=True)
    hinted = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert torch.equal(hinted, module(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_the_causal_hint(device):
    """A mask that is not read: the promise decides, beside a key_padding_mask too."""
    _, module = twins(device)
    x = torch.randn(2, 9, 16, device=device)
    causal = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1)
    padding = torch.arange(9, device=device) >= torch.tensor([[5], [9]], device=device)
    for masks in {}, {"key_padding_mask": padding}:
        told = module(x, x, x, attn_mask=torch.zeros_like(causal), is_causal=True, need_weights=False,
                      **masks)
        torch.testing.assert_close(told[0], module(x, x, x, attn_mask=causal, need_weights=False, **masks)[0])


def test_the_causal_hint_keeps_added_keys(device):
    """Every query sees bias_k, as it does without the hint; torch hides it from all but the last one."""
    theirs, ours = twins(device, add_bias_kv=True)
    x = torch.randn(2, 9, 16, device=device)
    causal = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1)
    out = ours(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(out, theirs(x, x, x, attn_mask=causal)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*is_fx_tracing")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("options", [{}, dict(add_bias_kv=True), dict(kdim=8, vdim=8)], ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_nested_tensors(device, layout, options, weights):
    """Each sequence as if it were alone, and its gradients; torch takes them in eval mode only."""
    _, module = twins(device, **options)
    lengths = [5, 1, 12]
    rows = [torch.randn(length, 16, device=device) for length in lengths]
    memories = rows if "kdim" not in options else [torch.randn(length + 1, 8, device=device)
                                                   for length in lengths]
    leaves = [x.clone().requires_grad_() for x in rows]
    query = torch.nested.as_nested_tensor(leaves, layout=layout)
    key = query if memories is rows else torch.nested.as_nested_tensor(memories, layout=layout)
    out, matrix = module(query, key, key, need_weights=weights)
    assert out.is_nested and out.layout is layout and (out + query).is_nested
    outs = out.unbind()
    torch.autograd.backward(sum(x.square().sum() for x in outs))
    for i, (x, memory) in enumerate(zip(rows, memories)):
        x = x.clone().requires_grad_()
        alone, its_matrix = module(x, *(x if memory is rows[i] else memory for _ in "kv"))
        torch.testing.assert_close(outs[i], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(leaves[i].grad, torch.autograd.grad(alone.square().sum(), x)[0],
                                   rtol=1e-4, atol=1e-5)
        if weights:
            added = its_matrix.shape[1] - len(memory)
            expected = torch.zeros_like(matrix[i])
            expected[:len(x), :len(memory)] = its_matrix[:, :len(memory)]
            if added:
                expected[:len(x), -added:] = its_matrix[:, -added:]
            torch.testing.assert_close(matrix[i], expected, rtol=1e-4, atol=1e-5)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest tensor that anything makes, kernels' scratch included."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("masks", ["none", "padding", "float padding", "causal"])
def test_memory_is_linear(device, masks):
    """Nothing in forward or backward grows faster than the sequence. With weights it does, which shows that
    this test would see it."""
    _, module = twins(device, channels=32)

    def largest(s, weights):
        x = torch.randn(2, s, 32, device=device)
        padding = (torch.arange(s, device=device) >= torch.tensor([[s], [s // 2]], device=device))
        options = {"none": {}, "padding": dict(key_padding_mask=padding),
                   "float padding": dict(key_padding_mask=torch.zeros(2, s, device=device)
                                         .masked_fill(padding, -torch.inf)),
                   "causal": dict(is_causal=True, key_padding_mask=padding,
                                  attn_mask=torch.ones(1, 1, device=device).bool().expand(s, s))}[masks]
        with LargestTensor() as seen:
            module(x, x, x, need_weights=weights, **options)[0].sum().backward()
        return seen.largest
    assert largest(2048, False) < 2.2 * largest(1024, False)
    assert largest(1024, True) > 3.5 * largest(512, True)


def test_long_padding(device):
    """A float mask of 0 and -inf is a bool mask, at lengths at which GPUs get both too."""
    _, module = twins(device)
    x = torch.randn(2, 1030, 16, device=device, requires_grad=True)
    padding = torch.arange(1030, device=device) >= torch.tensor([[900], [64]], device=device)
    results = []
    for mask in padding, torch.zeros(2, 1030, device=device).masked_fill(padding, -torch.inf):
        out = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_host_cost():
    """Fewer operators than torch's module calls: what a small problem costs on the host."""
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))
    counts = []
    for module in twins():
        x = torch.randn(2, 5, 16, requires_grad=True)
        with Count() as seen:
            module(x, x, x, need_weights=False)[0].sum().backward()
        counts.append(seen.count)
    assert counts[1] < 0.7 * counts[0], counts


# -------------------------------------------------------------------------------------------------- bad input


def test_bad_inputs():
    module = MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=12)
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 6, 8), torch.randn(2, 6, 12)
    for bad, message in [((q[None], k, v), "query must have 3"), ((q[..., 1:], k, v), "embed_dim = 16"),
                         ((q, k[0], v), "key must have 3"), ((q, v, v), "kdim = 8"), ((q, k, k), "vdim = 12"),
                         ((q, k, v[:, 1:]), r"length of key, \(2, 6\)"), ((q, k[1:], v[1:]), "batch of 1"),
                         ((q[0], k, v), "key must have 2")]:
        with pytest.raises(ArgumentValueError, match=message):
            module(*bad, need_weights=False)


def test_bad_masks(device):
    module = MultiheadAttention(16, 2, batch_first=True).to(device)
    x = torch.randn(3, 5, 16, device=device)
    wrong_shapes = [dict(key_padding_mask=torch.zeros(shape, device=device))
                    for shape in ((3, 4), (5,), (1, 5))]
    wrong_shapes += [dict(attn_mask=torch.zeros(shape, device=device))
                     for shape in ((5, 4), (1, 5, 5), (3, 5, 5), (5,), (3, 2, 5, 5))]
    for weights, masks in itertools.product((False, True), wrong_shapes):
        with pytest.raises(ArgumentValueError, match=f"{next(iter(masks))} must have shape"):
            module(x, x, x, need_weights=weights, **masks)
    with pytest.raises(ArgumentTypeError, match="key_padding_mask must have dtype torch.bool"):
        module(x, x, x, key_padding_mask=torch.zeros(3, 5, dtype=torch.int64, device=device))
    with pytest.raises(ArgumentTypeError, match="attn_mask must be a torch.Tensor"):
        module(x, x, x, attn_mask=[[0.0] * 5] * 5)
    with pytest.raises(ArgumentValueError, match="attn_mask must be on"):
        module(x, x, x, attn_mask=torch.zeros(5, 5, device="meta"))
    for training, weights in itertools.product((False, True), repeat=2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="is_causal=True needs attn_mask"):
            module.train(training)(x, x, x, is_causal=True, need_weights=weights)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_nested_tensors():
    module = MultiheadAttention(16, 2, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)])
    with pytest.raises(UnsupportedError, match="to_padded_tensor"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ArgumentValueError, match="all be nested"):
        module(x, torch.randn(2, 3, 16), x)
    module.batch_first = False
    with pytest.raises(ArgumentValueError, match="batch_first=True"):
        module(x, x, x)
