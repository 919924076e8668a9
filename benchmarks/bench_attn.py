"""Our GPU kernels beside what users would pick instead, in one process on one card.

    python benchmarks/bench_attn.py [--quick] [--only forward 64 ...] [--without both efficient ...] [--out FILE]

16,384 tokens of width 2048: head dims 64, 128 and 256, sequences of 512 to 16,384, causal or not, with and without dropout;
forward, backward and both, in bfloat16; a smaller grid in float32. Peers: torch's scaled_dot_product_attention through each of
its backends (FLASH is FlashAttention-2, CUDNN, EFFICIENT), attention written out, and FlashAttention-4 where `flash_attn.cute`
can be imported. `sm80` is this package held to its portable kernels. Control-C ends the grid and keeps what was measured.

All are timed in turns by events, the host's part left out; what a call costs the host is a table of its own. TFLOP/s count
4 b h S^2 d for the forward pass, half of it if causal, 2.5 times that for the backward pass, whatever is really computed.
Results go to benchmarks/results/attn-<gpu>.json and .png; with --quick, a small grid to try the script, to build/.
"""

import argparse
import contextlib
import functools
import itertools
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn
import harness
from harness import Table, geometric_mean, grouped, heading, round_robin

TOKENS, WIDTH = 16384, 2048
LENGTHS, DIMS = (512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256)
DROPOUT = 0.1
STANDARD_MOST = 4096                    # longest sequence whose S x S matrix is written out
BUDGET = 0.02                           # seconds of repeats for each implementation and cell
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# The fewest times the best peer's speed that we promise in a cell.
BAR_CELL = 0.95
BARS_DROPOUT = {"forward": 1.3, "backward": 1.0, "both": 1.0}


# -------------------------------------------------------------------------------------------- implementations
# Each takes q, k, v in its own layout, whether causal, and the dropout probability.


def ours(q, k, v, causal, dropout):
    return flash_attn.flash_attn_func(q, k, v, dropout, causal=causal)


def sdpa(backend, q, k, v, causal, dropout):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)


def standard(q, k, v, causal, dropout):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(_future(q.shape[-2]), -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


@functools.cache
def _future(s):
    return torch.ones(s, s, dtype=torch.bool, device="cuda").triu(1)


@functools.cache
def flash_attention_4():
    """Its function, or None. Its package lies under our import name, in another folder of the path."""
    folders = [Path(folder, "flash_attn") for folder in sys.path if Path(folder, "flash_attn", "cute").is_dir()]
    if not folders:
        return None
    flash_attn.__path__.extend(str(folder) for folder in folders if str(folder) not in flash_attn.__path__)
    from flash_attn.cute import flash_attn_func
    return flash_attn_func


def fa4(q, k, v, causal, dropout):
    out = flash_attention_4()(q, k, v, causal=causal)
    return out[0] if isinstance(out, tuple) else out


BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
IMPLEMENTATIONS = {
    "ours": ours, "sm80": ours,
    **{name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()},
    "fa4": fa4, "standard": standard,
}
OURS = "ours", "sm80"
PEERS = tuple(name for name in IMPLEMENTATIONS if name not in OURS)
TOKENS_FIRST = "ours", "sm80", "fa4"    # (b, s, h, d); the others take (b, h, s, d)


@contextlib.contextmanager
def pinned(name):
    """Holds our package to its portable kernels while `sm80` runs."""
    if name == "sm80":
        os.environ["FLASH_ATTN_KERNEL"] = "sm80"
    try:
        yield
    finally:
        if name == "sm80":
            del os.environ["FLASH_ATTN_KERNEL"]


def operands(name, cell):
    """q, k, v, dout: the same values for all."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = TOKENS // cell["s"], cell["s"], WIDTH // cell["d"], cell["d"]
    tensors = [torch.randn(shape, generator=generator, device="cuda", dtype=DTYPES[cell["dtype"]]) for _ in range(4)]
    return tensors if name in TOKENS_FIRST else [x.transpose(1, 2).contiguous() for x in tensors]


def call_of(name, cell):
    """A function without arguments that runs the cell's pass once."""
    *inputs, dout = operands(name, cell)
    attention = functools.partial(IMPLEMENTATIONS[name], causal=cell["causal"], dropout=cell["dropout"])
    if cell["pass"] == "forward":
        run = lambda: attention(*inputs)  # noqa: E731
    else:
        inputs = [x.requires_grad_() for x in inputs]
        with pinned(name):
            out = attention(*inputs)
        if cell["pass"] == "backward":
            run = lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)  # noqa: E731
        else:
            run = lambda: torch.autograd.grad(attention(*inputs), inputs, dout)  # noqa: E731

    def pinned_run():
        with pinned(name):
            return run()
    return pinned_run


