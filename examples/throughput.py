"""Trains the examples' models with each attention for some steps, and says how fast, side by side, on one
machine.

    throughput.py gpt2:small gpt2:medium bert:base --gpt2-data data/gpt2 --bert-data data/bert

A case is a model and its preset. All is timed that a training step of gpt2/train.py or bert/train.py
does, drawing the data and the optimiser included; compilation is not used. BERT with flash attention sees
no padding; with the others every batch is padded to its longest sequence. All attentions of a case see
the same data, and their losses are kept: they have to fall together. Where a batch does not fit the GPU's
memory, its halves are accumulated until it does, and the table says so; such a run then draws its data in
other pieces.

Writes training-<machine>.json and .png to benchmarks/results/ or --out. With --add the file keeps what an
earlier call measured: so a case, or one attention of it, is a call of its own where time on a GPU is short.
"""
import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent / "benchmarks")]
import harness
import training
from bert import train as bert
from gpt2 import train as gpt2

MODELS = {"gpt2": gpt2.COMMAND, "bert": bert.COMMAND}
ATTENTIONS = ("flash", "sdpa", "standard")
COLORS = {"flash": "#1f4e79", "sdpa": "#c55a11", "standard": "#7f7f7f"}
BATCH = {"gpt2": 32, "bert": 64}                # sequences a step
UNTIMED = 3                                     # first steps: memory pools fill, libraries choose kernels


def case(text):
    model, _, preset = text.partition(":")
    if model not in MODELS or preset not in MODELS[model].presets:
        known = (f"{name}:{preset}" for name, command in MODELS.items() for preset in command.presets)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
    return model, preset


def train(arguments, model, preset, attention, batch, accumulate):
    """The cell of one run, and its losses."""
    words = {"--preset": preset, "--attention": attention, "--batch": batch, "--accumulate": accumulate,
             "--data": getattr(arguments, f"{model}_data"), "--device": arguments.device,
             "--dtype": arguments.dtype, "--dropout": arguments.dropout, "--steps": arguments.steps,
             "--lr": arguments.lr, "--warmup": arguments.steps // 3, "--out": arguments.out / "unwritten"}
    if arguments.context:
        words["--context"] = arguments.context
    run, _ = MODELS[model].setup([str(word) for pair in words.items() for word in pair])
    ends, records = [], []
    for _ in range(arguments.steps):
        records.append(run.optimise())      # has the loss on the host, so ends after the work before it
        ends.append(time.perf_counter())
    seconds = statistics.median(stop - start for start, stop in zip(ends[UNTIMED:], ends[UNTIMED + 1:]))
    tokens = statistics.fmean(record["tokens"] for record in records)
    memory = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None
    cell = {"model": model, "preset": preset, "attention": attention, "batch": batch,
            "accumulate": accumulate, "context": run.model.config.context, "ms_per_step": 1e3 * seconds,
            "tokens_per_s": round(tokens / seconds), "sequences_per_s": batch * accumulate / seconds,
            "tokens_per_step": round(tokens), "peak_gb": memory and memory * 1e-9}
    return cell, [record["loss"] for record in records]


def train_if_it_fits(arguments, model, preset, attention):
    batch, accumulate = arguments.batch or BATCH[model], 1
    while True:
        clear_memory(arguments.device)
        try:
            return train(arguments, model, preset, attention, batch, accumulate)
        except torch.OutOfMemoryError:
            if batch % 2:
                raise
        batch, accumulate = batch // 2, accumulate * 2


def clear_memory(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def key(cell):
    return f"{cell['model']}:{cell['preset']}:{cell['attention']}"


def line(cell, cells):
    """A row of the table; its last figure is the speed relative to standard attention in the same case."""
    same = [c for c in cells if (c["model"], c["preset"]) == (cell["model"], cell["preset"])]
    slowest = next((c["sequences_per_s"] for c in same if c["attention"] == "standard"), None)
    ratio = f"{cell['sequences_per_s'] / slowest:.2f}x" if slowest else ""
    memory = f"{cell['peak_gb']:.1f}" if cell["peak_gb"] else ""
    return (f"{cell['model'] + ':' + cell['preset']:12s} {cell['attention']:9s} {cell['batch']:4d} x "
            f"{cell['accumulate']:<2d} {cell['ms_per_step']:9.1f} {cell['tokens_per_s']:11,d} "
            f"{cell['sequences_per_s']:12.1f} {memory:>8s} {ratio:>13s}")


def earlier(path, about):
    """(cells, losses) of the file that a call is to add to, which must be about the same."""
    if not path.exists():
        return [], {}
    results = json.loads(path.read_text())
    for name in about.keys() - {"command", "date"}:
        if results[name] != about[name]:
            sys.exit(f"error: {path} was measured with {name} = {results[name]}, not {about[name]}: measure it "
                     f"anew without --add, or choose another --out")
    return results["cells"], results["losses"]


def plot(cells, losses, title, path):
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name} (pip install matplotlib): the numbers are in the .json beside it")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(harness.grouped(cells, "model", "preset").items())
    figure, panels = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4.2), layout="constrained",
                                  squeeze=False)
    for axes, ((model, preset), group) in zip(panels[0], cases):
        for cell in group:
            name = cell["attention"]
            rate = (f"{cell['sequences_per_s']:,.0f} sequences/s" if model == "bert"
                    else f"{cell['tokens_per_s']:,} tokens/s")
            curve = losses[key(cell)]
            axes.plot(range(1, len(curve) + 1), curve, color=COLORS[name], lw=1.2, label=f"{name}, {rate}")
        axes.set(title=f"{MODELS[model].name} {preset}, context {group[0]['context']}", xlabel="step",
                 ylabel="training loss (nats per token)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=case, help="model:preset, such as gpt2:small or bert:base")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument("--gpt2-data", default="data/gpt2", help="folder written by examples/data/prepare.py")
    parser.add_argument("--bert-data", default="data/bert", help="such a folder with --vocab wordpiece")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=training.positive,
                        help="sequences a step (default: GPT-2 32, BERT 64)")
    parser.add_argument("--context", type=training.positive, help="default: the preset's")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=training.positive, default=60)
    parser.add_argument("--add", action="store_true", help="keep the file's other cases and attentions")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON and the PNG")
    arguments = parser.parse_args(words)
    if arguments.steps < UNTIMED + 2:
        parser.error(f"--steps {arguments.steps} leaves nothing to time after {UNTIMED} untimed: give 10")

    about = harness.describe(arguments.device) | {"dtype": arguments.dtype, "dropout": arguments.dropout,
                                                  "steps": arguments.steps}
    path = arguments.out / f"training-{harness.short_name(about['machine'])}.json"
    cells, losses = earlier(path, about) if arguments.add else ([], {})
    print("case         attention   batch    ms/step    tokens/s  sequences/s  peak GB  over standard")
    for model, preset in arguments.cases:
        for attention in sorted(arguments.attention, key=ATTENTIONS.index, reverse=True):
            cell, curve = train_if_it_fits(arguments, model, preset, attention)
            cells = [old for old in cells if key(old) != key(cell)] + [cell]
            losses[key(cell)] = curve
            print(line(cell, cells), f"  loss {curve[0]:.3f} to {curve[-1]:.3f}", flush=True)
    harness.write_json(path, about | {"cells": cells, "losses": losses})
    plot(cells, losses, f"{about['machine']['name']}, {arguments.dtype}, dropout {arguments.dropout}",
         path.with_suffix(".png"))


if __name__ == "__main__":
    main()
