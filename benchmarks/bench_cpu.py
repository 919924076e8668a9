"""The CPU kernels beside torch's scaled_dot_product_attention (SDPA) and attention written out.

    python benchmarks/bench_cpu.py [--isa amx|avx512_bf16|avx512|avx2] [--quick | --masks]
                                   [--dtype bf16 ...] [--threads 1 ...] [--peers sdpa] [--budget SECONDS] [--out FILE [--resume]]

Both sides are held to one instruction set: the script starts itself again with what caps ours, torch, MKL and
oneDNN in the environment, and refuses to measure if the caps did not take. GFLOP/s count 4 h S^2 d for the
forward pass, half of it if causal, and 2.5 times that for the backward pass, whatever an implementation
really computes. Results go to benchmarks/results/cpu-<isa>-<cpu>.json and .png; with --quick, a small grid to
try the script, to build/; with --masks, only what biases and masks cost, to masks-<isa>-<cpu>.json.

With --dtype or --threads only that part of the grid is measured, and neither memory nor host cost. A run stops by itself
before --budget seconds are over and keeps what it has, in build/ unless --out says where; with --resume it goes on
where that file ends, so that a grid may be measured in pieces.
"""

import argparse
import ctypes
import functools
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

import flash_attn
import harness
from flash_attn.info import report
from harness import Table, geometric_mean, grouped, heading, ratio, round_robin, seconds

