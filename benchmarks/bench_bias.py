"""Score biases and masks on a GPU, beside what users would pick instead, in one process on one card.

    python benchmarks/bench_bias.py [--quick] [--only forward 64 ...] [--out FILE]

4 sequences, 16 heads, bfloat16; lengths 1024 to 4096, head dims 64 and 128; forward, backward, and backward with the gradient of the
bias. What is added or hidden:

    none        nothing: our own speed without, and the peers'
    1hqk bhqk   a bias (1, h, sq, sk) or (b, h, sq, sk) in the type of q
    random      a mask (b, 1, sq, sk) of single elements, nine of ten visible: no tile is empty or whole
    documents   a mask (b, 1, sq, sk) of eight documents a sequence
    padding     a mask (b, 1, 1, sk), half of the keys visible

Peers: torch's EFFICIENT backend, the only one of scaled_dot_product_attention that takes these, and compiled FlexAttention, with
score_mod for biases and mask_mod for masks; its block masks are made beforehand, and not timed.

All are timed in turns by events, the host's part left out. Results go to benchmarks/results/bias-<gpu>.json; with --quick, a small
grid to try the script, to build/.
"""

import argparse
import functools
import itertools
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flash_attn
import harness
from harness import Table, geometric_mean, grouped, heading, ratio, round_robin, seconds

BATCH, HEADS = 4, 16
LENGTHS, DIMS = (1024, 2048, 4096), (64, 128)
BIASES, MASKS = ("1hqk", "bhqk"), ("random", "documents", "padding")
BUDGET = 0.05                           # seconds of repeats for each implementation and cell
PEERS = "efficient", "flex"

# The fewest times the best peer's speed, and of our own without a bias, that we promise.
BAR, BAR_OWN = 1.3, 0.7