# ------------------------------------------------------------------------------------------------------- grid


def grid(quick):
    lengths, dims = ((512, 2048), (64, 128)) if quick else (LENGTHS, DIMS)
    for dtype, direction, dropout, d, causal, s in itertools.product(
            ("bf16", "fp32"), ("forward", "backward", "both"), (0.0, DROPOUT), dims, (False, True), lengths):
        small = dtype == "fp32" or dropout
        if small and (s not in (512, 2048, 8192) or direction == "both") or dtype == "fp32" and (dropout or d == 256):
            continue
        yield {"pass": direction, "dtype": dtype, "dropout": dropout, "d": d, "causal": causal, "s": s}


def refusal(name, cell):
    """Why an implementation is left out of a cell, or None."""
    if name == "standard" and cell["s"] > STANDARD_MOST:
        return f"not run beyond S = {STANDARD_MOST}"
    if name == "fa4" and flash_attention_4() is None:
        return "flash_attn.cute is not installed"
    if name == "fa4" and (cell["dropout"] or cell["dtype"] == "fp32"):
        return "has neither dropout nor float32"
    if name in ("fa2", "cudnn") and cell["dtype"] == "fp32":
        return "has no float32"
    if name == "sm80" and cell["dtype"] == "fp32":
        return "the same kernel as ours"
    return None


def measure_cell(cell, budget):
    """The cell with its times."""
    calls, skipped = {}, {}
    for name in IMPLEMENTATIONS:
        reason = refusal(name, cell)
        try:
            if reason is None:
                call = call_of(name, cell)
                call(), call()                              # compiles, loads, allocates
                calls[name] = call
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0][:100]
        if reason:
            skipped[name] = {"skipped": reason}
    if cell["pass"] == "forward" and not cell["dropout"] and cell["s"] == LENGTHS[0]:
        require_agreement(calls)
    times = round_robin(calls, budget, "cuda")
    return {**cell, "times": {**times, **skipped}}


def require_agreement(calls):
    """All compute the same thing; how exactly is the tests' business."""
    results = {name: call() for name, call in calls.items()}
    results = {name: x if name in TOKENS_FIRST else x.transpose(1, 2) for name, x in results.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["ours"], atol=0.02, rtol=0.02, msg=lambda text: f"{name}: {text}")


def flops(cell):
    full = 4 * TOKENS * WIDTH * cell["s"] * (0.5 if cell["causal"] else 1)
    return full * {"forward": 1, "backward": 2.5, "both": 3.5}[cell["pass"]]


def speed(cell, name):
    """TFLOP/s of the median time; None where not measured."""
    spent = cell["times"].get(name, {}).get("median")
    return flops(cell) / spent * 1e-12 if spent else None


def best_peer(cell):
    """The fastest of the peers measured in a cell, or None."""
    known = [name for name in PEERS if speed(cell, name)]
    return max(known, key=lambda name: speed(cell, name), default=None)


def over(cell, name, peer):
    """How many times faster `name` is; None where either was not measured."""
    return speed(cell, name) / speed(cell, peer) if speed(cell, name) and speed(cell, peer) else None


