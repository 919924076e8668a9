"""What runs here: the machine, the kernel table, versions, and the kernel that a given call would take."""

import platform

import torch

from . import _C, _backend, reference
from .flash_attn_interface import _prepare, _unpack


def info(*tensors, **options):
    """Prints a report for people and bug reports.

    `info()` tells versions, machine and kernels. `info(q, k, v, causal=True)` also tells which kernels a call
    with these tensors would take, and why others refuse it; `(q, kv)` and `(qkv,)` work too, and so do the
    options of flash_attn_func, by keyword, and packing=(cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k). `info(dropout_p=0.1)` tells the dropout that is in effect.
    """
    print(report(*tensors, **options))


def report(*tensors, **options):
    """The text that info() prints."""
    lines = [_versions(), _C.info().rstrip(), _dropout(options.get("dropout_p"))]
    if tensors:
        lines += _choices(tensors, options)
    return "\n".join(lines)


def _versions():
    from . import __version__
    return (f"flash_attn {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads")


def _dropout(dropout_p):
    if dropout_p is None:
        return "dropout acts in steps of 1/256; p < 1/512 drops nothing"
    dropped = 256 - reference.keep256(dropout_p)
    return f"dropout_p={dropout_p} drops {dropped}/256 = {dropped / 256:.6g} of the weights"


def _choices(tensors, options):
    names = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}[len(tensors)]
    given, operands, scalars = _prepare(names, tensors, **{**_DEFAULTS, **options})
    for which, want_backward in ("forward", False), ("backward", True):
        name, refusals = _backend.choose(*_unpack(given), operands, scalars, want_backward)
        yield f"{which}: {name or 'no kernel'}"
        yield from (f"  {line}" for line in refusals.splitlines())


_DEFAULTS = dict(dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                 alibi_slopes=None, deterministic=False, seqused_k=None, rng_state=None, attn_bias=None,
                 attn_mask=None, packing=None)