def scores_of(cell):
    """(bias, mask) of a cell."""
    s, what = cell["s"], cell["what"]
    generator = torch.Generator("cuda").manual_seed(1)
    if what in BIASES:
        shape = (1 if what == "1hqk" else BATCH, HEADS, s, s)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16), None
    if what == "random":
        return None, torch.rand(BATCH, 1, s, s, generator=generator, device="cuda") < 0.9
    if what == "documents":
        cuts = torch.randint(s, (BATCH, 7), generator=generator, device="cuda")
        document = (torch.arange(s, device="cuda")[None, :, None] >= cuts[:, None, :]).sum(-1)
        return None, (document[:, :, None] == document[:, None, :])[:, None]
    if what == "padding":
        lengths = torch.tensor([s // 4, s // 2, s // 2, 3 * s // 4], device="cuda")
        return None, torch.arange(s, device="cuda")[None, None, None, :] < lengths[:, None, None, None]
    return None, None


# -------------------------------------------------------------------------------------------- implementations
# Each takes q, k, v, bias and mask, and gives a function of q, k, v.


def ours(bias, mask):
    return lambda q, k, v: flash_attn.flash_attn_func(q, k, v, attn_bias=bias, attn_mask=mask)


def efficient(bias, mask):
    def call(q, k, v):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if bias is None else bias)
    return call


@functools.cache
def compiled():
    return torch.compile(flex_attention, dynamic=False)


def flex(bias, mask):
    options = {}
    if bias is not None:
        options["score_mod"] = (lambda score, b, h, i, j: score + bias[0, h, i, j]) if bias.shape[0] == 1 \
            else (lambda score, b, h, i, j: score + bias[b, h, i, j])
    if mask is not None:
        seen = (lambda b, h, i, j: mask[b, 0, 0, j]) if mask.shape[2] == 1 else (lambda b, h, i, j: mask[b, 0, i, j])
        s = mask.shape[3]
        options["block_mask"] = create_block_mask(seen, BATCH, None, s, s, device="cuda")
    return lambda q, k, v: compiled()(q, k, v, **options)


IMPLEMENTATIONS = {"ours": ours, "efficient": efficient, "flex": flex}


def operands(name, cell):
    """q, k, v, dout: the same values for all; ours (b, s, h, d), the others' (b, h, s, d)."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = BATCH, cell["s"], HEADS, cell["d"]
    tensors = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return tensors if name == "ours" else [x.transpose(1, 2).contiguous() for x in tensors]


def call_of(name, cell):
    """A function without arguments that runs the cell's pass once."""
    *inputs, dout = operands(name, cell)
    bias, mask = scores_of(cell)
    if cell["pass"] == "with dbias":
        bias.requires_grad_()
    attention = IMPLEMENTATIONS[name](bias, mask)
    if cell["pass"] == "forward":
        return lambda: attention(*inputs)
    for x in inputs:
        x.requires_grad_()
    wanted = [*inputs, bias] if cell["pass"] == "with dbias" else inputs
    out = attention(*inputs)
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


# ------------------------------------------------------------------------------------------------------- grid


def grid(quick):
    lengths = (1024,) if quick else LENGTHS
    for direction, what, d, s in itertools.product(
            ("forward", "backward", "with dbias"), ("none", *BIASES, *MASKS), DIMS, lengths):
        if direction != "with dbias" or what in BIASES:
            yield {"pass": direction, "what": what, "d": d, "s": s}


def measure_cell(cell, budget, names):
    """The cell with its times."""
    calls, skipped = {}, {}
    for name in names:
        try:
            calls[name] = call_of(name, cell)
            calls[name](), calls[name]()                    # compiles, loads, allocates
        except Exception as error:                          # a peer's compiler may raise anything
            if name == "ours":
                raise
            skipped[name] = {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
            calls.pop(name, None)
    if cell["pass"] == "forward":
        require_agreement(calls)
    return {**cell, "times": {**round_robin(calls, budget, "cuda"), **skipped}}


def require_agreement(calls):
    """All compute the same thing; how exactly is the tests' business."""
    results = {name: call() if name == "ours" else call().transpose(1, 2) for name, call in calls.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["ours"], atol=0.02, rtol=0.02, msg=lambda text: f"{name}: {text}")


def over_best(cell):
    """How many times faster ours is than the best peer, or None."""
    return min((x for x in (ratio(cell, "ours", peer) for peer in PEERS) if x), default=None)


def over_none(cell, cells):
    """Our speed as a share of our speed without, or None."""
    for other in cells:
        if other["what"] == "none" and all(other[field] == cell[field] for field in ("pass", "d", "s")):
            return seconds(other, "ours") / seconds(cell, "ours")
    return None


def measure_grid(cells, budget, names):
    heading("ms, least of the repeats; ours/none: our speed with as a share of that without")
    table = Table("      pass", "     what", "  d", "   s", *(name.rjust(9) for name in names), "ours/best", "ours/none")
    measured = []
    for cell in cells:
        cell = measure_cell(cell, budget, names)
        measured.append(cell)
        times = [seconds(cell, name) for name in names]
        table.row(cell["pass"], cell["what"], cell["d"], cell["s"], *(t and f"{t * 1e3:.3f}" for t in times), over_best(cell),
                  over_none(cell, measured))
        torch.compiler.reset()
    return measured


def report_bars(cells):
    heading(f"Beside the best peer: bar {BAR}; a bias (1, h, sq, sk) forward beside none: bar {BAR_OWN}")
    table = Table("      pass", "     what", "cells", "least", " mean", "below")
    for (direction, what), group in grouped(cells, "pass", "what").items():
        ratios = [x for x in map(over_best, group) if x]
        if what != "none" and ratios:
            table.row(direction, what, len(ratios), min(ratios), geometric_mean(ratios), sum(x < BAR for x in ratios))
    own = [over_none(cell, cells) for cell in cells if (cell["pass"], cell["what"]) == ("forward", "1hqk")]
    own = [x for x in own if x]
    if own:
        table.row("forward", "1hqk/none", len(own), min(own), geometric_mean(own), sum(x < BAR_OWN for x in own))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid, to build/")
    parser.add_argument("--only", nargs="*", default=[], help="cells with all of these values")
    parser.add_argument("--without", nargs="*", default=[], choices=PEERS, help="peers to leave out")
    parser.add_argument("--out", type=Path, help="where the results go")
    arguments = parser.parse_args()
    cells = [cell for cell in grid(arguments.quick) if set(arguments.only) <= {str(value) for value in cell.values()}]
    names = [name for name in IMPLEMENTATIONS if name not in arguments.without]
    description = harness.describe("cuda")
    print(description["machine"]["name"], description["versions"], "stamp", *description["stamp"].values())
    measured = measure_grid(cells, BUDGET, names)
    report_bars(measured)
    folder = Path("build") if arguments.quick else harness.RESULTS
    path = arguments.out or folder / f"bias-{harness.short_name(description['machine'])}.json"
    harness.write_json(path, {**description, "cells": measured})
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
