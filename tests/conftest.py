"""What every test file shares: the device as a parameter, and memory that is never clean."""

from functools import cache, partial

import pytest
import torch
from hypothesis import settings

from flash_attn import UnsupportedError, _backend, flash_attn_func

settings.register_profile("default", max_examples=300, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda", "all"),
                     help="where tests that take a device run (default: the CPU, and a GPU that can serve)")


@cache
def cuda_problem():
    """Why CUDA tensors cannot be tested here, or None."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        flash_attn_func(*(torch.zeros(1, 1, 1, 8, device="cuda", dtype=torch.float16) for _ in range(3)))
    except UnsupportedError as error:
        return str(error)
    return None


def pytest_report_header(config):
    if config.getoption("--device") is None and cuda_problem():
        return f"device: cpu; not cuda: {cuda_problem()}"


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--device")
    devices = [] if wanted == "cuda" else ["cpu"]
    if wanted in ("cuda", "all") or (wanted is None and not cuda_problem()):
        missing = pytest.mark.skipif(cuda_problem() is not None, reason=str(cuda_problem()))
        devices.append(pytest.param("cuda", marks=missing))
    metafunc.parametrize("device", devices)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Outputs, gradients and scratch start as NaN, so that what a kernel does not write is seen."""
    for name in "empty", "empty_like":
        monkeypatch.setattr(_backend, name, partial(poisoned, getattr(torch, name)))


def poisoned(allocate, *args, **kwargs):
    x = allocate(*args, **kwargs)
    return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-1 if x.dtype.is_signed else 255)


@pytest.fixture
def restore_threads():
    """For tests that call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
