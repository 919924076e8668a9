"""What only a GPU can show: streams, graphs, devices, sizes beyond 32 bits, repeats to the bit, memory, tiles, and
agreement with the CPU."""

import pytest
import torch

import flash_attn
from conftest import cuda_problem
from flash_attn import ArgumentValueError, UnsupportedError, flash_attn_func, flash_attn_varlen_func
from flash_attn._backend import draw_rng_state
from problem import DTYPES, Inputs, Problem

GIB = 2 ** 30


@pytest.fixture(autouse=True)
def gpu(request):
    if request.config.getoption("--device") == "cpu":
        pytest.skip("--device cpu")
    if cuda_problem():
        pytest.skip(cuda_problem())


def random(*shape, dtype=torch.bfloat16, seed=0, device="cuda"):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def gradients(q, k, v, **options):
    """(out, dq, dk, dv) of the sum of out's squares."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = flash_attn_func(q, k, v, **options)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), 2 * out.detach()))


def skip_without_memory(nbytes):
    if torch.cuda.mem_get_info()[0] < nbytes:
        pytest.skip(f"needs {nbytes / GIB:.0f} GiB of free GPU memory")


# ---- streams, graphs, devices ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_in_the_current_stream(dtype):
    """The inputs appear on that stream only after a long wait; another stream would read zeros."""
    expected_inputs = [random(2, 300, 4, 64, dtype=dtype, seed=seed) for seed in range(3)]
    expected = gradients(*expected_inputs, causal=True, deterministic=True)
    inputs = [torch.zeros_like(x) for x in expected_inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, value in zip(inputs, expected_inputs):
            x.copy_(value)
        ours = gradients(*inputs, causal=True, deterministic=True)
    stream.synchronize()
    for x, y in zip(ours, expected):
        assert torch.equal(x, y)


def capture(call):
    """A graph of call(), which runs before on another stream, as torch asks for; and the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("options", [dict(), dict(causal=True, softcap=10.0)], ids=str)
def test_graph_replay_equals_eager(options):
    options = {"deterministic": True, **options}
    inputs = [random(2, 200, 4, 64, seed=seed) for seed in range(3)]
    graph, results = capture(lambda: gradients(*inputs, **options))
    for seed in range(3):
        for n, x in enumerate(inputs):
            x.copy_(random(*x.shape, seed=10 * seed + n))
        graph.replay()
        for ours, eager in zip(results, gradients(*inputs, **options)):
            assert torch.equal(ours, eager)


def test_graph_replay_splits_keys():
    """One query row and many keys: the path with partial results and a merge."""
    q, k, v = random(1, 1, 2, 64), random(1, 20_000, 2, 64, seed=1), random(1, 20_000, 2, 64, seed=2)
    graph, out = capture(lambda: flash_attn_func(q, k, v))
    q.copy_(random(1, 1, 2, 64, seed=3))
    graph.replay()
    assert torch.equal(out, flash_attn_func(q, k, v))


def test_graph_replay_drops_by_the_state_it_draws():
    """Every replay draws a state anew, and drops what an eager call drops with that state."""
    q, k, v = random(1, 128, 2, 64), random(1, 64, 2, 64, seed=1), random(1, 64, 2, 64, seed=2)

    def call():
        state = draw_rng_state("cuda")
        return state, flash_attn_func(q, k, v, dropout_p=0.5, rng_state=state)
    graph, (state, out) = capture(call)
    states = []
    for _ in range(8):
        graph.replay()
        assert torch.equal(out, flash_attn_func(q, k, v, dropout_p=0.5, rng_state=state))
        states.append(state.tolist())
    assert len({tuple(state) for state in states}) == len(states)


def test_graph_replay_changes_the_dropout_mask():
    """Every replay draws anew, and torch.manual_seed repeats the row of masks."""
    q, k = torch.zeros(1, 128, 2, 64, device="cuda", dtype=torch.float16), random(1, 64, 2, 64, dtype=torch.float16)
    v = torch.eye(64, device="cuda", dtype=torch.float16)[None, :, None].expand(1, -1, 2, -1)
    graph, out = capture(lambda: flash_attn_func(q, k, v, dropout_p=0.5))

    def masks():
        torch.manual_seed(5)
        for _ in range(4):
            graph.replay()
            yield out > 0

    first, again = list(masks()), list(masks())
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not any(torch.equal(x, y) for n, x in enumerate(first) for y in first[:n])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    """Whatever the current device is, which stays as it was."""
    inputs = [random(2, 300, 4, 64, seed=seed) for seed in range(3)]
    expected = gradients(*inputs, deterministic=True)
    for current in 0, 1:
        with torch.cuda.device(current):
            ours = gradients(*(x.to("cuda:1") for x in inputs), deterministic=True)
            assert torch.cuda.current_device() == current
        assert ours[0].device.index == 1
        assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(ours, expected))


