"""A pytest plugin that runs one shard of the tests and writes what happened, and the merge of the shards' reports.

    pytest -p gpu_report --shard 2/4 --report gpu-test-2-of-4.json tests
    python tests/gpu_report.py gpu-test gpu-test.json           merges benchmarks/results/gpu-test-*-of-*.json

A report holds the stamp of the sources, so that reports of different sources are not merged, and results that have gone
stale are seen.
"""

import json
import os
import platform
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

from stamp import stamp  # noqa: E402


def parse_shard(text):
    """(2, 4) of "2/4"."""
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError(f"a shard must be i/n with 1 <= i <= n, got {text}")
    return number, count


def machine():
    """What the results depend on beside the sources."""
    import flash_attn
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "driver": driver(), "package": flash_attn.__version__,
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("FLASH_ATTN_")}}


def driver():
    version = Path("/proc/driver/nvidia/version")
    words = version.read_text().split() if version.exists() else []
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


# ---- the plugin ----

def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", help="i/n: run every n-th test, from the i-th on")
    parser.addoption("--report", help="a JSON file for what happened")


def pytest_collection_modifyitems(config, items):
    number, count = parse_shard(config.getoption("--shard"))
    chosen = items[number - 1::count]
    config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % count != number - 1])
    items[:] = chosen


def pytest_configure(config):
    config.started = time.time()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--report"):
        return
    found = terminalreporter.stats
    failed = [report.nodeid for outcome in ("failed", "error") for report in found.get(outcome, [])]
    skipped = {}
    for report in found.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason] = skipped.get(reason, 0) + 1
    write(config.getoption("--report"), config.getoption("--shard"),
          {"passed": len(found.get("passed", [])), "failed": failed, "skipped": skipped,
           "command": " ".join(["pytest", *config.invocation_params.args]),
           "seconds": round(time.time() - config.started)})


# ---- reports ----

def write(path, shard, results):
    report = {"stamp": stamp(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "shard": shard,
              "machine": machine(), **results}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def merge(name, output):
    """One report of all shards, which it replaces; they must be complete, of the same sources and machine."""
    paths = sorted(RESULTS.glob(f"{name}-*-of-*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    shards = {report["shard"] for report in reports}
    count = parse_shard(reports[0]["shard"])[1] if reports else 0
    if not reports or shards != {f"{number}/{count}" for number in range(1, count + 1)}:
        sys.exit(f"{name}: need all shards, found {sorted(shards)}")
    for key in "stamp", "machine":
        if any(report[key] != reports[0][key] for report in reports):
            sys.exit(f"{name}: the shards differ in their {key}")
    skipped = Counter()
    for report in reports:
        skipped.update(report["skipped"])
    merged = {**reports[-1], "shard": f"1-{count}/{count}", "skipped": dict(sorted(skipped.items())),
              "passed": sum(report["passed"] for report in reports),
              "failed": [test for report in reports for test in report["failed"]],
              "command": [report["command"] for report in reports],
              "seconds": sum(report["seconds"] for report in reports)}
    (RESULTS / output).write_text(json.dumps(merged, indent=1) + "\n")
    for path in paths:
        path.unlink()
    print(f"{output}: {merged['passed']} passed, {len(merged['failed'])} failed, {skipped.total()} skipped")


if __name__ == "__main__":
    merge(*sys.argv[1:])
