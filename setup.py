"""Builds flash_attn/_C.abi3.so from C, with setuptools and nothing else.

torch's BuildExtension is not used: it needs torch at build time and compiles .c files as C++. Our sources
link no torch and keep to Python's limited API: one binary serves every Python >= 3.10 and PyTorch >= 2.4.

nvcc compiles the .cu files; ptxas' report of each lies in build/ptxas/. The CUDA runtime and what it wants of C++ are
linked statically, so the binary needs libc, loads without a driver, and serves CPU tensors there.

Environment:
  MAX_JOBS              files compiled at a time (default: the number of CPUs)
  CC, CFLAGS, LDFLAGS   compiler, and flags added after ours; CXX links if there are CUDA kernels
  CUDA_HOME             where CUDA lies (default: nvcc on PATH, then /usr/local/cuda)
  FLASH_ATTN_CUDA       auto (default) | 1 | 0: build the CUDA kernels if nvcc is found | or fail | never
  FLASH_ATTN_CUDA_ARCHS machine code to make, e.g. "80;90" (default); the first is added as PTX, for newer GPUs; 90 brings
                        Hopper's own kernels, csrc/cuda/sm90
  FLASH_ATTN_WERROR     1: warnings are errors
  FLASH_ATTN_SANITIZE   1: AddressSanitizer and UndefinedBehaviorSanitizer; run with LD_PRELOAD=libasan.so
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, OptionError

SOURCES = ["csrc/python_module.c", *sorted(glob("csrc/common/*.c")), *sorted(glob("csrc/cpu/*.c"))]
CUDA_SOURCES = sorted(glob("csrc/cuda/*.c"))
KERNELS = sorted(glob("csrc/cuda/sm80/*.cu"), key=lambda path: ("bwd" not in path, path)) + sorted(glob("csrc/cuda/*.cu"))
HOPPER_SOURCES = sorted(glob("csrc/cuda/sm90/*.c"))
HOPPER_KERNELS = sorted(glob("csrc/cuda/sm90/*.cu"))    # wgmma exists on 9.0 only: compiled for that alone, if it is asked for
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--ptxas-options=-v"]
NVCC_SMALL = "--compress-mode=size"          # a fifth of the size; needs nvcc 12.9 and a driver for CUDA 12.4
NVCC_ARCHS = (os.environ.get("FLASH_ATTN_CUDA_ARCHS") or "80;90").replace(",", ";").split(";")
WITH_HOPPER = "90" in NVCC_ARCHS
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]


def switched_on(name):
    return os.environ.get(name, "0") not in ("", "0")


def run(command, error, log=None):
    """One compiler call. Its output is shown whole and at once, since several run at a time, or goes to a file."""
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise error(f"{command[0]} is not on PATH: install it, or name another in CC (for C) or CXX (which links CUDA)") from None
    if log and not done.returncode:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout)
    elif done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        raise error(f"exit status {done.returncode} from {shlex.join(command)}")


def find_cuda():
    """The folder of CUDA, or None where the CUDA kernels are not to be built."""
    if not all(arch.isdecimal() for arch in NVCC_ARCHS):
        raise OptionError(f"FLASH_ATTN_CUDA_ARCHS must be numbers such as 80;90, got {';'.join(NVCC_ARCHS)!r}")
    choice = os.environ.get("FLASH_ATTN_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        raise OptionError(f"FLASH_ATTN_CUDA must be auto, 1 or 0, got {choice!r}")
    if choice == "0" or switched_on("FLASH_ATTN_SANITIZE"):
        return None
    on_path = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    home = next((Path(path) for path in named if path and is_cuda_home(Path(path))), None)
    if home is None and choice == "1":
        raise OptionError("FLASH_ATTN_CUDA=1 needs nvcc, on PATH or in CUDA_HOME/bin")
    if home is None:
        print("flash_attn: no nvcc on PATH or in CUDA_HOME/bin: building without CUDA kernels", flush=True)
    return home


def is_cuda_home(path):
    """nvcc on PATH may be a script that calls the real one, so the header decides too."""
    return (path / "bin/nvcc").exists() and (path / "include/cuda_runtime_api.h").exists()


class BuildExt(build_ext):
    """Compiles in parallel, and only what changed: an object is as good as its command, its source and every
    header that the compiler listed for it."""

    def build_extension(self, ext):
        self.compiler_command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        self.cuda = find_cuda()
        c_command = self.c_command()
        jobs = [(c_command, source) for source in ext.sources]
        if self.cuda:
            jobs = [(self.nvcc_command(), source) for source in KERNELS] + jobs
            jobs += [(c_command, source) for source in CUDA_SOURCES]
        if self.cuda and WITH_HOPPER:
            hopper = self.nvcc_command(["-gencode=arch=compute_90a,code=sm_90a"])
            jobs = [(hopper, source) for source in HOPPER_KERNELS] + jobs
            jobs += [(c_command, source) for source in HOPPER_SOURCES]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job), jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*self.link_command(), *objects, "-o", str(target), *self.link_libraries(),
             *shlex.split(os.environ.get("LDFLAGS", ""))], LinkError)

    def c_command(self):
        # -ffp-contract=off: the same sums whatever the compiler may fuse; micro-kernels ask for FMA by name.
        # No -march: each ISA's file says what it may use, and the CPU at hand is asked at run time.
        flags = ["-O3", "-std=c11", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
                 "-I" + sysconfig.get_path("include")]
        if self.cuda:
            flags += ["-DFA_WITH_CUDA", f'-DFA_CUDA_ARCHS="{";".join(NVCC_ARCHS)}"', f"-I{self.cuda}/include"]
            flags += ["-DFA_WITH_SM90"] if WITH_HOPPER else []
        if switched_on("FLASH_ATTN_WERROR"):
            flags.append("-Werror")
        if switched_on("FLASH_ATTN_SANITIZE"):
            flags += SANITIZE
        return [*self.compiler_command, *flags, *shlex.split(os.environ.get("CFLAGS", ""))]

    def nvcc_command(self, targets=None):
        nvcc = str(self.cuda / "bin" / "nvcc")
        targets = targets or [f"-gencode=arch=compute_{arch},code=[sm_{arch}{',compute_' + arch if n == 0 else ''}]"
                              for n, arch in enumerate(NVCC_ARCHS)]
        known = subprocess.run([nvcc, "--help"], stdout=subprocess.PIPE, text=True).stdout
        return [nvcc, *NVCC_FLAGS, *([NVCC_SMALL] if NVCC_SMALL.split("=")[0] in known else []), *targets]

    def link_command(self):
        """CUDA's static runtime wants C++: linked in, and none of its symbols shown."""
        if self.cuda:
            return [*shlex.split(os.environ.get("CXX") or "g++"), "-shared", "-static-libstdc++", "-static-libgcc",
                    "-Wl,--exclude-libs,ALL", "-Wl,--as-needed"]
        return [*self.compiler_command, "-shared", *(SANITIZE if switched_on("FLASH_ATTN_SANITIZE") else [])]

    def link_libraries(self):
        cuda = [f"-L{self.cuda}/lib64", "-lcudart_static", "-ldl", "-lpthread", "-lrt"] if self.cuda else []
        return [*cuda, "-lm"]

    def compile_one(self, command, source):
        """The object of one source, made if it is missing or older than anything it came from."""
        folder = Path("build", "sanitize" if switched_on("FLASH_ATTN_SANITIZE") else "objects")
        output = folder / Path(source).with_suffix(".o")
        headers, recipe = output.with_suffix(".d"), output.with_suffix(".command")
        command = [*command, "-MMD", "-MF", str(headers), "-c", source, "-o", str(output)]
        if not self.force and is_current(output, headers, recipe, shlex.join(command)):
            return str(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        recipe.unlink(missing_ok=True)
        log = Path("build/ptxas", source).with_suffix(".log") if source.endswith(".cu") else None
        started = time.time()
        run(command, CompileError, log)
        os.utime(output, (started, started))            # a header that changes while its users compile is newer
        recipe.write_text(shlex.join(command))
        return str(output)


def is_current(output, headers, recipe, command):
    if not (output.exists() and headers.exists() and recipe.exists() and recipe.read_text() == command):
        return False
    listed = headers.read_text().replace("\\\n", " ").partition(":")[2].split()
    made = output.stat().st_mtime
    return all(os.path.exists(path) and os.path.getmtime(path) <= made for path in listed)


setup(
    ext_modules=[Extension("flash_attn._C", SOURCES, py_limited_api=True)],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