# ---- blocks with several tiles ----

@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.1}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_key_tiles_one_after_the_other(d, options):
    """Hopper's backward blocks take short heads' key tiles one after the other, in another order where dq must be deterministic; out,
    dk and dv are the same to the bit."""
    inputs = random(20, 500, 8, d), *(random(20, 500, 4, d, seed=seed) for seed in (1, 2))
    torch.manual_seed(5)
    out, dq, dk, dv = gradients(*inputs, deterministic=True, **options)
    for _ in range(5):
        torch.manual_seed(5)
        ours = gradients(*inputs, **options)
        assert torch.equal(ours[0], out) and torch.equal(ours[2], dk) and torch.equal(ours[3], dv)
        torch.testing.assert_close(ours[1], dq, rtol=2e-2, atol=4e-3 * dq.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("sq, sk, options", [
    (300, 420, dict(causal=True)), (420, 300, dict(causal=True)), (300, 100, dict()), (1, 700, dict()), (257, 257, dict(window_size=(-1, 30))),
    (300, 300, dict(causal=True, dropout_p=0.2)), (200, 300, dict(softcap=5.0)), (200, 300, dict(window_size=(100, 20)))], ids=str)
def test_all_of_dq_is_written(monkeypatch, dtype, d, sq, sk, options):
    """By Hopper's main kernel itself, head after head: as the portable kernels have it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    monkeypatch.delenv("FLASH_ATTN_SMEM_KB", raising=False)
    inputs = random(40, sq, 8, d, dtype=dtype), *(random(40, sk, 4, d, dtype=dtype, seed=seed) for seed in (1, 2))
    results = {}
    for kernel in "sm80", "sm90":
        monkeypatch.setenv("FLASH_ATTN_KERNEL", kernel)
        torch.manual_seed(5)
        results[kernel] = gradients(*inputs, **options)
    for ours, portable in zip(results["sm90"], results["sm80"]):
        torch.testing.assert_close(ours, portable, rtol=2e-2, atol=6e-3 * portable.abs().max().item())


# ---- sizes ----

@pytest.mark.parametrize("b, rows", [(1, 2 ** 20 + 64), (4, 2 ** 18 + 64)], ids=["long", "batch"])
def test_more_than_2_31_elements_of_queries(b, rows):
    """The last rows are those of a call of their own."""
    skip_without_memory(40 * GIB)
    q, dout = (random(b, rows, 16, 128, seed=seed) for seed in (0, 1))
    k, v = (random(b, 64, 16, 128, seed=seed) for seed in (2, 3))
    assert q.numel() > 2 ** 31
    q.requires_grad_()
    out = flash_attn_func(q, k, v, deterministic=True)
    dq, = torch.autograd.grad(out, q, dout)
    last = q[-1:, -256:].detach().requires_grad_()
    expected = flash_attn_func(last, k[-1:], v[-1:], deterministic=True)
    expected_dq, = torch.autograd.grad(expected, last, dout[-1:, -256:])
    assert torch.equal(out[-1:, -256:], expected) and torch.equal(dq[-1:, -256:], expected_dq)


@pytest.mark.parametrize("b, rows", [(1, 2 ** 20 + 64), (4, 2 ** 18 + 64)], ids=["long", "batch"])
def test_more_than_2_31_elements_of_keys(b, rows):
    """A window lets the queries see the last keys only."""
    skip_without_memory(40 * GIB)
    q, dout = (random(b, 64, 16, 128, seed=seed) for seed in (0, 1))
    k, v = (random(b, rows, 16, 128, seed=seed) for seed in (2, 3))
    k.requires_grad_(), v.requires_grad_()
    out = flash_attn_func(q, k, v, window_size=(100, 0))
    dk, dv = torch.autograd.grad(out, (k, v), dout)
    last = [x[-1:, -256:].detach().requires_grad_() for x in (k, v)]
    expected = flash_attn_func(q[-1:], *last, window_size=(100, 0))
    expected_gradients = torch.autograd.grad(expected, last, dout[-1:])
    torch.testing.assert_close(out[-1:], expected, rtol=0.02, atol=0.02)    # tiles start elsewhere: bits may differ
    for ours, theirs in zip((dk, dv), expected_gradients):
        torch.testing.assert_close(ours[-1:, -256:], theirs, rtol=0.02, atol=0.02)
        assert not ours[:, :-256].any()


def test_more_than_65535_heads_of_sequences():
    q, k, v = (random(70_000, 16, 2, 32, seed=seed) for seed in range(3))
    ours = gradients(q, k, v, causal=True, deterministic=True)
    q, k, v = (x[-3:] for x in (q, k, v))
    for x, y in zip(ours, gradients(q, k, v, causal=True, deterministic=True)):
        assert torch.equal(x[-3:], y)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_not_its_square(backward):
    def peak(length):
        q, k, v = (random(1, length, 4, 64, seed=seed).requires_grad_(backward) for seed in range(3))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = flash_attn_func(q, k, v, causal=True)
        if backward:
            torch.autograd.grad(out, (q, k, v), out.detach())
        return torch.cuda.max_memory_allocated() - before

    short, long = peak(8192), peak(32768)
    assert long <= 4.5 * short
    assert long < 4 * 32768 ** 2 / 16               # bytes: a sixteenth of one head's half-precision matrix


# ---- strides and alignment ----

def odd(x):
    """A view whose rows start at odd elements, with gaps in every dimension."""
    larger = x.new_full([n + 3 for n in x.shape], torch.nan)
    return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [odd, heads_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", [*Inputs._fields[:4], "all"])
@pytest.mark.parametrize("d, dv", [(64, 64), (59, 40), (128, 128), (256, 193)])
def test_views_of_every_operand(monkeypatch, dtype, layout, which, d, dv):
    """Results have the bits of a call with contiguous tensors, by the kernels that take either."""
    if layout is odd:
        monkeypatch.setenv("FLASH_ATTN_KERNEL", "sm80")
    problem = Problem(dtype, sq=130, sk=75, h=4, hk=2, d=d, dv=dv, causal=True, dropout_p=0.2)
    inputs = Inputs(*(x.cuda() for x in problem.inputs()))
    names = inputs._fields[:4] if which == "all" else [which]
    views = inputs._replace(**{name: layout(getattr(inputs, name)) for name in names})
    plain, viewed = problem.run(inputs, "cuda", deterministic=True), problem.run(views, "cuda", deterministic=True)
    for name in plain._fields:
        assert torch.equal(getattr(plain, name), getattr(viewed, name)), name


@pytest.mark.parametrize("d", [64, 59])
def test_packed_gradients_are_views(d):
    """dq, dk and dv are written into one tensor, at its strides."""
    qkv = random(2, 100, 3, 4, d).requires_grad_()
    q, k, v = (x.detach().contiguous() for x in qkv.unbind(2))
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True)
    dqkv, = torch.autograd.grad(out, qkv, 2 * out.detach())
    for ours, expected in zip((out, *dqkv.unbind(2)), gradients(q, k, v, causal=True, deterministic=True)):
        assert torch.equal(ours, expected)


# ---- the same bits, every time ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("options", [
    dict(sq=300, sk=517, h=4, hk=2, causal=True, d=64), dict(sq=257, sk=257, h=2, dropout_p=0.3, d=128),
    dict(sq=5, sk=3000, h=2, d=192), dict(sq=200, sk=300, h=4, hk=2, d=64, bias="hqk", mask="bqk"),
    dict(sq=130, sk=500, h=2, d=128, bias="k", mask="bk", dropout_p=0.2), dict(seqlens_q=(100, 1, 333), seqlens_k=(7, 250, 333), h=4, d=96)], ids=str)
def test_250_repeats(dtype, deterministic, options):
    """out, lse, dk, dv and dbias always; dq too where deterministic."""
    problem = Problem(dtype, b=2, **options)
    inputs = Inputs(*(x.cuda() for x in problem.inputs()))
    names = [name for name in ("out", "lse", "dq", "dk", "dv", "dbias") if deterministic or name != "dq"]
    first = problem.run(inputs, "cuda", deterministic=deterministic)
    for _ in range(249):
        again = problem.run(inputs, "cuda", deterministic=deterministic)
        for name in names:
            assert torch.equal(getattr(first, name), getattr(again, name)), name


# ---- agreement with the CPU ----

AGREEMENT = [
    dict(), dict(causal=True, d=128), dict(window=(30, 7), h=4, hk=1, d=96), dict(softcap=3.0, alibi="head", d=40),
    dict(dropout_p=0.4, causal=True, d=256), dict(sq=3, sk=3000, d=64), dict(scale=-0.2, d=192),
    dict(bias="hqk", mask="bk", causal=True, d=64, h=4, hk=2), dict(bias="bhqk", bias_dtype=torch.float32, dropout_p=0.2, d=128),
    dict(bias="k", mask="hqk", bias_hides=True, softcap=4.0, d=256),
    dict(seqlens_q=(70, 0, 129), seqlens_k=(200, 5, 64), tail=9, dropout_p=0.1, alibi="batch", h=4, hk=2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", AGREEMENT, ids=str)
def test_agrees_with_the_cpu(dtype, options):
    """Up to the rounding of P and dS, which the CPU keeps in float32."""
    problem = Problem(dtype, **{"sq": 129, "sk": 201, **options})
    for ours, theirs in zip(problem.run(device="cuda"), problem.run(device="cpu")):
        if theirs.numel() == 0:             # the gradient of no bias
            continue
        largest = theirs[theirs.isfinite()].abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("rng_state", [(0, 0), (2 ** 62 + 12345, -2 ** 63), (-987654321, 2 ** 40 + 7)], ids=str)
def test_kernels_drop_what_the_definition_drops(dtype, d, rng_state):
    """Equal scores. Forward: v = identity shows Z. Backward: dout = identity shows its transpose in dv."""
    b, h, size = 2, 3, d
    state = torch.tensor(rng_state)
    z = flash_attn.reference.dropout_mask(state, 0.4, (b, h, size, size)).cuda()
    zeros = torch.zeros(b, size, h, d, device="cuda", dtype=dtype)
    identity = torch.eye(size, device="cuda", dtype=dtype)[None, :, None].expand(b, -1, h, -1)
    v = identity.contiguous().requires_grad_()
    out = flash_attn_func(zeros, zeros, v, 0.4, rng_state=state.cuda())
    dv, = torch.autograd.grad(out, v, identity.contiguous())
    assert torch.equal(out.transpose(1, 2) > 0, z > 0)
    assert torch.equal(dv.permute(0, 2, 3, 1) > 0, z > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [option for option in AGREEMENT if "dropout_p" in option], ids=str)
def test_s_dmask_is_the_one_of_the_cpu(dtype, options):
    problem = Problem(dtype, **{"sq": 129, "sk": 201, **options})
    inputs = problem.inputs()[:3]
    ours, theirs = problem.call(*(x.cuda() for x in inputs))[2].cpu(), problem.call(*inputs)[2]
    assert torch.equal(ours.signbit(), theirs.signbit())
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)


# ---- tiles and splits ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", [
    dict(causal=True), dict(softcap=5.0), dict(dropout_p=0.2), dict(bias="hqk", mask="bqk"),
    dict(bias="bhqk", bias_dtype=torch.float32, dropout_p=0.2)], ids=str)
def test_tiles_for_small_devices(monkeypatch, dtype, d, options):
    monkeypatch.setenv("FLASH_ATTN_SMEM_KB", "99")
    Problem(dtype, sq=133, sk=201, h=2, hk=1, d=d, **options).check("cuda")


def test_a_device_without_enough_shared_memory_is_refused(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_SMEM_KB", "8")
    q = random(1, 8, 1, 64)
    with pytest.raises(UnsupportedError, match="8 KB of shared memory.*FLASH_ATTN_SMEM_KB"):
        flash_attn_func(q, q, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    dict(), dict(causal=True), dict(window=(1000, 50)), dict(softcap=8.0, alibi="head"), dict(dropout_p=0.2),
    dict(hk=1, d=128), dict(d=256), dict(d=59, dv=40), dict(seqused_k=(2999, 7)), dict(bias="hqk", mask="bk"), dict(bias="k", mask="hqk"),
    dict(seqlens_q=(1, 0, 70), seqlens_k=(3000, 2000, 17), tail=3, causal=True)], ids=str)
def test_split_keys(dtype, options):
    """Few queries, many keys."""
    Problem(dtype, **{"b": 2, "sq": 5, "sk": 3000, "h": 2, **options}).check("cuda")


# ---- Hopper ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d, dv", [(64, 64), (40, 64), (96, 96), (128, 128), (104, 72), (192, 128), (256, 256)])
@pytest.mark.parametrize("options", [
    dict(), dict(causal=True), dict(window_size=(300, 20)), dict(softcap=5.0), dict(dropout_p=0.2),
    dict(dropout_p=0.2, causal=True)], ids=str)
def test_hopper_agrees_with_the_portable_kernels(monkeypatch, dtype, d, dv, options):
    """The same elements dropped, the same rows empty, values to rounding; the stream of tiles is longer than the device."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    monkeypatch.delenv("FLASH_ATTN_SMEM_KB", raising=False)
    q, k, v = random(2, 1100, 16, d, dtype=dtype), random(2, 900, 4, d, dtype=dtype, seed=1), random(2, 900, 4, dv, dtype=dtype, seed=2)
    results = {}
    for kernel in "sm80", "sm90":
        monkeypatch.setenv("FLASH_ATTN_KERNEL", kernel)
        state = torch.tensor([5, 7], device="cuda") if "dropout_p" in options else None
        results[kernel] = flash_attn_func(q, k, v, return_attn_probs=True, rng_state=state, **options)
    (out, lse, dmask), (portable_out, portable_lse, portable_dmask) = results["sm90"], results["sm80"]
    assert torch.equal(lse.isinf(), portable_lse.isinf())
    torch.testing.assert_close(lse, portable_lse, atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(out.float(), portable_out.float(), atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    assert torch.equal(dmask, portable_dmask)


def documents(b, sq, sk):
    """True within a document: most tiles are hidden."""
    generator = torch.Generator("cuda").manual_seed(3)
    cuts = torch.randint(sk, (b, 7), generator=generator, device="cuda")
    query, key = ((torch.arange(n, device="cuda")[None, :, None] >= cuts[:, None, :]).sum(-1) for n in (sq, sk))
    return (query[:, :, None] == key[:, None, :])[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d, dv", [(64, 64), (40, 64), (96, 96), (128, 128), (104, 72)])
@pytest.mark.parametrize("bounds", [dict(), dict(causal=True), dict(window_size=(300, 20))], ids=str)
@pytest.mark.parametrize("bias", [None, (1, 16, 1100, 904), (2, 1, 1100, 904)], ids=str)
@pytest.mark.parametrize("mask", [None, "documents", "padding", "random"])
def test_hopper_adds_what_the_portable_kernels_add(monkeypatch, dtype, d, dv, bounds, bias, mask):
    """Tiles passed over and tiles of every kind; the stream of tiles is longer than the device."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    monkeypatch.delenv("FLASH_ATTN_SMEM_KB", raising=False)
    q, k, v = random(2, 1100, 16, d, dtype=dtype), random(2, 904, 4, d, dtype=dtype, seed=1), random(2, 904, 4, dv, dtype=dtype, seed=2)
    masks = {"documents": lambda: documents(2, 1100, 904), "random": lambda: random(2, 16, 1100, 904) < 1,
             "padding": lambda: torch.arange(904, device="cuda") < torch.tensor([100, 700], device="cuda").view(2, 1, 1, 1)}
    options = dict(bounds, attn_bias=None if bias is None else random(*bias, dtype=dtype, seed=4), attn_mask=masks[mask]() if mask else None)
    inputs = [x.requires_grad_() for x in (q, k, v, options["attn_bias"]) if x is not None]
    results, dout = {}, random(2, 1100, 16, dv, dtype=dtype, seed=5)
    for kernel in "sm80", "sm90":
        monkeypatch.setenv("FLASH_ATTN_KERNEL", kernel)
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        results[kernel] = [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout)]
    (out, lse, *gradients), (portable_out, portable_lse, *portable_gradients) = results["sm90"], results["sm80"]
    assert torch.equal(lse.isinf(), portable_lse.isinf())
    torch.testing.assert_close(lse, portable_lse, atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(out.float(), portable_out.float(), atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    for name, x, y in zip(("dq", "dk", "dv", "dbias"), gradients, portable_gradients):
        assert (x - y).abs().max() <= 4 * torch.finfo(dtype).eps * y.abs().max(), name
        assert torch.equal((x == 0).all(-1), (y == 0).all(-1)) or name == "dbias", name


def test_hopper_says_what_it_leaves_to_others(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper")
    monkeypatch.setenv("FLASH_ATTN_KERNEL", "sm90")
    unaligned = random(1, 64, 2, 59)
    with pytest.raises(UnsupportedError, match="sm90: needs rows.*16 bytes"):
        flash_attn_func(unaligned, unaligned, unaligned)
    with pytest.raises(UnsupportedError, match="sm90: serves float16 and bfloat16"):
        flash_attn_func(*(random(1, 64, 2, 64, dtype=torch.float32) for _ in range(3)))


# ---- values in device tensors ----

BAD_OFFSETS = [[0, 10, 5, 20], [0, 100, 200, 300], [-5, 10, 2 ** 31 - 1, 20], [7, 7, 7, 7], [20, 10, 5, 0],
               [0, -1, -2, -3]]


def packed_call(offsets, backward=True, **options):
    offsets = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    q, k, v = (random(20, 2, 64, seed=seed).requires_grad_() for seed in range(3))
    out = flash_attn_varlen_func(q, k, v, offsets, offsets, 12, 12, **options)
    return (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
def test_bad_offsets_reach_nothing_outside(monkeypatch, offsets):
    """Clamped to the tensors: whatever they say, every row is written and none is NaN."""
    monkeypatch.delenv("FLASH_ATTN_DEBUG", raising=False)
    for x in packed_call(offsets):
        assert x.isfinite().all()


def test_rows_beyond_max_seqlen_are_zero():
    out, dq, dk, dv = packed_call([0, 16, 20, 20])
    for x in out, dq, dk, dv:
        assert not x[12:16].any() and x[:12].any() and x[16:].any()


@pytest.mark.parametrize("used", [[-3, 100], [2 ** 31 - 1, -2 ** 31]], ids=str)
def test_bad_seqused_k_is_clamped(used):
    q, k, v = (random(2, 20, 2, 64, seed=seed).requires_grad_() for seed in range(3))
    used = torch.tensor(used, dtype=torch.int32, device="cuda")
    clamped = used.clamp(0, 20)
    ours, expected = (flash_attn_func(q, k, v, seqused_k=x, deterministic=True) for x in (used, clamped))
    assert torch.equal(ours, expected)
    for x, y in zip(*(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) for out in (ours, expected))):
        assert torch.equal(x, y)


@pytest.mark.parametrize("offsets, message", [
    ([0, 10, 5, 20], r"cu_seqlens_q must not decrease.*cu_seqlens_q\[2\] = 5 after 10"),
    ([1, 2, 3, 4], r"cu_seqlens_q\[0\] must be 0"),
    ([0, 10, 12, 21], r"must end within the 20 rows"),
    ([0, 16, 20, 20], r"max_seqlen_q must be at least.*16 queries")], ids=str)
def test_debug_checks_offsets(monkeypatch, offsets, message):
    monkeypatch.setenv("FLASH_ATTN_DEBUG", "1")
    with pytest.raises(ArgumentValueError, match=message):
        packed_call(offsets)
    packed_call([0, 8, 20, 20])


def test_debug_checks_seqused_k(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_DEBUG", "1")
    q = random(2, 20, 2, 64)
    with pytest.raises(ArgumentValueError, match=r"seqused_k\[1\] must lie between 0 and .* length 20, got 21"):
        flash_attn_func(q, q, q, seqused_k=torch.tensor([20, 21], dtype=torch.int32, device="cuda"))


def test_debug_refuses_capture(monkeypatch):
    offsets = torch.tensor([0, 8, 20, 20], dtype=torch.int32, device="cuda")
    q = random(20, 2, 64)
    monkeypatch.setenv("FLASH_ATTN_DEBUG", "1")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        q.add_(0)
        with pytest.raises(UnsupportedError, match="unset it to capture"):
            flash_attn_varlen_func(q, q, q, offsets, offsets, 12, 12)
