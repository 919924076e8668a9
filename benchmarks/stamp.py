"""Names the sources that a measurement was taken on, so that a committed result shows when it has gone stale.

    python benchmarks/stamp.py

prints two hashes, one a line: first what decides the CPU's results, then what decides a GPU's. Every results
file holds both. They come from the files themselves, so that sources need no git to be compared.
"""

import ast
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ["csrc/common", "csrc/flash_attn.h", "csrc/python_module.c",
          "flash_attn/_backend.py", "flash_attn/flash_attn_interface.py"]
SUFFIXES = {".c", ".h", ".cu", ".cuh", ".py"}
DIGITS = 12


def stamp():
    """{"cpu": hash, "gpu": hash} of the working tree."""
    return {"cpu": _digest([*SHARED, "csrc/cpu"]),
            "gpu": _digest([*SHARED, "csrc/cuda"], extra=_nvcc_flags())}


def _digest(paths, extra=""):
    digest = hashlib.sha256()
    for file in sorted(file for path in paths for file in _files(ROOT / path)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    digest.update(extra.encode())
    return digest.hexdigest()[:DIGITS]


def _files(path):
    """A file, or the sources in a folder."""
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.suffix in SUFFIXES]


def _nvcc_flags():
    """What setup.py assigns to names that start with NVCC, as written there."""
    source = (ROOT / "setup.py").read_text()
    assignments = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    return "\n".join(ast.get_source_segment(source, node) for node in assignments
                     if getattr(node.targets[0], "id", "").startswith("NVCC"))


if __name__ == "__main__":
    print(*stamp().values(), sep="\n")
