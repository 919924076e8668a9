"""The package as it is installed: identity, what the binary needs, and that it starts no thread pool of its
own."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import flash_attn
from flash_attn import _C

PACKAGE = Path(flash_attn.__file__).parent


def run_python(code, *flags):
    """Output of a fresh interpreter, in which nothing pins a kernel; fails the test with its errors."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_ATTN_")}
    done = subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(code)], cwd=PACKAGE.parent,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version():
    """The API level comes first; consumers compare it, some with an upper limit."""
    assert re.fullmatch(r"2\.8\.3\+\d+\.\d+\.\d+", flash_attn.__version__)


def test_metadata_agrees():
    try:
        distribution = importlib.metadata.distribution("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn is not installed: this is a source tree")
    assert distribution.version == flash_attn.__version__
    assert "flash-attn" in [name.replace("_", "-")
                            for name in importlib.metadata.packages_distributions()["flash_attn"]]


def test_public_names():
    assert set(flash_attn.__all__) <= set(dir(flash_attn))
    assert not (PACKAGE / "cute").exists(), "flash_attn.cute belongs to FlashAttention-4"


def test_a_separate_flash_attn_cute_is_found(tmp_path):
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (cute / "__init__.py").write_text("answer = 42\n")
    assert run_python(f"""
        import sys
        sys.path.append({str(tmp_path)!r})
        import flash_attn.cute
        print(flash_attn.cute.answer, flash_attn.__version__)
        """) == f"42 {flash_attn.__version__}\n"


def test_binary_is_abi3():
    assert _C.__file__.endswith((".abi3.so", ".pyd"))


def test_binary_needs_only_libc_and_libm():
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    done = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout))
    allowed = re.compile(r"(libc|libm|libpthread|libdl|librt|ld-linux.*|ld-musl.*)\.so\.?\d*|libc\.musl.*")
    assert needed and all(map(allowed.fullmatch, needed)), needed


def test_extension_imports_without_torch():
    """By path, so that the package's own import of torch does not count."""
    out = run_python(f"""
        import importlib.machinery, importlib.util, sys
        loader = importlib.machinery.ExtensionFileLoader("flash_attn._C", {_C.__file__!r})
        spec = importlib.util.spec_from_loader("flash_attn._C", loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        assert "torch" not in sys.modules
        print(module.info())
        """, "-I", "-S")
    assert "CPU kernels: cpu" in out


def test_one_thread_pool():
    """Torch's OpenMP is the only one in the process, and our calls add no threads to torch's."""
    out = run_python("""
        import os, re, torch, flash_attn
        torch.set_num_threads(2)
        def threads():
            return len(os.listdir("/proc/self/task"))
        a = torch.randn(600, 600)
        (a @ a).sum(), a.exp()
        big = torch.randn(4000000).add_(1)
        torch.ones(3, requires_grad=True).sum().backward()      # autograd starts threads of its own, one a GPU
        before = threads()
        q = torch.randn(2, 512, 4, 64, requires_grad=True)
        for _ in range(3):
            flash_attn.flash_attn_func(q, q, q).sum().backward()
        pools = {os.path.basename(line.split()[-1]) for line in open("/proc/self/maps")
                 if re.search(r"/lib(gomp|omp|iomp5)\\b", line)}
        print(len(pools), threads() - before)
        """) if Path("/proc/self/maps").exists() else pytest.skip("needs /proc")
    assert out == "1 0\n"


def test_calls_use_all_threads_of_torch():
    """The second thread works too: its CPU time, not the wall time of a machine that others may use."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    out = run_python("""
        import os, torch, flash_attn
        torch.set_num_threads(2)
        def ticks():
            stat = {task: open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()
                    for task in os.listdir("/proc/self/task")}
            return {task: int(fields[11]) + int(fields[12]) for task, fields in stat.items()}
        q = torch.randn(4, 1024, 8, 64)
        flash_attn.flash_attn_func(q, q, q)
        before = ticks()
        for _ in range(3):
            flash_attn.flash_attn_func(q, q, q)
        spent = sorted(after - before.get(task, 0) for task, after in ticks().items())
        print(spent[-2] / spent[-1])
        """)
    assert float(out) > 0.3


def test_the_gil_is_released():
    out = run_python("""
        import threading, torch, flash_attn
        torch.set_num_threads(1)
        q = torch.randn(4, 2048, 8, 64)
        ticks, done = 0, threading.Event()
        def call():
            flash_attn.flash_attn_func(q, q, q)
            done.set()
        thread = threading.Thread(target=call)
        thread.start()
        while not done.wait(0.001):
            ticks += 1
        print(ticks)
        """)
    assert int(out) > 3


def test_concurrent_calls_do_not_disturb_each_other():
    """Kernels keep no state: threads of one process get the bits of a lone call."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 100 + 17 * n, 2, 32) for n in range(4)]
    expected = [flash_attn.flash_attn_func(x, x, x, causal=True) for x in inputs]
    results = [None] * 4

    def call(n):
        results[n] = [flash_attn.flash_attn_func(*[inputs[n]] * 3, causal=True) for _ in range(20)]

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected[n]) for n in range(4) for out in results[n])
