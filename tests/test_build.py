"""The binary's size, and what ptxas says of every CUDA kernel: no spill, no stack frame, no serialisation, and the
registers and shared memory of the committed table. That needs the folder build/ of nvcc's build, but no GPU.

    python tests/test_build.py --write      makes tests/ptxas.txt anew from the last build
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
TABLE = Path(__file__).with_name("ptxas.txt")
SMALL_SHARED_BYTES = 99 << 10       # a block's limit on RTX 30/40, L4 and sm_120
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
                   r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
                   r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers", re.DOTALL)


def logs():
    """ptxas' report of each .cu file of this tree; empty where the build had no CUDA, without sm90's where no machine code
    for Hopper was asked for."""
    sources = {str(source.relative_to(ROOT)) for source in ROOT.glob("csrc/cuda/**/*.cu")}
    found = {source: BUILD / "ptxas" / Path(source).with_suffix(".log") for source in sources}
    for family in "", "sm90":
        if not any(log.exists() for source, log in found.items() if family in source):
            found = {source: log for source, log in found.items() if family not in source}
    return {source: log.read_text() for source, log in found.items()}


def entries():
    return [entry.groupdict() for log in logs().values() for entry in ENTRY.finditer(log)]


def demangled(names):
    """forward_kernel<bf16, 64, plain, ...> for each mangled name."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    words = {"(fa_dtype)0": "fp32", "(fa_dtype)1": "fp16", "(fa_dtype)2": "bf16", "(fa_variant)0": "plain",
             "(fa_variant)1": "score-mod", "(fa_variant)2": "dropout", "(fa_variant)3": "plain-dropout", "void ": "",
             "(fa_cuda_args)": "", "(fa_sm90_forward_args)": "", "(fa_sm90_added_args)": "", "(fa_sm90_backward_args)": "", " >": ">"}
    for cast, word in words.items():
        text = text.replace(cast, word)
    return dict(zip(names, text.splitlines()))


def nvcc():
    """The one that made the objects."""
    return next((BUILD / "objects" / "csrc" / "cuda").rglob("prepare.command")).read_text().split()[0]


def compiler():
    """Its version, as the last line of nvcc --version has it."""
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def tiles(folder):
    """What tests/check/tiles.c prints."""
    objects = [str(path) for name in ("sm80", "sm90") for path in (BUILD / "objects" / "csrc" / "cuda" / name).glob("*wd_*.o")]
    hopper = ["-DFA_WITH_SM90"] if any("/sm90/" in path for path in objects) else []
    program = Path(folder) / "tiles"
    subprocess.run([nvcc(), *hopper, "-o", str(program), str(ROOT / "tests/check/tiles.c"), *objects], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout


def table(folder):
    registers = {}
    names = demangled(sorted({entry["name"] for entry in entries()}))
    for entry in entries():
        registers.setdefault(names[entry["name"]], {})[entry["arch"]] = int(entry["registers"])
    lines = [f"{name}: " + ", ".join(f"{count} registers on {arch}" for arch, count in sorted(by_arch.items()))
             for name, by_arch in sorted(registers.items())]
    return "\n".join([compiler(), *lines, tiles(folder)])


def test_the_binary_is_small():
    from flash_attn import _C

    kernels = _C.info().partition("CUDA kernels:")[2].splitlines()[0].split()
    most = 30 if "sm90" in kernels else 20 if "sm80" in kernels else 2
    assert Path(_C.__file__).stat().st_size <= most << 20


@pytest.fixture
def build_with_cuda():
    if not logs():
        pytest.skip("nvcc compiled no CUDA kernels in this folder: it has no build/ptxas")


# Kernels at the edge of 255 registers that spill, and the most bytes that one of them stores: one word, with dropout.
SPILLING = {"backward_kernel 256": 4}


@pytest.mark.usefixtures("build_with_cuda")
def test_no_spills_and_no_stack():
    bad = [entry for entry in entries() if any(int(entry[key]) for key in ("stack", "stores", "loads"))]
    names = demangled([entry["name"] for entry in bad])
    kernels = {name: re.sub(r"<(?:\w+, )?(\d+),.*", r" \1", text) for name, text in names.items()}
    worse = [entry for entry in bad
             if int(entry["stores"]) > SPILLING.get(kernels[entry["name"]], -1) or ", plain," in names[entry["name"]]]
    assert not worse, "\n".join(f"{names[entry['name']]} on {entry['arch']}: stack {entry['stack']}, spills "
                                f"{entry['stores']} + {entry['loads']} bytes" for entry in worse)
    assert set(kernels.values()) == set(SPILLING), "kernels that no longer spill must leave the list"


@pytest.mark.usefixtures("build_with_cuda")
def test_every_file_was_compiled_for_every_architecture():
    for source, log in logs().items():
        by_arch = {}
        for entry in ENTRY.finditer(log):
            by_arch.setdefault(entry["arch"], set()).add(entry["name"])
        assert by_arch and len({frozenset(names) for names in by_arch.values()}) == 1, source


@pytest.mark.usefixtures("build_with_cuda")
def test_no_warnings():
    for source, log in logs().items():
        assert not re.search(r"C75\d\d|warning", log), f"{source}:\n{log}"


@pytest.mark.usefixtures("build_with_cuda")
def test_registers_and_shared_memory_are_the_committed_ones(tmp_path):
    expected = TABLE.read_text()
    if expected.splitlines()[0] != compiler():
        pytest.skip(f"tests/ptxas.txt was made by {expected.splitlines()[0]}, this build by {compiler()}")
    ours = table(tmp_path)
    changed = sorted(set(ours.splitlines()) ^ set(expected.splitlines()))
    assert ours == expected, "python tests/test_build.py --write accepts these changes:\n" + "\n".join(changed)


@pytest.mark.usefixtures("build_with_cuda")
def test_every_head_dim_has_a_tile_for_small_devices(tmp_path):
    least = {}
    for line in tiles(tmp_path).splitlines():
        if line.startswith("sm90"):         # Hopper's blocks take what Hopper has
            continue
        kernel, shared = line.split(":")[0].removesuffix(" small"), int(line.split()[-2])
        least[kernel] = min(shared, least.get(kernel, shared))
    assert len(least) == 4 * 12 + 2 * 6
    assert all(shared <= SMALL_SHARED_BYTES for shared in least.values()), least


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    TABLE.write_text(table(BUILD))