CAPS = {
    "amx": {"FLASH_ATTN_CPU_ISA": "amx"},                 # neither side is held back
    "avx512_bf16": {"FLASH_ATTN_CPU_ISA": "avx512_bf16", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
                    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"FLASH_ATTN_CPU_ISA": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
               "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},      # neither AMX nor AVX512-BF16 on either side
    "avx2": {"FLASH_ATTN_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = {512: 8, 1024: 8, 2048: 8, 4096: 4, 8192: 2}      # by sequence length: a call stays within seconds
QUICK = 512, 2048                                         # the sequence lengths of --quick
STANDARD_MOST = 2048                                      # longest sequence whose S x S matrix is written out

# What we promise, as ratios to SDPA's speed unless said otherwise; with AMX bf16 forward is to reach 1.5.
BARS = {("forward", "fp32"): 1.15, ("forward", "bf16"): 1.15, ("forward", "fp16"): 1.15,
        ("backward", "fp32"): 1.2, ("backward", "bf16"): 3.0, ("backward", "fp16"): 3.0}
BAR_AMX_FORWARD = 1.5
BAR_CELL = 0.9
BAR_HALF_BACKWARD = 0.85                                  # of our own fp32 backward
BAR_CAUSAL = 0.6                                          # of the time of full attention, from S = 1024 on


# -------------------------------------------------------------------------------------------- implementations


def ours(q, k, v, causal):
    return flash_attn.flash_attn_func(q, k, v, causal=causal)


def sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def standard(q, k, v, causal):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(_future(q.shape[-2]), -torch.inf)
    return scores.softmax(-1) @ v


@functools.cache
def _future(s):
    return torch.ones(s, s, dtype=torch.bool).triu(1)


IMPLEMENTATIONS = {"ours": ours, "sdpa": sdpa, "standard": standard}


def operands(name, cell):
    """q, k, v, dout: the same values for all, in each one's layout, (1, s, h, d) or (1, h, s, d)."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, cell["h"], cell["s"], cell["d"]
    tensors = [torch.randn(shape, generator=generator).to(DTYPES[cell["dtype"]]) for _ in range(4)]
    return [x.transpose(1, 2).contiguous() for x in tensors] if name == "ours" else tensors


def forward_call(name, cell):
    q, k, v, _ = operands(name, cell)
    return lambda: IMPLEMENTATIONS[name](q, k, v, cell["causal"])


def backward_call(name, cell):
    *inputs, dout = operands(name, cell)
    for x in inputs:
        x.requires_grad_()
    out = IMPLEMENTATIONS[name](*inputs, cell["causal"])
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def training_call(name, cell):
    *inputs, dout = operands(name, cell)
    for x in inputs:
        x.requires_grad_()
    return lambda: torch.autograd.grad(IMPLEMENTATIONS[name](*inputs, cell["causal"]), inputs, dout)


CALLS = {"forward": forward_call, "backward": backward_call}


# ------------------------------------------------------------------------------------------------------- caps


def start_again_capped(isa):
    """The libraries read their caps when they are loaded: a process that lacks them starts anew."""
    if any(os.environ.get(name) != value for name, value in CAPS[isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CAPS[isa]})


def require_caps(isa, rates):
    """Capped below bf16's own instructions, SDPA cannot run much faster in it than in fp32."""
    if f"CPU instruction set: {isa}\n" not in report():
        sys.exit(f"bench_cpu.py: flash_attn does not run at {isa} here; see flash_attn.info()")
    if isa in ("amx", "avx512_bf16"):
        return
    cell = {"s": 512, "h": 8, "d": 64, "causal": False}
    calls = {dtype: forward_call("sdpa", {**cell, "dtype": dtype}) for dtype in ("fp32", "bf16")}
    times = round_robin(calls, 0.5)
    gain = times["fp32"]["min"] / times["bf16"]["min"]
    if gain > 1.3:
        sys.exit(f"bench_cpu.py: SDPA is {gain:.2f} times as fast in bf16 as in fp32: the cap did not take")
    if rates["fma_peak"] and rates["gemm_fp32"] > 1.05 * rates["fma_peak"]:
        sys.exit(f"bench_cpu.py: torch's matrix product is faster than {isa} can be: the cap did not take")


# -------------------------------------------------------------------------------------------- machine's rates


# Twelve independent chains cover the latency of two multiply-add units; the empty asm keeps them apart.
FMA_LOOP = """
typedef float vector __attribute__((vector_size(WIDTH)));
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define START(i) vector x##i = {i};
#define STEP(i)  x##i = x##i * half + one; __asm__("" : "+v"(x##i));
#define SUM(i)   + x##i[0]
float fma_loop(long n)
{
    vector half = {0}, one = {0};
    half += 0.5f, one += 1.0f;
    TWELVE(START)
    while (n--) { TWELVE(STEP) }
    return 0 TWELVE(SUM);
}
"""
FMA_FLAGS = {"avx2": (32, ["-mavx2", "-mfma"])}
FMA_FLAGS_512 = 64, ["-mavx512f"]


def fma_peak(isa, threads):
    """FLOP/s of fp32 multiply-adds in registers: no fp32 kernel can be faster on as many threads. None without a compiler."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not shutil.which(compiler[0]):
        return None
    width, flags = FMA_FLAGS.get(isa, FMA_FLAGS_512)
    steps = 10 ** 7
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(FMA_LOOP)
        command = [*compiler, "-O3", *flags, f"-DWIDTH={width}", "-shared", "-fPIC", source, "-o", library]
        subprocess.run(command, check=True)
        loop = ctypes.CDLL(str(library)).fma_loop           # ctypes lets go of the GIL
        loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_float
        times = round_robin({"fma": lambda: list(pool.map(loop, [steps] * threads))}, 0.5)
    return threads * steps * 12 * 2 * (width // 4) / times["fma"]["min"]


def machine_rates(isa, threads):
    torch.set_num_threads(threads)
    return {"threads": threads, "fma_peak": fma_peak(isa, threads),
            "gemm_fp32": harness.gemm_rate(torch.float32)}


# ------------------------------------------------------------------------------------------------------- grid


def grid(lengths, thread_counts, dtypes):
    """Cells that are compared with each other, causal with full and dtype with dtype, follow each other."""
    for threads, direction, d, s, causal, dtype in itertools.product(
            thread_counts, CALLS, (64, 128), lengths, (False, True), dtypes):
        yield {"pass": direction, "dtype": dtype, "threads": threads, "d": d, "causal": causal, "s": s,
               "h": HEADS[s]}


def flops(cell):
    full = 4 * cell["h"] * cell["s"] ** 2 * cell["d"]
    return full * (0.5 if cell["causal"] else 1) * (2.5 if cell["pass"] == "backward" else 1)


def speed(cell, name):
    """GFLOP/s; None where not measured."""
    spent = seconds(cell, name)
    return flops(cell) / spent * 1e-9 if spent else None


class Patience:
    """Foretells a call's time from the cell before it, so that a peer far behind does not hold up the run."""

    def __init__(self, peers):
        self.peers, self.rates = peers, {}

    def refusal(self, name, cell):
        """Why an implementation is left out, or None."""
        if name not in self.peers and name != "ours":
            return "not asked for"
        if name == "standard" and cell["s"] > STANDARD_MOST:
            return f"not run beyond S = {STANDARD_MOST}"
        expected = self._expected(name, cell)
        if expected > 3 and expected > 5 * self._expected("ours", cell):
            return f"a call would take about {expected:.0f} s"
        return None

    def learn(self, cell):
        for name in IMPLEMENTATIONS:
            if seconds(cell, name):
                self.rates[self._kind(name, cell)] = flops(cell) / seconds(cell, name)

    def _expected(self, name, cell):
        rate = self.rates.get(self._kind(name, cell))
        return flops(cell) / rate if rate else 0

    def _kind(self, name, cell):
        return name, cell["pass"], cell["dtype"], cell["threads"], cell["causal"]


def measure_cell(cell, patience, budget):
    """The cell with its times."""
    torch.set_num_threads(cell["threads"])
    refusals = {name: patience.refusal(name, cell) for name in IMPLEMENTATIONS}
    calls = {name: CALLS[cell["pass"]](name, cell) for name, refusal in refusals.items() if not refusal}
    if cell["pass"] == "forward" and cell["s"] == min(HEADS):
        require_agreement(calls)
    times = round_robin(calls, budget)
    skipped = {name: {"skipped": refusal} for name, refusal in refusals.items() if refusal}
    measured = {**cell, "times": {**times, **skipped}}
    patience.learn(measured)
    return measured


def require_agreement(calls):
    """All compute the same thing; how exactly is the tests' business."""
    expected = calls["sdpa"]()
    torch.testing.assert_close(calls["ours"]().transpose(1, 2), expected, atol=0.02, rtol=0.02)
    if "standard" in calls:
        torch.testing.assert_close(calls["standard"](), expected, atol=0.02, rtol=0.02)


def without_known(cells, known):
    """The cells that an earlier run has not measured."""
    return [cell for cell in cells if not any(cell.items() <= other.items() for other in known)]


def measure_grid(cells, peers, repeats, budget):
    """The cells that the budget has time for; `repeats`: seconds for each implementation's repeats."""
    heading("GFLOP/s, best of the repeats")
    table = Table("   cell", "threads", "    pass", "  d", "   S", "h", "causal", "dtype", " ours", " sdpa", "standard",
                  "ours/sdpa")
    patience, measured = Patience(peers), []
    for place, cell in budget.each(cells):
        cell = measure_cell(cell, patience, repeats)
        measured.append(cell)
        rates = [speed(cell, name) for name in IMPLEMENTATIONS]
        table.row(place, cell["threads"], cell["pass"], cell["d"], cell["s"], cell["h"],
                  "causal" if cell["causal"] else "full", cell["dtype"],
                  *(rate and f"{rate:.1f}" for rate in rates), ratio(cell, "ours", "sdpa"))
    return measured


# --------------------------------------------------------------------------------------------- biases and masks


# Sizes (b, h, S), and what is given: its bar is a share of our own time without. Padding hides half of the keys.
MASKED_SIZES = (4, 8, 128), (2, 8, 512), (1, 4, 2048)
GIVEN = {"bias": 1.25, "bias with gradient": 1.25, "mask": 1.25, "padding": 1 / 1.5}
BAR_MASKED = 1.5                                          # of SDPA with the same bias or mask


def score_operand(given, cell):
    """The bias or mask of a cell, the same for ours and SDPA."""
    generator = torch.Generator().manual_seed(1)
    b, h, s = cell["b"], cell["h"], cell["s"]
    if given == "padding":
        return (torch.arange(s) < s // 2).expand(b, 1, 1, s).contiguous()
    if given == "mask":
        return torch.rand(1, 1, s, s, generator=generator) < 0.9
    return torch.randn(1, h, s, s, generator=generator).to(DTYPES[cell["dtype"]]) if given else None


def masked_call(name, given, cell):
    generator = torch.Generator().manual_seed(0)
    shape = (cell["b"], cell["h"], cell["s"], cell["d"])
    *inputs, dout = [torch.randn(shape, generator=generator).to(DTYPES[cell["dtype"]]) for _ in range(4)]
    if name == "ours":
        inputs, dout = [x.transpose(1, 2).contiguous() for x in inputs], dout.transpose(1, 2).contiguous()
    backward, mask = cell["pass"] == "backward", score_operand(given, cell)
    wanted = [*inputs, mask] if given == "bias with gradient" else inputs
    for x in wanted if backward else ():
        x.requires_grad_()
    attention = flash_attn.flash_attn_func if name == "ours" else F.scaled_dot_product_attention
    call = functools.partial(attention, *inputs, attn_mask=mask)
    if not backward:
        return call
    out = call()
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def masked_cells(thread_counts, dtypes):
    for threads, direction, size, dtype in itertools.product(thread_counts, CALLS, MASKED_SIZES, dtypes):
        yield {"threads": threads, "pass": direction, "dtype": dtype, **dict(zip("bhs", size)), "d": 64}


def measure_masks(cells, repeats, budget):
    """What a bias or mask costs: `share` of our time without; and SDPA's time with the same over ours."""
    heading("Biases and masks, d = 64: ms; bars: share 1.25 (padding 0.67), ours/sdpa 1.5")
    table = Table(" cell", "threads", "    pass", "dtype", "b", "h", "   S", "             given", "  ours", "share",
                  "ours/sdpa")
    rows = []
    for place, cell in budget.each(cells):
        torch.set_num_threads(cell["threads"])
        kinds = [None, *(given for given in GIVEN if cell["pass"] == "backward" or given != "bias with gradient")]
        calls = {(name, given): masked_call(name, given, cell) for given in kinds for name in ("ours", "sdpa")}
        times = {key: each["min"] for key, each in round_robin(calls, repeats).items()}
        for given in kinds:
            mine, theirs = times["ours", given], times["sdpa", given]
            rows.append({**cell, "given": given or "none", "ours_ms": mine * 1e3, "share": mine / times["ours", None],
                         "over_sdpa": theirs / mine})
            table.row(place, cell["threads"], cell["pass"], cell["dtype"], *(cell[size] for size in "bhs"), given or "none",
                      mine * 1e3, rows[-1]["share"], theirs / mine)
    return rows


def print_masks_below(rows):
    rows = [row for row in rows if row["given"] != "none"]
    missed = [row for row in rows if row["share"] > GIVEN[row["given"]] or row["over_sdpa"] < BAR_MASKED]
    print(f"{len(missed)} of {len(rows)} miss a bar")


# ----------------------------------------------------------------------------------------------------- memory


def measure_memory(lengths, threads):
    """Peak memory beyond inputs, outputs and gradients, in MB."""
    heading(f"Peak scratch in MB, {threads} threads; bar: 8 h S (d + 2) bytes + 32 MB a thread")
    table = Table("dtype", "    pass", "    S", "h", " d", "  ours", "  sdpa", "   bar")
    rows = []
    for dtype, direction, s in itertools.product(("fp32", "bf16"), CALLS, lengths):
        cell = {"dtype": dtype, "pass": direction, "s": s, "h": 4, "d": 64, "causal": True}
        scratch = {name: in_fresh_process(peak_scratch, name, cell, threads) for name in ("ours", "sdpa")}
        bar = 8 * cell["h"] * s * (cell["d"] + 2) * 1e-6 + 32 * threads
        rows.append({**cell, "threads": threads, **scratch, "bar": bar})
        table.row(dtype, direction, s, cell["h"], cell["d"], scratch["ours"], scratch["sdpa"], bar)
    return rows


def in_fresh_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_scratch(name, cell, threads):
    """One call in a process that has done little else: no memory freed earlier may serve it."""
    torch.set_num_threads(threads)
    CALLS[cell["pass"]](name, {**cell, "s": 64})()          # loads code and starts threads
    call = CALLS[cell["pass"]](name, cell)
    ctypes.CDLL(None).malloc_trim(0)                        # gives back what making the operands left free
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")           # the peak counts from here
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    return (resident("VmHWM") - before - sum(x.nbytes for x in results)) * 1e-6


def resident(field):
    """Bytes of memory that this process holds (VmRSS) or held at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# -------------------------------------------------------------------------------------------------- host cost


def measure_host_cost():
    """Microseconds of a call that computes next to nothing: the least that a training step pays a layer."""
    heading("Host cost of a call with 16 tokens and one head, us, one thread")
    table = Table("            call", "  ours", "  sdpa", "standard")
    torch.set_num_threads(1)
    cell = {"dtype": "fp32", "s": 16, "h": 1, "d": 64, "causal": False}
    rows = []
    for title, make in ("forward", forward_call), ("forward+backward", training_call):
        batches = {name: _hundred(make(name, cell)) for name in IMPLEMENTATIONS}
        times = round_robin(batches, 0.3)
        rows.append({"call": title, **{name: times[name]["min"] * 1e4 for name in times}})
        table.row(title, *(f"{rows[-1][name]:.1f}" for name in times))
    return rows


def _hundred(call):
    def batch():
        for _ in range(100):
            call()
    return batch


# ---------------------------------------------------------------------------------------------------- summary


def bar(isa, direction, dtype):
    amx = isa == "amx" and (direction, dtype) == ("forward", "bf16")
    return BAR_AMX_FORWARD if amx else BARS[direction, dtype]


def summarise(isa, cells, rates):
    """One row per pass, dtype and number of threads."""
    peaks = {rate["threads"]: rate["fma_peak"] for rate in rates}
    rows = []
    for (direction, dtype, threads), group in grouped(cells, "pass", "dtype", "threads").items():
        known = [cell for cell in group if ratio(cell, "ours", "sdpa")]
        if not known:
            continue
        worst = min(known, key=lambda cell: ratio(cell, "ours", "sdpa"))
        gflops = geometric_mean(speed(cell, "ours") for cell in group)
        rows.append({
            "pass": direction, "dtype": dtype, "threads": threads, "gflops": gflops,
            "of_fma_peak": gflops * 1e9 / peaks[threads] if peaks.get(threads) else None,
            "over_sdpa": geometric_mean(ratio(cell, "ours", "sdpa") for cell in known),
            "bar": bar(isa, direction, dtype), "measured": len(known), "cells": len(group),
            "over_standard": geometric_mean(ratio(cell, "ours", "standard") for cell in group),
            "worst": ratio(worst, "ours", "sdpa"), "worst_cell": name_of(worst),
            "below": sum(ratio(cell, "ours", "sdpa") < BAR_CELL for cell in known),
        })
    return rows


def name_of(cell):
    return f"d {cell['d']}, S {cell['s']}, {'causal' if cell['causal'] else 'full'}"


def with_quotients(cells, field, value, base, quotient):
    """The cells whose `field` is `value`, each with its quotient to its twin, which has `base` there."""
    identity = ("pass", "dtype", "threads", "d", "causal", "s")
    index = {tuple(cell[name] for name in identity): cell for cell in cells}
    twins = ((cell, index.get(tuple({**cell, field: base}[name] for name in identity)))
             for cell in cells if cell[field] == value)
    return [{**cell, "quotient": quotient(cell, twin)} for cell, twin in twins if twin]


def half_backward(cells):
    """Our bf16 and fp16 backward's speed over our fp32 backward's."""
    backward = [cell for cell in cells if cell["pass"] == "backward"]
    rows = []
    for dtype in "bf16", "fp16":
        pairs = with_quotients(backward, "dtype", dtype, "fp32",
                               lambda cell, twin: seconds(twin, "ours") / seconds(cell, "ours"))
        rows += _quotient_rows(pairs, min, "dtype", "threads")
    return rows


def causal_times(cells):
    """Our time for causal attention over our time for full attention."""
    pairs = with_quotients(cells, "causal", True, False,
                           lambda cell, twin: seconds(cell, "ours") / seconds(twin, "ours"))
    return _quotient_rows(pairs, max, "pass", "s")


def _quotient_rows(pairs, worst, *fields):
    rows = []
    for values, group in grouped(pairs, *fields).items():
        quotients = [cell["quotient"] for cell in group]
        rows.append({**dict(zip(fields, values)), "mean": geometric_mean(quotients),
                     "worst": worst(quotients)})
    return rows


def print_summary(results):
    heading("Ours over SDPA, geometric means; peak: of the machine's fp32 multiply-add rate")
    table = Table("threads", "dtype", "    pass", "GFLOP/s", "of peak", "ours/sdpa", " bar", "  cells",
                  "ours/standard", "worst", "                   of", "below 0.9")
    for row in results["summary"]:
        verdict = "" if row["over_sdpa"] >= row["bar"] else "   misses its bar"
        table.row(row["threads"], row["dtype"], row["pass"], f"{row['gflops']:.1f}", row["of_fma_peak"],
                  row["over_sdpa"], row["bar"], f"{row['measured']}/{row['cells']}", row["over_standard"],
                  row["worst"], row["worst_cell"], f"{row['below']}{verdict}")
    heading(f"bf16 and fp16 backward over our fp32 backward; bar {BAR_HALF_BACKWARD}")
    table = Table("threads", "dtype", "mean", "worst")
    for row in results["half_backward"]:
        table.row(row["threads"], row["dtype"], row["mean"], row["worst"])
    heading(f"Time of causal over full attention; bar {BAR_CAUSAL} from S = 1024 on")
    table = Table("    pass", "   S", "mean", "worst")
    for row in results["causal_over_full"]:
        table.row(row["pass"], row["s"], row["mean"], row["worst"])


def print_cells_below(cells):
    below = [cell for cell in cells if (ratio(cell, "ours", "sdpa") or 1) < BAR_CELL]
    heading(f"Cells below {BAR_CELL}: {len(below) or 'none'}")
    for cell in sorted(below, key=lambda cell: ratio(cell, "ours", "sdpa")):
        print(f"  {ratio(cell, 'ours', 'sdpa'):.2f}  {cell['dtype']} {cell['pass']}, {name_of(cell)}, "
              f"{cell['threads']} threads")


# ------------------------------------------------------------------------------------------------------- plot


def plot(results, path):
    """Every cell's ratio to SDPA as a number on a colour: blue is faster, red is slower."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = grouped(results["cells"], "pass", "dtype")
    figure, axes = pyplot.subplots(len(CALLS), len(DTYPES), figsize=(15, 8), layout="constrained")
    for row, direction in enumerate(CALLS):
        for column, dtype in enumerate(DTYPES):
            draw_panel(axes[row, column], f"{dtype} {direction}", panels[direction, dtype])
    machine, versions = results["machine"], results["versions"]
    figure.suptitle(f"flash_attn {versions['flash_attn']}: speed over scaled_dot_product_attention of torch "
                    f"{versions['torch']}, at {results['isa']}\n"
                    f"{machine['name']} ({machine['family_model']}), {machine['threads']} threads, "
                    f"{results['date']}, sources {results['stamp']['cpu']}",
                    fontsize=11)
    figure.savefig(path, dpi=110)


def draw_panel(axis, title, cells):
    from matplotlib.colors import LogNorm

    lengths = sorted({cell["s"] for cell in cells})
    rows = grouped(cells, "threads", "d", "causal")
    table = [[ratio(cell, "ours", "sdpa") for cell in group] for group in rows.values()]
    colours = [[value or float("nan") for value in line] for line in table]
    axis.imshow(colours, cmap="RdBu", norm=LogNorm(1 / 3, 3), aspect="auto")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            ink = "white" if value and (value > 2.2 or value < 0.45) else "black"
            label = f"{value:.2f}" if value else "-"
            axis.text(x, y, label, ha="center", va="center", color=ink, fontsize=9)
    axis.set_title(f"{title}, geometric mean {geometric_mean(sum(table, [])):.2f}", fontsize=10)
    axis.set_xticks(range(len(lengths)), [f"S {s}" for s in lengths], fontsize=9)
    axis.set_yticks(range(len(rows)), [f"{threads} thr, d {d}, {'causal' if causal else 'full'}"
                                       for threads, d, causal in rows], fontsize=9)


# ------------------------------------------------------------------------------------------------------- main


def parse_arguments():
    ours = re.search(r"CPU instruction set: (\w+)", report()).group(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=CAPS, default=ours if ours in CAPS else None,
                        help="instruction set of both sides (default: the best that we use here)")
    parser.add_argument("--quick", action="store_true", help="a small grid, to try it; results go to build/")
    parser.add_argument("--masks", action="store_true", help="only what biases and masks cost")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these")
    parser.add_argument("--threads", nargs="+", type=int, help="only these numbers of threads (default: 1 and all)")
    parser.add_argument("--peers", nargs="+", choices=("sdpa", "standard"), default=("sdpa", "standard"), help="only these beside ours")
    parser.add_argument("--budget", type=float, help="seconds after which no cell is begun")
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--resume", action="store_true", help="measure what --out lacks")
    arguments = parser.parse_args()
    if arguments.isa is None:
        parser.error("this machine has neither AVX-512 nor AVX2: there is nothing to compare like with like")
    if arguments.resume and not arguments.out:
        parser.error("--resume needs the file, --out")
    return arguments


def measure_masks_only(arguments, budget):
    results = {**harness.describe(), "isa": arguments.isa, "caps": CAPS[arguments.isa]}
    known = harness.earlier(arguments.resume and arguments.out, results).get("masks", [])
    cells = masked_cells(arguments.threads or (1,), arguments.dtype or ("fp32", "bf16"))
    results["masks"] = known + measure_masks(without_known(cells, known), 0.05 if arguments.quick else 0.3, budget)
    print_masks_below(results["masks"])
    return results


def measure(arguments, budget):
    isa, quick, partial = arguments.isa, arguments.quick, arguments.dtype or arguments.threads
    results = {**harness.describe(), "isa": isa, "caps": CAPS[isa]}
    known = harness.earlier(arguments.resume and arguments.out, results)
    thread_counts = arguments.threads or sorted({1, results["machine"]["threads"]})
    dtypes = arguments.dtype or tuple(DTYPES)
    print(f"{results['machine']['name']}, at {isa}, {results['machine']['threads']} threads, "
          f"torch {torch.__version__}, sources {results['stamp']['cpu']}")
    results["rates"] = known.get("rates") or [machine_rates(isa, threads) for threads in thread_counts]
    for rate in results["rates"]:
        peak = f"{rate['fma_peak'] * 1e-9:.0f}" if rate["fma_peak"] else "?"
        print(f"{rate['threads']} threads: fp32 multiply-add peak {peak} GFLOP/s, torch's matrix product "
              f"{rate['gemm_fp32'] * 1e-9:.0f} GFLOP/s")
    torch.set_num_threads(1)
    require_caps(isa, results["rates"][0])
    if not partial:
        results["memory"] = known.get("memory") or measure_memory((4096,) if quick else (4096, 8192, 16384), thread_counts[-1])
        results["host_us"] = known.get("host_us") or measure_host_cost()
        masks = known.get("masks", [])
        cells = without_known(masked_cells(thread_counts[-1:], ("fp32", "bf16")), masks)
        results["masks"] = masks + measure_masks(cells, 0.05 if quick else 0.3, budget)
        print_masks_below(results["masks"])
    cells = list(grid(QUICK if quick else HEADS, thread_counts, dtypes))
    measured = known.get("cells", []) + measure_grid(without_known(cells, known.get("cells", [])), arguments.peers,
                                                              0.05 if quick else 0.4, budget)
    results["complete"] = not partial and len(measured) == len(cells) and "standard" in arguments.peers
    return {**results, "summary": summarise(isa, measured, results["rates"]), "half_backward": half_backward(measured),
            "causal_over_full": causal_times(measured), "cells": measured}


def main():
    arguments = parse_arguments()
    start_again_capped(arguments.isa)
    budget = harness.Budget(arguments.budget)
    harness.start_autograd()
    results = measure_masks_only(arguments, budget) if arguments.masks else measure(arguments, budget)
    name = f"{'masks' if arguments.masks else 'cpu'}-{arguments.isa}-{harness.short_name(results['machine'])}.json"
    whole = results.get("complete", arguments.masks) and not (arguments.quick or arguments.dtype or arguments.threads)
    path = arguments.out or (harness.RESULTS if whole else harness.RESULTS.parent.parent / "build") / name
    harness.write_json(path, results)
    if not arguments.masks:
        print_summary(results)
        print_cells_below(results["cells"])
    if results.get("complete"):
        plot(results, path.with_suffix(".png"))
    print(f"\nwrote {path}, {budget.spent():.0f} s")


if __name__ == "__main__":
    main()
