"""Score biases and masks on a GPU, beside what users would pick instead, in one process on one card.

    python benchmarks/bench_bias.py [--quick] [--only 64 documents ...] [--seconds N] [--out FILE]

4 sequences, 16 heads, bfloat16; lengths 1024 to 4096, head dims 64 and 128; forward as in training, backward, and backward with the
gradient of the bias. What is added or hidden:

    none        nothing: our own speed without, and the peers'
    1hqk bhqk   a bias (1, h, sq, sk) or (b, h, sq, sk) in the type of q
    random      a mask (b, 1, sq, sk) of single elements, nine of ten visible: no tile is empty or whole
    documents   a mask (b, 1, sq, sk) of eight documents a sequence
    padding     a mask (b, 1, 1, sk), half of the keys visible

Peers: torch's EFFICIENT backend, the only one of scaled_dot_product_attention that takes these, and compiled FlexAttention, with
score_mod for biases and mask_mod for masks, compiled for each shape; its block masks are made beforehand, and not timed. Processes
side by side fill its compiler's cache before anything is timed.

All are timed in turns by events, the host's part left out. Results go to benchmarks/results/bias-<gpu>.json, after each problem, so
that a run that is cut short by --seconds or otherwise leaves what it has; with --quick, a small grid to try the script, to build/.
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flash_attn
import harness
from harness import Table, geometric_mean, grouped, heading, ratio, round_robin, seconds

BATCH, HEADS = 4, 16
LENGTHS, DIMS = (2048, 1024, 4096), (64, 128)
BIASES, MASKS = ("1hqk", "bhqk"), ("random", "documents", "padding")
PASSES = "forward", "backward", "with dbias"
BUDGET = 0.04                           # seconds of repeats for each implementation and cell
COMPILERS = 14                          # processes, at most
PEERS = "efficient", "flex"

# The fewest times the best peer's speed, and of our own without a bias, that we promise.
BAR, BAR_OWN = 1.3, 0.7


def scores_of(problem):
    """(bias, mask) of a problem."""
    s, what = problem["s"], problem["what"]
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
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
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


def operands(name, problem):
    """q, k, v, dout: the same values for all; ours (b, s, h, d), the others' (b, h, s, d)."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = BATCH, problem["s"], HEADS, problem["d"]
    tensors = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return tensors if name == "ours" else [x.transpose(1, 2).contiguous() for x in tensors]


def calls_of(name, problem, passes):
    """{pass: a function without arguments that runs it once}, each of which has run."""
    *inputs, dout = operands(name, problem)
    for x in inputs:
        x.requires_grad_()
    calls = {}
    for wants_dbias in sorted({one == "with dbias" for one in passes}):
        bias, mask = scores_of(problem)
        if wants_dbias:
            bias.requires_grad_()
        forward = functools.partial(IMPLEMENTATIONS[name](bias, mask), *inputs)
        backward = functools.partial(torch.autograd.grad, forward(), [*inputs, bias] if wants_dbias else inputs, dout, retain_graph=True)
        calls |= {"with dbias": backward} if wants_dbias else {"forward": forward, "backward": backward}
    for one in passes:
        calls[one]()                                        # compiles, loads, allocates
    return {one: calls[one] for one in passes}


# ------------------------------------------------------------------------------------------------------- grid


def grid(quick):
    for s, d, what in itertools.product((1024,) if quick else LENGTHS, DIMS, ("none", *BIASES, *MASKS)):
        yield {"what": what, "d": d, "s": s}


def passes_of(problem):
    return PASSES if problem["what"] in BIASES else PASSES[:2]


def measure(problem, budget, names):
    """The problem's cells, a pass each, with their times."""
    calls, skipped = {}, {}
    for name in names:
        try:
            calls[name] = calls_of(name, problem, passes_of(problem))
        except Exception as error:                          # a peer's compiler may raise anything
            if name == "ours":
                raise
            skipped[name] = {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
    require_agreement({name: each["forward"] for name, each in calls.items()})
    return [{"pass": one, **problem, "times": {**round_robin({name: each[one] for name, each in calls.items()}, budget, "cuda"), **skipped}}
            for one in passes_of(problem)]


def compile_beforehand(problems):
    """FlexAttention's kernels for these problems, into the compiler's cache on disk, by processes side by side."""
    count = min(COMPILERS, len(problems), os.cpu_count())
    started = time.monotonic()
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", *(problem_name(problem) for problem in problems[n::count])],
                                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for n in range(count)]
    for worker in workers:
        worker.wait()
    print(f"FlexAttention's kernels: {time.monotonic() - started:.0f} s, {count} processes", flush=True)


def problem_name(problem):
    return "-".join(map(str, problem.values()))


def compile_only(names):
    for problem in grid(False):
        if problem_name(problem) in names:
            calls_of("flex", problem, passes_of(problem))


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


def measure_grid(problems, budget, names, deadline, keep):
    """All cells that there is time for."""
    heading("ms, least of the repeats; ours/none: our speed with as a share of that without")
    table = Table("      pass", "     what", "  d", "   s", *(name.rjust(9) for name in names), "ours/best", "ours/none")
    measured = []
    for n, problem in enumerate(problems):
        if time.monotonic() > deadline:
            print(f"out of time: {len(problems) - n} of {len(problems)} problems left out")
            break
        for cell in measure(problem, budget, names):
            measured.append(cell)
            times = [seconds(cell, name) for name in names]
            table.row(cell["pass"], cell["what"], cell["d"], cell["s"], *(t and f"{t * 1e3:.3f}" for t in times), over_best(cell),
                      over_none(cell, measured))
        keep(measured)
        torch.cuda.empty_cache()
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
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid, to build/")
    parser.add_argument("--only", nargs="*", default=[], help="problems with all of these values")
    parser.add_argument("--without", nargs="*", default=[], choices=PEERS, help="peers to leave out")
    parser.add_argument("--seconds", type=float, default=600, help="begin no problem later than this")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--compile", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        return compile_only(arguments.compile)
    problems = [problem for problem in grid(arguments.quick) if set(arguments.only) <= {str(value) for value in problem.values()}]
    names = [name for name in IMPLEMENTATIONS if name not in arguments.without]
    description = harness.describe("cuda")
    print(description["machine"]["name"], description["versions"], "stamp", *description["stamp"].values())
    if "flex" in names:
        compile_beforehand(problems)
    folder = Path("build") if arguments.quick else harness.RESULTS
    path = arguments.out or folder / f"bias-{harness.short_name(description['machine'])}.json"
    cells = measure_grid(problems, BUDGET, names, started + arguments.seconds,
                         lambda measured: harness.write_json(path, {**description, "cells": measured}))
    report_bars(cells)
    print(f"\nwritten: {path}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