def over_best(cell):
    return over(cell, "ours", best_peer(cell))


def measure_grid(cells, budget):
    heading("TFLOP/s, median of the repeats")
    table = Table("    pass", "dtype", "drop", "  d", "causal", "    S", *(name.rjust(5) for name in IMPLEMENTATIONS), "best", " ours/best")
    measured = []
    try:
        for cell in cells:
            cell = measure_cell(cell, budget)
            measured.append(cell)
            rates = [speed(cell, name) for name in IMPLEMENTATIONS]
            table.row(cell["pass"], cell["dtype"], cell["dropout"] or None, cell["d"], "causal" if cell["causal"] else "full", cell["s"],
                      *(rate and f"{rate:.0f}" for rate in rates), best_peer(cell), over_best(cell))
    except KeyboardInterrupt:
        print(f"interrupted: {len(measured)} of {len(cells)} cells are kept")
    return measured


# -------------------------------------------------------------------------------------------------- host cost


def measure_host_cost():
    """Microseconds of the host for a call whose work on the GPU is next to nothing."""
    heading("Host cost of a call with one sequence of 128 tokens and one head, us")
    names = [name for name in ("ours", "sm80", "fa2", "cudnn", "fa4")
             if name in IMPLEMENTATIONS and (name != "fa4" or flash_attention_4())]
    table = Table("    pass", *(name.rjust(6) for name in names))
    rows = []
    for direction in "forward", "both":
        batches = {name: _hundred_calls(name, direction) for name in names}
        for batch in batches.values():
            batch()                         # the process's first torch.autograd.grad imports sympy, which takes seconds
        times = round_robin(batches, 0.3, "host")
        rows.append({"pass": direction, **{name: times[name]["median"] * 1e4 for name in names}})
        table.row(direction, *(f"{rows[-1][name]:.1f}" for name in names))
    return rows


def _hundred_calls(name, direction):
    """Torch's backend is chosen once for all: its context manager costs more than a call."""
    shape = (1, 128, 1, 64) if name in TOKENS_FIRST else (1, 1, 128, 64)
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    attention, context = IMPLEMENTATIONS[name], contextlib.nullcontext
    if name in BACKENDS:
        attention = lambda q, k, v, causal, dropout: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
        context = functools.partial(sdpa_kernel, BACKENDS[name])

    def batch():
        with context(), pinned(name):
            for _ in range(100):
                out = attention(q, k, v, causal=False, dropout=0.0)
                if direction == "both":
                    torch.autograd.grad(out, (q, k, v), dout)

    for x in (q, k, v) if direction == "both" else ():
        x.requires_grad_()
    return batch


# ---------------------------------------------------------------------------------------------------- summary


def summarise(cells):
    """One row per pass, dtype and dropout: ours and our portable kernels over the best peer and over FlashAttention-2."""
    rows = []
    for (direction, dtype, dropout), group in grouped(cells, "pass", "dtype", "dropout").items():
        worst = min(group, key=over_best)
        bar = BARS_DROPOUT[direction] if dropout else BAR_CELL
        rows.append({
            "pass": direction, "dtype": dtype, "dropout": dropout, "cells": len(group),
            "most": max(speed(cell, "ours") for cell in group),
            "over_best": geometric_mean(map(over_best, group)), "worst": over_best(worst), "worst_cell": name_of(worst),
            "below": sum(over_best(cell) < bar for cell in group), "bar": bar,
            **{f"{name}_over_{peer}": geometric_mean(over(cell, name, peer) for cell in group)
               for name, peer in (("ours", "fa2"), ("ours", "cudnn"), ("ours", "fa4"), ("sm80", "fa2"), ("ours", "efficient"))},
            "sm80_worst": min(filter(None, (over(cell, "sm80", "fa2") for cell in group)), default=None),
        })
    return rows


def name_of(cell):
    return f"d {cell['d']}, S {cell['s']}, {'causal' if cell['causal'] else 'full'}"


