"""Writes README.md's measured tables from committed results: it shows no number that none of them holds.

    python benchmarks/readme_table.py [--check] [results.json ...]

Without files it takes all of benchmarks/results/. What stands between the two markers is replaced; --check
writes nothing and exits with 1 if it would change anything.
"""

import argparse
import json
import sys
from pathlib import Path

from bench_attn import over_best, speed
from harness import grouped
from stamp import ROOT, stamp

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = "No result is committed yet; `make bench` measures your machine."


def table(titles, rows):
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cpu_section(results, path):
    machine, stamped = results["machine"], results["stamp"]["cpu"]
    title = f"**{machine['name']}, {results['isa'].upper()}, torch {results['versions']['torch']}**"
    source = (f"{results['date']}, sources {stamped}: [every cell]({_link(path)}), "
              f"[plot]({_link(path.with_suffix('.png'))}).")
    return "\n\n".join([title, speed_table(results["summary"]), memory_line(results["memory"]),
                        host_line(results["host_us"]), source])


def speed_table(summary):
    titles = ["", "threads", "GFLOP/s", "of FMA peak", "over SDPA", "worst cell", "over standard"]
    return table(titles, [_speed_row(row) for row in summary])


def _speed_row(row):
    return [f"{row['dtype']} {row['pass']}", row["threads"], f"{row['gflops']:.0f}",
            f"{row['of_fma_peak']:.0%}", f"{row['over_sdpa']:.2f}x", f"{row['worst']:.2f}x",
            f"{row['over_standard']:.1f}x"]


def memory_line(memory):
    """The most that any pass took at the longest sequence."""
    longest = max(row["s"] for row in memory)
    rows = [row for row in memory if row["s"] == longest]
    ours, sdpa = (max(row[name] for row in rows) for name in ("ours", "sdpa"))
    matrix = 4 * rows[0]["h"] * longest ** 2 * 1e-6
    return (f"Scratch memory at S = {longest}, {rows[0]['h']} heads, {rows[0]['threads']} threads: at most "
            f"{ours:.0f} MB (SDPA {sdpa:.0f} MB; one fp32 score matrix would be {matrix:,.0f} MB).")


def host_line(host):
    return "Host cost of a call: " + ", ".join(
        f"{row['call']} {row['ours']:.0f} µs (SDPA {row['sdpa']:.0f} µs)" for row in host) + "."


def attn_section(results, path):
    machine = results["machine"]
    title = f"**{machine['name']}, bfloat16, torch {results['versions']['torch']}, cuDNN {machine['cudnn']}**"
    fourth = "FlashAttention-4, " if any(row["ours_over_fa4"] for row in results["summary"]) else ""
    reading = (f"TFLOP/s, in brackets the ratio to the best peer of that cell: FlashAttention-2 and cuDNN through torch, {fourth}"
               f"attention written out. A matrix product of 8192^3 runs at {results['gemm_tflops']:.0f} TFLOP/s.")
    source = (f"{results['date']}, sources {results['stamp']['gpu']}: [every cell and peer]({_link(path)}), "
              f"[plot]({_link(path.with_suffix('.png'))}).")
    return "\n\n".join([title, reading, attn_table(results["cells"]), attn_summary(results["summary"]),
                        host_line([{"call": row["pass"], "ours": row["ours"], "sdpa": row["fa2"]} for row in results["host_us"]]), source])


def attn_table(cells):
    """A row for each pass, head dim, mask and dropout, a column for each length."""
    cells = [cell for cell in cells if cell["dtype"] == "bf16" and cell["pass"] != "both"]
    lengths = sorted({cell["s"] for cell in cells})
    rows = []
    for (direction, d, causal, dropout), group in grouped(cells, "pass", "d", "causal", "dropout").items():
        found = {cell["s"]: f"{speed(cell, 'ours'):.0f} ({over_best(cell):.2f})" for cell in group}
        title = _name(group[0], f"{direction}, d {d}, {'causal' if causal else 'full'}")
        rows.append([title, *(found.get(s, "") for s in lengths)])
    return table(["", *lengths], rows)


def attn_summary(summary):
    """Geometric means over what the table shows, and over the float32 cells."""
    titles = ["geometric mean over", "best peer", "worst cell", "FlashAttention-2", "cuDNN", "FlashAttention-4", "sm80 over FlashAttention-2"]
    show = lambda value: f"{value:.2f}x" if value else ""  # noqa: E731
    return table(titles, [
        [_name(row, f"{row['pass']}, {row['dtype']}"), show(row["over_best"]), show(row["worst"]),
         *(show(row[name]) for name in ("ours_over_fa2", "ours_over_cudnn", "ours_over_fa4", "sm80_over_fa2"))] for row in summary])


def training_section(results, path):
    machine = results["machine"]
    title = (f"**Training as `examples/` does it: {machine['name']}, {results['dtype']}, dropout {results['dropout']}, "
             f"torch {results['versions']['torch']}, not compiled**")
    source = (f"{results['date']}, sources {results['stamp']['gpu']}: [losses and all figures]({_link(path)}), "
              f"[plot]({_link(path.with_suffix('.png'))}).")
    return "\n\n".join([title, training_table(results["cells"]), source])


def training_table(cells):
    """A row for each model and attention: rates, and how many times faster than the two others."""
    titles = ["", "tokens/s", "sequences/s", "peak GB", "over SDPA", "over standard", "batch"]
    rows = []
    for (model, preset), group in grouped(cells, "model", "preset").items():
        rates = {cell["attention"]: cell["sequences_per_s"] for cell in group}
        for cell in sorted(group, key=lambda cell: list(TRAINED).index(cell["attention"])):
            over = [f"{cell['sequences_per_s'] / rates[peer]:.2f}x" if peer in rates else "" for peer in ("sdpa", "standard")]
            memory = f"{cell['peak_gb']:.1f}" if cell["peak_gb"] else ""
            rows.append([f"{model} {preset}, context {cell['context']}, {TRAINED[cell['attention']]}",
                         f"{cell['tokens_per_s']:,}", f"{cell['sequences_per_s']:.1f}", memory, *over,
                         f"{cell['accumulate']} x {cell['batch']}"])
    return table(titles, rows)


def _name(row, text):
    return f"{text}, dropout {row['dropout']}" if row["dropout"] else text


def _link(path):
    return path.resolve().relative_to(ROOT).as_posix()


TRAINED = {"flash": "ours", "sdpa": "SDPA", "standard": "standard"}
SECTIONS = {"attn": attn_section, "cpu": cpu_section, "training": training_section}       # by the first word of a results file's name
STAMPS = {"attn": "gpu", "cpu": "cpu", "training": "gpu"}


def measured(paths):
    """The text between the markers."""
    sections = []
    for path in paths:
        results = json.loads(path.read_text())
        kind = path.name.split("-")[0]
        if results["stamp"][STAMPS[kind]] != stamp()[STAMPS[kind]]:
            print(f"{path.name} was measured on other sources than these", file=sys.stderr)
        sections.append(SECTIONS[kind](results, path))
    return "\n\n".join(sections) or NOTHING


def replaced(text, content):
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"readme_table.py: README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether README.md is up to date")
    parser.add_argument("results", nargs="*", type=Path, help="default: all of benchmarks/results/")
    arguments = parser.parse_args()
    paths = arguments.results or sorted(path for kind in SECTIONS for path in RESULTS.glob(f"{kind}-*.json"))
    old = README.read_text()
    new = replaced(old, measured(paths))
    if arguments.check:
        sys.exit("readme_table.py: README.md does not show the committed results" if new != old else 0)
    README.write_text(new)


if __name__ == "__main__":
    main()
