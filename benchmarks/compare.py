"""Tells what a change did to the speed, from the results files of two runs of one benchmark.

    python benchmarks/compare.py before.json after.json [--relative sdpa]

Of each cell the best times are compared. A run's noise in a cell is how far its median lies above its best
time: that much a typical repeat was disturbed. A cell has changed if it did by more than both runs' noise and
3 % together. --relative divides by a peer's time in the same run, whose noise then counts too: this is for
machines that differ. Exit status: 0; 1 if a cell became slower; 2 if nothing can be compared.
"""

import argparse
import json
import math
import sys
from pathlib import Path

FLOOR = 0.03            # what one machine differs by between runs of the same code


def read(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        refuse(f"{path}: {error}")


def refuse(message):
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(2)


def cells_of(results):
    """{what identifies a cell: its times}"""
    return {tuple((name, value) for name, value in cell.items() if name != "times"): cell["times"]
            for cell in results["cells"]}


def value_of(times, name, peer):
    """(time, noise) as logarithms, of `name` alone or over `peer`; None where either was not measured."""
    if any("min" not in times.get(each, {}) for each in (name, peer or name)):
        return None
    time, noise = math.log(times[name]["min"]), _noise(times[name])
    return (time - math.log(times[peer]["min"]), noise + _noise(times[peer])) if peer else (time, noise)


def _noise(timing):
    return math.log(timing["median"] / timing["min"])


def changes(before, after, name, peer):
    """(cell, speed after over before, whether that is beyond noise) of all cells that both runs measured."""
    for cell in before.keys() & after.keys():
        old, new = (value_of(cells[cell], name, peer) for cells in (before, after))
        if old and new:
            gain = old[0] - new[0]
            yield cell, math.exp(gain), abs(gain) > old[1] + new[1] + math.log1p(FLOOR)


def describe(cell):
    return ", ".join(f"{name} {value}" for name, value in cell)


def print_changes(title, rows):
    if rows:
        print(f"\n{title}")
        for cell, gain, _ in sorted(rows, key=lambda row: row[1]):
            print(f"  {gain:5.2f}x  {describe(cell)}")


def check_comparable(before, after, peer):
    """The same machine at the same instruction set, unless a peer's time makes up for the difference."""
    names = [(results["machine"]["name"], results["machine"].get("family_model"), results.get("isa"))
             for results in (before, after)]
    if names[0] != names[1] and not peer:
        refuse(f"the machines differ, {names[0]} and {names[1]}; compare ratios with --relative sdpa")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--name", default="ours", help="the implementation that is compared (default: ours)")
    parser.add_argument("--relative", metavar="PEER", help="compare its time over that of PEER, e.g. sdpa")
    arguments = parser.parse_args()
    before, after = read(arguments.before), read(arguments.after)
    check_comparable(before, after, arguments.relative)
    rows = list(changes(cells_of(before), cells_of(after), arguments.name, arguments.relative))
    if not rows:
        refuse("the two files have no measured cell in common")
    slower = [row for row in rows if row[2] and row[1] < 1]
    faster = [row for row in rows if row[2] and row[1] > 1]
    mean = math.exp(sum(math.log(gain) for _, gain, _ in rows) / len(rows))
    print(f"{len(rows)} cells, {len(slower)} slower and {len(faster)} faster beyond noise; "
          f"geometric mean of the speed {mean:.3f}x")
    print_changes("slower", slower)
    print_changes("faster", faster)
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
