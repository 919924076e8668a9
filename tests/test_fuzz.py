"""The whole product of features, drawn by hypothesis: any combination is within the bound."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from problem import DTYPES, Problem

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 111, 127, 128, 129, 200]))
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from([59, 64, 96, 111, 128, 192, 256]))
BOUNDS = st.one_of(st.none(), st.integers(-1, 150))


@st.composite
def problems(draw):
    hk, d = draw(st.integers(1, 2)), draw(HEAD_DIMS)
    fields = dict(
        dtype=draw(st.sampled_from([*DTYPES, torch.float64])),
        h=hk * draw(st.integers(1, 3)), hk=hk, d=d, dv=draw(st.one_of(st.none(), HEAD_DIMS)),
        causal=draw(st.booleans()), window=(draw(BOUNDS), draw(BOUNDS)),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 20.0])),
        scale=draw(st.sampled_from([None, None, 0.0, 2 * d ** -0.5, -d ** -0.5])),
        alibi=draw(st.sampled_from([None, None, "head", "batch"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 1e-20, 0.1, 0.6])),
        seed=draw(st.integers(0, 2 ** 20)))
    if draw(st.booleans()):
        batch = draw(st.integers(0, 3))
        lengths = st.lists(LENGTHS, min_size=batch, max_size=batch).map(tuple)
        fields.update(seqlens_q=draw(lengths), seqlens_k=draw(lengths), tail=draw(st.integers(0, 3)),
                      extra_max_seqlen=draw(st.sampled_from([0, 0, 70])))
        capacities = fields["seqlens_k"]
    else:
        fields.update(b=draw(st.integers(0, 2)), sq=draw(LENGTHS), sk=draw(LENGTHS))
        capacities = (fields["sk"],) * fields["b"]
    if draw(st.booleans()):
        fields["seqused_k"] = tuple(draw(st.integers(0, capacity)) for capacity in capacities)
    return Problem(**fields)


@given(problems())
def test_any_combination(device, problem):
    if device == "cpu" or problem.dtype != torch.float64:
        problem.check(device)
