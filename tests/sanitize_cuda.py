"""compute-sanitizer over a representative set of calls: every kernel and path once, forward and backward.

    python tests/sanitize_cuda.py --shard 1/4 --report benchmarks/results/gpu-sanitize-1-of-4.json

starts itself under each of the four tools with every n-th call, without torch's caching allocator, so that each tensor
is an allocation of its own. A shard fails by reports other than these, which are false, all on Hopper:

racecheck, forward_kernel with dropout, d 96 and more, false: each of the 6 writes is an STS into the ring of dropout flags. A
warp's lanes store, __syncwarp(), and lane 0 arrives for all of them at the mbarrier that the readers wait for; the same the other
way round. Proof: in a build in which all lanes arrive, nothing else changed, none of the reports is left (H200).

initcheck, prepare_kernel and copies to the host, false: what they read of out where TMA wrote it, as most forward kernels have it.
Proof: in a build whose forward kernels store by hand, nothing else changed, none of the reports is left (H200). That all of out is
written the tests show, whose allocator fills memory with NaN.

Not among them, so a shard fails by it: racecheck, sm90_backward_kernel. Before blocks took tickets each of the 34 writes that it
named was a UBLKCP in the SASS, the bulk copy of lse2 or delta, whose mbarrier the readers wait for. Since then there are twice as
many, which nobody has looked up; the ticket's slot, which one thread writes between two mbarriers, is a guess.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import gpu_report
from problem import Problem

FALSE = {("racecheck", "forward_kernel of variant 2"), ("initcheck", "prepare_kernel"),
         ("initcheck", "Host API memory access error")}
TOOLS = {"memcheck": ["--leak-check=no"], "racecheck": [], "initcheck": [], "synccheck": []}
HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def problems():
    """(name, problem, shared memory limit in KB or None)."""
    sizes = dict(b=1, sq=140, sk=150, h=2, hk=1)
    calls = []
    for n, d in enumerate(HEAD_DIMS):
        dtype = (torch.bfloat16, torch.float16)[n % 2]
        for limit in None, 99:
            calls += [(Problem(dtype, d=d, causal=True, **sizes), limit),
                      (Problem(dtype, d=d, softcap=5.0, alibi="head", **sizes), limit),
                      (Problem(dtype, d=d, dropout_p=0.2, **sizes), limit)]
    calls += [(Problem(dtype, **options), None) for dtype in (torch.float32, torch.bfloat16) for options in (
        dict(sq=5, sk=2000, h=2, d=64), dict(sq=70, sk=59, d=59, dv=40, window=(20, 3)),
        dict(sq=0, sk=5), dict(sq=5, sk=0),
        dict(seqlens_q=(70, 0, 129), seqlens_k=(20, 5, 150), tail=9, h=4, hk=2, dropout_p=0.1, alibi="batch"),
        dict(b=2, sq=20, sk=130, seqused_k=(0, 77), d=128),
        dict(sq=5, sk=2000, h=2, bias="hqk", mask="bk", d=64), dict(sq=70, sk=131, bias="q", mask="q", h=4, hk=2, dropout_p=0.1),
        dict(sq=70, sk=136, bias="bhqk", bias_dtype=torch.float64, mask="bhqk", causal=True))]
    for n, d in enumerate((*HEAD_DIMS, 59)):
        options = dict(sq=140, sk=152, h=2, hk=1, d=d, bias="hqk", mask="qk", bias_hides=True, dropout_p=0.1 * (n % 2))
        calls += [(Problem(dtype, **options), limit) for dtype in (torch.float32, torch.float16) for limit in (None, 99)]
    return [(f"{problem}{f' with {limit} KB' if limit else ''}", problem, limit) for problem, limit in calls]


def run(shard):
    """The calls of a shard, in this process; dq deterministic in every other one."""
    number, count = gpu_report.parse_shard(shard)
    for n, (name, problem, limit) in enumerate(problems()[number - 1::count]):
        print(name, flush=True)
        os.environ["FLASH_ATTN_SMEM_KB"] = str(limit or "")
        results = problem.run(device="cuda", deterministic=n % 2 == 0)
        assert all(x.isfinite().all() for x in (results.out, results.dq, results.dk, results.dv)), name


def reports(output):
    """How often each kernel is named by a tool, or its message where none is. A report starts at the margin and goes
    on indented; the kernel is in its first two lines."""
    found = Counter()
    lines = [line.removeprefix("========= ") for line in output.splitlines() if line.startswith("========= ")]
    for line, following in zip(lines, [*lines[1:], ""]):
        if line and not line.startswith((" ", "COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "Target application")):
            kernel = re.search(r"(\w*kernel\w*)(?:<[^>]*\(fa_variant\)(\d))?", line + following)
            name, variant = kernel.groups() if kernel else (line.partition(" at ")[0], None)
            found[f"{name} of variant {variant}" if variant else name] += 1
    return found


def sanitize(shard):
    """The tools that found something new, and how many known reports there were; new ones are shown."""
    failed, known = [], Counter()
    for tool, options in TOOLS.items():
        command = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9", "--print-limit", "100000",
                   sys.executable, str(Path(__file__).resolve()), "--run", "--shard", shard]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found = reports(done.stdout)
        new = {kernel for kernel in found if (tool, kernel) not in FALSE}
        known.update({f"{tool}: {kernel}": found[kernel] for kernel in set(found) - new})
        if new or (done.returncode and not found):
            failed.append(tool)
            print(done.stdout[-20000:], flush=True)
    return failed, known


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--report")
    parser.add_argument("--run", action="store_true", help="the calls themselves, in this process")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.shard)
        sys.stdout.flush()
        os._exit(0)             # under initcheck the end of autograd's threads aborts the process
    started = time.time()
    failed, known = sanitize(arguments.shard)
    if arguments.report:
        gpu_report.write(arguments.report, arguments.shard, {
            "passed": len(TOOLS) - len(failed), "failed": failed, "skipped": {f"known report of {what}": known[what] for what in sorted(known)},
            "command": " ".join(["python", *sys.argv]), "seconds": round(time.time() - started)})
    sys.exit(f"found errors: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
