"""What a training step gains when a model's attention modules become ours: forward and backward of
nn.MultiheadAttention and of a two-layer nn.TransformerEncoder, torch's and ours of the same parameters.

    python benchmarks/bench_modules.py [--device cuda] [--quick] [--only WORD ...] [--budget SECONDS] [--out FILE [--resume]]

Batches of 1 to 32 sequences of 32 to 4096 tokens, without padding and with half of each batch padding, given
as key_padding_mask. On a CPU in float32 and bfloat16, on a GPU in bfloat16. Dropout is 0 in the attention
module alone and torch's default, 0.1, in the encoder. Times are those of steps that follow each other, so
that on a GPU the host's part counts where it is what limits. Peak memory is what a step allocates beyond its
inputs and parameters. Results go to benchmarks/results/modules-<device>.json; with --quick to build/.
A run stops by itself before --budget seconds are over and keeps what it has; with --resume it goes on where --out ends.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn

import flash_attn
import harness
from harness import Table, geometric_mean, grouped, heading, ratio, round_robin, seconds

BATCHES, LENGTHS = (1, 8, 32), (32, 128, 512, 1024, 4096)
QUICK = (1, 8), (32, 512)
SIZES = {"cpu": (512, 8), "cuda": (1024, 16)}                   # channels, heads
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_SCORES = {"cpu": 2 ** 25, "cuda": 2 ** 29}                 # batch * length^2 of the largest cell
TOKENS = {"cpu": 1, "cuda": 2 ** 17}                            # in steps that follow each other, 8 at most
BAR_CELL, BAR_MEAN = 0.97, 1.1                                  # times torch's speed that we promise


def cells(device, quick):
    batches, lengths = QUICK if quick else (BATCHES, LENGTHS)
    for module, dtype, padded, b, s in itertools.product(("attention", "encoder"), DTYPES[device],
                                                         (False, True), batches, lengths):
        if b * s * s <= MOST_SCORES[device]:
            yield {"module": module, "dtype": dtype, "padded": padded, "b": b, "s": s}


def modules(cell, device):
    """{"ours": module, "torch": module} of the same parameters, in training mode."""
    channels, heads = SIZES[device]
    options = dict(batch_first=True, device=device, dtype=TYPES[cell["dtype"]])
    if cell["module"] == "attention":
        theirs = nn.MultiheadAttention(channels, heads, **options)
        ours = nn.MultiheadAttention(channels, heads, **options)
    else:
        layer = nn.TransformerEncoderLayer(channels, heads, 4 * channels, **options)
        theirs, ours = (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    flash_attn.replace(ours)
    return {"ours": ours, "torch": theirs}


def step_of(module, cell, device):
    """A function without arguments: one forward and backward."""
    generator = torch.Generator().manual_seed(0)
    b, s = cell["b"], cell["s"]
    x, gradient = (torch.randn(b, s, SIZES[device][0], generator=generator).to(device, TYPES[cell["dtype"]])
                   for _ in range(2))
    x.requires_grad_()
    padding = None
    if cell["padded"]:                              # lengths from 1/4 to 3/4, spread evenly
        lengths = s * (1 + 2 * (torch.arange(b) + 0.5) / b) / 4
        padding = (torch.arange(s) >= lengths[:, None]).to(device)

    def step():
        module.zero_grad()
        if cell["module"] == "attention":
            out = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        else:
            out = module(x, src_key_padding_mask=padding)
        out.backward(gradient)
    return step


def several(step, count, device):
    def run():
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    return run


def measure(cell, device, budget):
    steps = {name: step_of(module, cell, device) for name, module in modules(cell, device).items()}
    for step in steps.values():
        step()
    count = max(1, min(8, TOKENS[device] // (cell["b"] * cell["s"])))
    times = round_robin({name: several(step, count, device) for name, step in steps.items()}, budget)
    for each in times.values():
        each["min"], each["median"] = (each[key] / count for key in ("min", "median"))
    return {**cell, "times": times}, {**cell, "peak_bytes": {name: peak_bytes(step, device)
                                                             for name, step in steps.items()}}


def peak_bytes(step, device):
    """The most that a step held at a time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def summary(results):
    """Geometric means by module, dtype and padding, and the worst cells."""
    heading("ours over torch's")
    table = Table("   module", "dtype", "padded", "cells", " mean", "worst", "worst cell     ")
    for group, members in grouped(results["cells"], "module", "dtype", "padded").items():
        worst = min(members, key=lambda cell: ratio(cell, "ours", "torch"))
        ratios = [ratio(cell, "ours", "torch") for cell in members]
        table.row(*group, len(members), geometric_mean(ratios), min(ratios), f"b {worst['b']} s {worst['s']}")
    ratios = [ratio(cell, "ours", "torch") for cell in results["cells"]]
    print(f"all: {geometric_mean(ratios):.2f} (promised {BAR_MEAN}), worst {min(ratios):.2f} "
          f"(promised {BAR_CELL})")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small grid, to try the script")
    parser.add_argument("--repeats", type=float, default=0.5, help="seconds of repeats in a cell, each")
    parser.add_argument("--budget", type=float, help="seconds after which no cell is begun")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--only", nargs="*", default=(), help="cells with all of these, such as encoder bf16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="measure what --out lacks")
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    budget = harness.Budget(arguments.budget)
    harness.start_autograd()
    results = {**harness.describe(device), "channels_heads": SIZES[device], "cells": [], "memory": []}
    known = harness.earlier(arguments.resume and arguments.out, results)
    results.update((key, known[key]) for key in ("cells", "memory") if key in known)
    wanted = [cell for cell in cells(device, arguments.quick)
              if set(arguments.only) <= {str(value) for value in cell.values()}
              and not any(cell.items() <= other.items() for other in results["cells"])]
    table = Table("   cell", "   module", "dtype", "padded", " b", "   s", " ours ms", "torch ms", "ratio",
                  " ours MB", "torch MB")
    for place, cell in budget.each(wanted):
        timed, memory = measure(cell, device, arguments.repeats)
        results["cells"].append(timed)
        results["memory"].append(memory)
        peak = memory["peak_bytes"]
        table.row(place, *cell.values(), seconds(timed, "ours") * 1e3, seconds(timed, "torch") * 1e3,
                  ratio(timed, "ours", "torch"), peak["ours"] / 1e6, peak["torch"] / 1e6)
    if results["cells"]:
        summary(results)

    partial = arguments.quick or arguments.only or arguments.budget
    folder = harness.RESULTS.parent.parent / "build" if partial else harness.RESULTS
    name = f"modules-{harness.short_name(results['machine'])}.json"
    harness.write_json(arguments.out or folder / name, results)


if __name__ == "__main__":
    main()