def print_summary(rows):
    heading("Geometric means")
    table = Table("    pass", "dtype", "drop", "most TFLOP/s", "ours/best", "worst", "                    of", "below bar",
                  "ours/fa2", "ours/cudnn", "ours/fa4", "ours/efficient", "sm80/fa2", "its worst")
    for row in rows:
        table.row(row["pass"], row["dtype"], row["dropout"] or None, f"{row['most']:.0f}", row["over_best"], row["worst"], row["worst_cell"],
                  f"{row['below']}/{row['cells']}", row["ours_over_fa2"], row["ours_over_cudnn"], row["ours_over_fa4"],
                  row["ours_over_efficient"], row["sm80_over_fa2"], row["sm80_worst"])


# ------------------------------------------------------------------------------------------------------- plot


def plot(results, path):
    """TFLOP/s over the sequence length, a panel for each pass, head dim and mask."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [cell for cell in results["cells"] if cell["dtype"] == "bf16" and not cell["dropout"] and cell["pass"] != "both"]
    cells.sort(key=lambda cell: (cell["pass"] != "forward", cell["causal"], cell["d"]))
    panels = grouped(cells, "pass", "causal", "d")
    columns = len({cell["d"] for cell in cells})
    figure, axes = pyplot.subplots(len(panels) // columns, columns, figsize=(5 * columns, 13), layout="constrained", squeeze=False)
    for axis, ((direction, causal, d), group) in zip(axes.flat, panels.items()):
        for name in IMPLEMENTATIONS:
            points = [(cell["s"], speed(cell, name)) for cell in group if speed(cell, name)]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, linewidth=2.5 if name == "ours" else 1.2, label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{direction}, d {d}, {'causal' if causal else 'full'}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    figure.suptitle(f"flash_attn {results['versions']['flash_attn']}, bfloat16, {TOKENS} tokens of width {WIDTH}, {results['machine']['name']}, "
                    f"torch {results['versions']['torch']}\n{results['date']}, sources {results['stamp']['gpu']}; matrix product "
                    f"{results['gemm_tflops']:.0f} TFLOP/s", fontsize=11)
    figure.savefig(path, dpi=90)


# ------------------------------------------------------------------------------------------------------- main


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small grid, to try it; results go to build/")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="cells with all of these: a pass, a dtype, a head dim, a length, causal, full, dropout")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD",
                        help="no cells with any of these, nor these implementations, where time on a GPU is short")
    parser.add_argument("--out", type=Path, help="results file instead of the default one")
    return parser.parse_args()


def words_of(cell):
    return {cell["pass"], cell["dtype"], str(cell["d"]), str(cell["s"]), "causal" if cell["causal"] else "full",
            "dropout" if cell["dropout"] else "exact"}


def main():
    arguments = parse_arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in set(arguments.without) & set(PEERS):
        del IMPLEMENTATIONS[name]
    results = harness.describe("cuda")
    results["gemm_tflops"] = harness.gemm_rate(torch.bfloat16, "cuda", 8192) * 1e-12
    print(f"{results['machine']['name']}, torch {torch.__version__}, sources {results['stamp']['gpu']}, "
          f"8192^3 matrix product {results['gemm_tflops']:.0f} TFLOP/s", flush=True)
    results["host_us"] = measure_host_cost()
    cells = [cell for cell in grid(arguments.quick)
             if words_of(cell) >= set(arguments.only) and not words_of(cell) & set(arguments.without)]
    cells = measure_grid(cells, BUDGET)
    results = {**results, "summary": summarise(cells), "cells": cells}
    print_summary(results["summary"])
    folder = harness.RESULTS.parent.parent / "build" if arguments.quick else harness.RESULTS
    path = arguments.out or folder / f"attn-{harness.short_name(results['machine'])}.json"
    harness.write_json(path, results)
    try:
        plot(results, path.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no plot")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
