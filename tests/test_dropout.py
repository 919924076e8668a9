"""Dropout: the mask is the one function of philox.h everywhere, p acts as documented, and torch's generator
rules."""

import pytest
import torch

import flash_attn
from flash_attn import reference
from problem import DTYPES, Problem

RNG_STATES = [(0, 0), (1, 2), (-1, -1), (2 ** 62 + 12345, -2 ** 63), (-987654321, 2 ** 40 + 7)]


def kept(problem, device, rng_state=None):
    """Which weights our forward keeps, read off v = identity (seqlen_k <= 256)."""
    options = {} if rng_state is None else {"rng_state": torch.tensor(rng_state, device=device)}
    q = torch.zeros(problem.b, problem.sq, problem.h, 8, device=device, dtype=problem.dtype)
    k = torch.zeros(problem.b, problem.sk, problem.h, 8, device=device, dtype=problem.dtype)
    v = torch.eye(problem.sk, device=device, dtype=problem.dtype)[None, :, None].expand(problem.b, -1, problem.h, -1)
    out = flash_attn.flash_attn_func(q, k, v, problem.dropout_p, **options)
    return out.transpose(1, 2).cpu()                    # (b, h, sq, sk): Z / sk


def test_philox_known_answers():
    """Philox-4x32-7 of the published test vectors (Random123, kat_vectors)."""
    def words(key, counter):
        return tuple(w.item() for w in reference._philox(key, [torch.tensor(c) for c in counter]))

    assert words(0, (0, 0, 0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert words(2 ** 64 - 1, (2 ** 32 - 1,) * 4) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    assert words(0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)) == (
        0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rng_state", RNG_STATES, ids=str)
def test_mask_is_the_definition_bit_for_bit(device, dtype, rng_state):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    problem = Problem(dtype, b=2, sq=77, sk=150, h=3, dropout_p=0.4)
    z = reference.dropout_mask(torch.tensor(rng_state), 0.4, (2, 3, 77, 150))
    assert torch.equal(kept(problem, device, rng_state) > 0, z > 0)


@pytest.mark.parametrize("p", [1e-30, 1e-3, 1 / 512, 0.002, 0.1, 0.25, 0.5, 0.77, 0.99, 0.9999999])
def test_effective_probability(device, p):
    """round(256 (1 - p)) of 256 weights are kept, at least one, and scaled so that the expectation is
    exact."""
    problem = Problem(b=2, sq=256, sk=256, h=2, dropout_p=p)
    weights = kept(problem, device, (3, 4)) * 256       # Z
    count = min(max(int(256 * (1 - p) + 0.5), 1), 256)
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 256 / count))
    share = (weights > 0).double().mean().item()
    deviation = (count / 256 * (1 - count / 256) / weights.numel()) ** 0.5
    assert abs(share - count / 256) <= 5 * deviation
    assert (count == 256) == (share == 1)


def test_mask_has_no_pattern(device):
    """Kept counts of rows, columns, heads and 16 x 16 positions vary as those of independent draws do."""
    weights = (kept(Problem(b=4, sq=256, sk=256, h=4, dropout_p=0.5), device, (11, 22)) > 0).double()
    tiled = weights.unflatten(3, (16, 16)).unflatten(2, (16, 16))
    for groups in (weights.mean((0, 1, 2)), weights.mean((0, 1, 3)), weights.mean((2, 3)),
                   tiled.mean((0, 1, 2, 4))):
        draws = weights.numel() // groups.numel()
        deviations = (groups - 0.5).abs() / (0.25 / draws) ** 0.5
        assert deviations.max() < 5
        assert abs(deviations.square().mean() - 1) < 5 * (2 / groups.numel()) ** 0.5
    flat = weights.flatten(0, 1).flatten(1) - 0.5
    correlation = flat @ flat.T / flat.shape[1] * 4     # of one head's mask with another's
    assert correlation.fill_diagonal_(0).abs().max() < 5 / flat.shape[1] ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_forward_and_backward_drop_the_same(device, dtype, p, causal):
    Problem(dtype, sq=113, sk=129, h=4, hk=2, d=40, dropout_p=p, causal=causal, seed=5).check(device)


def test_manual_seed_repeats_and_calls_differ(device):
    problem = Problem(b=1, sq=64, sk=64, dropout_p=0.5)
    torch.manual_seed(7)
    first, second = kept(problem, device), kept(problem, device)
    torch.manual_seed(7)
    again = kept(problem, device)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_generator_is_used_only_for_dropout(device):
    q = torch.randn(1, 8, 2, 16, device=device)
    state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    before = state()
    flash_attn.flash_attn_func(q, q, q)
    flash_attn.flash_attn_func(q, q, q, 0.5, rng_state=torch.tensor([1, 2], device=device))
    assert torch.equal(state(), before)
    flash_attn.flash_attn_func(q, q, q, 0.5)
    assert not torch.equal(state(), before)


def test_lse_ignores_dropout(device):
    q, k, v = (x.to(device) for x in Problem().inputs()[:3])
    plain = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)[1]
    dropped = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)[1]
    torch.testing.assert_close(dropped, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_s_dmask(device, dtype, packed):
    """exp(s - row maximum), its sign telling what was dropped, in dimensions rounded up to 128."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    lengths = dict(seqlens_q=(59, 20), seqlens_k=(130, 7)) if packed else dict(sq=59, sk=130)
    problem = Problem(dtype, h=4, hk=2, causal=True, dropout_p=0.3, **lengths)
    inputs = problem.inputs()
    q, k, v = (x.to(device) for x in inputs[:3])
    s_dmask = problem.call(q, k, v)[2].cpu()
    assert s_dmask.shape == (2, 4, 128, 256) and s_dmask.dtype == dtype
    for b, (rows, keys) in enumerate(problem._sequences()):
        q_b, k_b = inputs.q[rows].double()[None], inputs.k[keys].double()[None]
        q_b, k_b = (x if packed else x.reshape(1, *x.shape[-3:]) for x in (q_b, k_b))
        p, _ = reference.probabilities(q_b, k_b, causal=True)
        z = reference.dropout_mask(problem.options()["rng_state"], 0.3, p.shape, b)
        ours = s_dmask[b:b + 1, :, :p.shape[2], :p.shape[3]].double()
        seen = p > 0
        expected = p / p.amax(-1, keepdim=True)
        torch.testing.assert_close(ours.abs()[seen], expected[seen], rtol=0.02, atol=1e-2)
        clear = seen & (ours.abs() > 1e-6)
        assert torch.equal(ours[clear] < 0, z[clear] == 0)


def test_s_dmask_is_empty_without_dropout(device):
    q = torch.randn(1, 8, 2, 16, device=device, dtype=torch.float16)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, q, q, return_attn_probs=True)
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype and s_dmask.device == q.device
