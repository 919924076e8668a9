"""The whole product of features, drawn by hypothesis: any combination is within the bound."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from problem import DTYPES, Problem

LENGTHS = st.sampled_from([17, 64, 1, 111, 2, 129, 3, 40, 63, 5, 65, 200, 127, 16, 33, 128, 0])
HEAD_DIMS = st.one_of(st.sampled_from([32, 59, 64, 96, 111, 128, 192, 256]), st.integers(1, 40))
BATCHES = st.sampled_from([2, 1, 3, 0])
INDICES = st.one_of(st.none(), st.sets(st.sampled_from("bhqk")).map(lambda chosen: "".join(sorted(chosen))))
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
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.6, 0.0, 1e-20])),
        seed=draw(st.integers(0, 2 ** 20)))
    if draw(st.booleans()):
        batch = draw(BATCHES)
        lengths = st.lists(LENGTHS, min_size=batch, max_size=batch).map(tuple)
        fields.update(seqlens_q=draw(lengths), seqlens_k=draw(lengths), tail=draw(st.integers(0, 3)),
                      extra_max_seqlen=draw(st.sampled_from([0, 0, 70])))
        capacities = fields["seqlens_k"]
    else:
        fields.update(b=draw(BATCHES), sq=draw(LENGTHS), sk=draw(LENGTHS), bias=draw(INDICES), mask=draw(INDICES),
                      bias_hides=draw(st.booleans()), bias_dtype=draw(st.sampled_from([None, *DTYPES, torch.float64])))
        capacities = (fields["sk"],) * fields["b"]
    if draw(st.sampled_from([False, False, True])):
        fields["seqused_k"] = tuple(draw(st.integers(0, capacity)) for capacity in capacities)
    return Problem(**fields)


@given(problems())
def test_any_combination(device, problem):
    if device == "cpu" or problem.dtype != torch.float64:
        problem.check(device)
