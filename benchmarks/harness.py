"""What all benchmarks share, so that each of them measures, describes and stores in the same way.

Implementations are timed round-robin in one process, A B C A B C ...: what disturbs the machine for a while
then disturbs them all, and their ratio survives it. A results file is JSON: what ran where (`describe`),
`cells` with one measured problem each, and whatever else a benchmark adds. A cell holds the fields that
identify it and `times = {implementation: {"min", "median", "repeats"} in seconds, or {"skipped": reason}}`.
"""

import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

import flash_attn
from stamp import stamp

RESULTS = Path(__file__).resolve().parent / "results"

REPEATS = 3, 100        # that count, at least and at most
LONG = 1.0              # s; a longer call needs no warm-up: its first time counts
FAR_BEHIND = 5.0        # times the fastest; of a long call so far behind, one time is enough


# ----------------------------------------------------------------------------------------------------- timing


def start_autograd():
    """What the first backward of a process pays is nobody's: torch imports sympy to look at a gradient that is given, and
    starts autograd's threads and, where it has CUDA, the driver: 2 to 4 s, which one long call, counted as it is, would show."""
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2 * x, x, torch.ones(1))


class Budget:
    """Wall-clock seconds for a run (None: no end). A list of cells is measured while there is time for one more, which takes
    about as long as the longest so far; what was measured is kept, and the rest is for another run."""

    def __init__(self, seconds=None):
        self.start, self.seconds, self.longest = time.perf_counter(), seconds, 0.0

    def spent(self):
        return time.perf_counter() - self.start

    def has_time(self):
        return self.seconds is None or self.spent() + self.longest < self.seconds

    def each(self, cells):
        """The cells there is time for, each with its place, such as "3/40"."""
        cells = list(cells)
        for n, cell in enumerate(cells, 1):
            if not self.has_time():
                return print(f"{self.seconds:g} s are over: {len(cells) - n + 1} of {len(cells)} cells are left out", flush=True)
            before = self.spent()
            yield f"{n}/{len(cells)}", cell
            self.longest = max(self.longest, self.spent() - before)


def earlier(path, results):
    """What an earlier run of the same sources on the same machine left in a file: its cells need no second measurement."""
    if not path or not path.exists():
        return {}
    found = json.loads(path.read_text())
    same = all(found.get(key) == results[key] for key in ("stamp", "versions"))
    if not same or found["machine"]["name"] != results["machine"]["name"]:
        sys.exit(f"{path} is of other sources, versions or another machine: it cannot be continued")
    return found


def wall_seconds(call):
    """Time of a call that is over when it returns, as on a CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def event_seconds(call):
    """Time of a call's work on the GPU. The stream first sleeps for a millisecond, in which the host queues all of the call: what
    the host takes for it does not count (`host_seconds` measures that)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)        # cycles
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def host_seconds(call):
    """What a call costs the host, its work on the GPU not awaited."""
    torch.cuda.synchronize()
    return wall_seconds(call)


CLOCKS = {"cpu": wall_seconds, "cuda": event_seconds, "host": host_seconds}


def round_robin(calls, budget, device="cpu"):
    """Times of functions without arguments, {name: call}; each is repeated for `budget` seconds."""
    clock = CLOCKS[device]
    first = {name: clock(call) for name, call in calls.items()}
    far = max(LONG, FAR_BEHIND * min(first.values()))
    times = {name: [time] if time > LONG else [] for name, time in first.items()}
    pending = [name for name in calls if first[name] <= far]
    while pending:
        for name in pending:
            times[name].append(clock(calls[name]))
        pending = [name for name in pending if not _enough(times[name], budget)]
    return {name: _summary(each) for name, each in times.items()}


def _enough(times, budget):
    least, most = REPEATS
    return len(times) >= most or len(times) >= least and sum(times) >= budget


def _summary(counted):
    return {"min": min(counted), "median": statistics.median(counted), "repeats": len(counted)}


def gemm_rate(dtype, device="cpu", size=2048):
    """FLOP/s of torch's own square matrix product: what the machine gives to well-tuned code."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size ** 3 / round_robin({"gemm": lambda: a @ b}, 1.0, device)["gemm"]["min"]


# ---------------------------------------------------------------------------------------------------- figures


def seconds(cell, name):
    """The best time of an implementation in a cell; None where it was not measured."""
    return cell["times"].get(name, {}).get("min")


def ratio(cell, ours, peer):
    """How many times faster `ours` is than `peer`; None where either was not measured."""
    mine, theirs = seconds(cell, ours), seconds(cell, peer)
    return theirs / mine if mine and theirs else None


def geometric_mean(values):
    values = [value for value in values if value is not None]
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def grouped(cells, *fields):
    """{values of the fields: the cells that have them}, in order of appearance."""
    groups = {}
    for cell in cells:
        groups.setdefault(tuple(cell[field] for field in fields), []).append(cell)
    return groups


# ---------------------------------------------------------------------------------------------------- machine


def describe(device="cpu"):
    """What ran where: the head of every results file."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "stamp": stamp(),
        "machine": MACHINES[device](),
        "versions": {"flash_attn": flash_attn.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
    }


def cpu_machine():
    facts = cpu_facts()
    notable = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
    flags = facts.get("flags", "").split()
    return {
        "name": facts.get("model name", platform.processor() or platform.machine()),
        "family_model": f"{facts.get('cpu family', '?')}-{facts.get('model', '?')}",
        "isa": [flag for flag in notable if flag in flags],
        "threads": torch.get_num_threads(),
    }


def cuda_machine():
    """Clocks and limits are as the machine has them: nothing here changes any."""
    device = torch.cuda.get_device_properties(0)
    version = Path("/proc/driver/nvidia/version").read_text().split()
    return {
        "name": device.name, "multiprocessors": device.multi_processor_count,
        "driver": next((word for word in version if re.fullmatch(r"\d+(\.\d+)+", word)), None),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "host": cpu_facts().get("model name"),
    }


MACHINES = {"cpu": cpu_machine, "cuda": cuda_machine}       # by device type


def cpu_facts():
    """The first processor's entries in /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    entries = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in entries}


def short_name(machine):
    """A file name for a machine. A virtual one hides its name; its family and model then tell it apart."""
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor|\d+-core)\b|@.*", " ", machine["name"].lower())
    if not re.search(r"\d", name):
        name += " " + machine.get("family_model", "")
    return "-".join(re.findall(r"[a-z0-9]+", name))


# ----------------------------------------------------------------------------------------------------- output


def write_json(path, results):
    """Writes all or nothing. Rows of a list stand on a line each, so that a new run is a readable change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(_json(results, "") + "\n")
    os.replace(unfinished, path)


def _json(value, indent):
    inner = indent + "  "
    if isinstance(value, dict) and indent == "":
        entries = [f"{inner}{json.dumps(name)}: {_json(entry, inner)}" for name, entry in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + json.dumps(_rounded(row)) for row in value) + f"\n{indent}]"
    return json.dumps(_rounded(value))


def _rounded(value):
    """Five digits are more than any measurement has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


class Table:
    """Aligned columns, printed row by row while the measurement runs. A title is as wide as its column."""

    def __init__(self, *titles):
        self.titles = titles
        self._print(titles)

    def row(self, *values):
        """None is a dash; a number gets two decimals."""
        self._print(["-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
                     for value in values])

    def _print(self, texts):
        print("  ".join(text.rjust(len(title)) for text, title in zip(texts, self.titles)), flush=True)


def heading(text):
    print(f"\n{text}", flush=True)
