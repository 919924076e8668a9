"""Builds flash_attn/_C.abi3.so from C, with setuptools and nothing else.

torch's BuildExtension is not used: it needs torch at build time and compiles .c files as C++. Our sources
link no torch and keep to Python's limited API: one binary serves every Python >= 3.10 and PyTorch >= 2.4.

Environment:
  MAX_JOBS              files compiled at a time (default: the number of CPUs)
  CC, CFLAGS, LDFLAGS   compiler, and flags added after ours
  FLASH_ATTN_CUDA       auto (default) | 1 | 0: build the CUDA kernels if nvcc is found | or fail | never
  FLASH_ATTN_WERROR     1: warnings are errors
  FLASH_ATTN_SANITIZE   1: AddressSanitizer and UndefinedBehaviorSanitizer; run with LD_PRELOAD=libasan.so
"""

import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, OptionError

SOURCES = ["csrc/python_module.c", *sorted(glob("csrc/common/*.c")), *sorted(glob("csrc/cpu/*.c"))]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]


def switched_on(name):
    return os.environ.get(name, "0") not in ("", "0")


def run(command, error):
    """One compiler call; its output is shown whole and at once, since several run at a time."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        raise error(f"exit status {done.returncode} from {shlex.join(command)}")


class BuildExt(build_ext):
    """Compiles in parallel, and only what changed: an object is as good as its command, its source and every
    header that the compiler listed for it."""

    def build_extension(self, ext):
        self.compiler_command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        objects = self.compile_c(ext.sources) + self.compile_cuda()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = SANITIZE if switched_on("FLASH_ATTN_SANITIZE") else []
        run([*self.compiler_command, "-shared", *flags, *objects, "-o", str(target), "-lm",
             *shlex.split(os.environ.get("LDFLAGS", ""))], LinkError)

    def compile_c(self, sources):
        # -ffp-contract=off: the same sums whatever the compiler may fuse; micro-kernels ask for FMA by name.
        # No -march: each ISA's file says what it may use, and the CPU at hand is asked at run time.
        flags = ["-O3", "-std=c11", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
                 "-I" + sysconfig.get_path("include")]
        if switched_on("FLASH_ATTN_WERROR"):
            flags.append("-Werror")
        if switched_on("FLASH_ATTN_SANITIZE"):
            flags += SANITIZE
        command = [*self.compiler_command, *flags, *shlex.split(os.environ.get("CFLAGS", ""))]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            return list(pool.map(lambda source: self.compile_one(command, source), sources))

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
        run(command, CompileError)
        recipe.write_text(shlex.join(command))
        return str(output)

    def compile_cuda(self):
        """Objects of the .cu files. There are none yet, so `auto` builds none and `1` cannot be served."""
        choice = os.environ.get("FLASH_ATTN_CUDA", "auto")
        if choice not in ("auto", "0", "1"):
            raise OptionError(f"FLASH_ATTN_CUDA must be auto, 1 or 0, got {choice!r}")
        if choice == "1":
            raise OptionError("FLASH_ATTN_CUDA=1: this version has no CUDA kernels yet; use auto or 0")
        return []


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
