"""Shows that flash and standard attention train the same model: same seed, same batches, loss against loss.

    compare_attention.py gpt2 --data data/stdlib
    compare_attention.py bert --data data/stdlib-wordpiece

Without dropout the two compute one function: the losses of a step may differ by rounding only, for BERT
also where one of them computes on padding. With dropout they drop different elements: the validation
losses at the end, averaged over three seeds, have to agree within two standard errors. Writes
benchmarks/results/<model>-flash-vs-standard.json and .png; ends with exit code 1 if a bar is missed.
Where the learning rate is so high that the loss jumps, rounding grows as large as the jumps, with any two
implementations: --lr stays below that.
"""
import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import training
from bert import train as bert
from gpt2 import train as gpt2

MODELS = {"gpt2": gpt2.COMMAND, "bert": bert.COMMAND}
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BARS = {"float32": 1e-3, "bfloat16": 1e-2}              # largest mean |difference| in nats per token
ATTENTIONS = ("flash", "standard")


def train_once(arguments, out, attention, dtype="float32", dropout=0.0, seed=0):
    """(training loss of every step, validation loss at the end) of one run."""
    out = Path(out, f"{attention}-{dtype}-{dropout}-{seed}")
    options = {"--data": arguments.data, "--steps": arguments.steps, "--batch": arguments.batch,
               "--context": arguments.context, "--lr": arguments.lr, "--eval-batches": 32,
               "--eval-every": arguments.steps, "--save-every": arguments.steps, "--attention": attention,
               "--dtype": dtype, "--dropout": dropout, "--seed": seed, "--out": out}
    MODELS[arguments.model].run([str(word) for option in options.items() for word in option])
    records = training.read_log(out / "log.jsonl")
    return [record["loss"] for record in records], records[-1]["val_loss"]


def without_dropout(arguments, out):
    settings = {}
    for dtype, bar in BARS.items():
        curves = {attention: train_once(arguments, out, attention, dtype)[0] for attention in ATTENTIONS}
        difference = np.abs(np.subtract(curves["flash"], curves["standard"]))
        settings[dtype] = {"mean_abs_difference": difference.mean(), "max_abs_difference": difference.max(),
                           "bar": bar, "met": bool(difference.mean() < bar),
                           "losses": curves}
    return settings


def with_dropout(arguments, out, rate=0.1, seeds=(0, 1, 2)):
    runs = {attention: [train_once(arguments, out, attention, dropout=rate, seed=seed) for seed in seeds]
            for attention in ATTENTIONS}
    finals = {attention: [val_loss for _, val_loss in runs[attention]] for attention in ATTENTIONS}
    means = {attention: np.mean(values) for attention, values in finals.items()}
    errors = {attention: np.std(values, ddof=1) / math.sqrt(len(seeds))
              for attention, values in finals.items()}
    difference = abs(means["flash"] - means["standard"])
    bar = 2 * math.hypot(*errors.values())              # two standard errors of the difference of two means
    return {"dropout": rate, "val_losses": finals, "means": means, "standard_errors": errors,
            "difference_of_means": difference, "bar": bar, "met": bool(difference < bar),
            "losses": {attention: [losses for losses, _ in runs[attention]] for attention in ATTENTIONS}}


def plot(results, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for dtype, color in zip(BARS, ("#1f4e79", "#c55a11")):
        curves = results[dtype]["losses"]
        steps = np.arange(1, len(curves["flash"]) + 1)
        left.plot(steps, curves["standard"], color=color, lw=3, alpha=0.3, label=f"standard, {dtype}")
        left.plot(steps, curves["flash"], color=color, lw=1, label=f"flash, {dtype}")
        difference = np.abs(np.subtract(curves["flash"], curves["standard"]))
        middle.semilogy(steps, np.maximum(difference, 1e-8), color=color, lw=0.8,
                        label=f"{dtype}, mean {difference.mean():.1e}")
        middle.axhline(BARS[dtype], color=color, ls="--", lw=1)
    for attention, color in zip(ATTENTIONS, ("#1f4e79", "#c55a11")):
        for curve in results["dropout"]["losses"][attention]:
            right.plot(steps, curve, color=color, lw=0.7, alpha=0.6)
        mean, error = (results["dropout"][name][attention] for name in ("means", "standard_errors"))
        right.plot([], [], color=color, label=f"{attention}, validation {mean:.4f} ± {error:.4f}")
    left.set(title="no dropout", ylabel="training loss (nats per token)")
    middle.set(title="no dropout: |flash − standard|; dashed: bars on its mean", ylim=(5e-9, 1))
    right.set(title=f"dropout {results['dropout']['dropout']}, three seeds each")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", help="default: " + " or ".join(command.folder for command in MODELS.values()))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    arguments.data = arguments.data or MODELS[arguments.model].folder
    with tempfile.TemporaryDirectory() as out:
        results = without_dropout(arguments, out) | {"dropout": with_dropout(arguments, out)}
    meta = json.loads(Path(arguments.data, "meta.json").read_text())
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{arguments.model}-flash-vs-standard.json"
    path.write_text(json.dumps({"data": meta, "settings": vars(arguments)} | results, indent=1) + "\n")
    plot(results, path.with_suffix(".png"))
    report(results)
    sys.exit(not all(setting["met"] for setting in results.values()))


def report(results):
    for dtype in BARS:
        setting = results[dtype]
        print(f"{dtype}: mean |Δloss| {setting['mean_abs_difference']:.2e}, largest "
              f"{setting['max_abs_difference']:.2e}, bar {setting['bar']:g}: {verdict(setting)}")
    setting = results["dropout"]
    for attention in ATTENTIONS:
        print(f"dropout {setting['dropout']}, {attention}: mean validation loss "
              f"{setting['means'][attention]:.4f} ± {setting['standard_errors'][attention]:.4f}")
    print(f"dropout: the means differ by {setting['difference_of_means']:.4f}, bar {setting['bar']:.4f}: "
          f"{verdict(setting)}")


def verdict(setting):
    return "met" if setting["met"] else "MISSED"


if __name__ == "__main__":
    main()
