"""Exact attention for PyTorch that never writes the N x N matrix to memory; answers to the flash-attn 2.8
API."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)      # FlashAttention-4 installs flash_attn/cute on its own
__version__ = "2.8.3+0.1.0"                     # the API level we answer to, then our own number

from .flash_attn_interface import (  # noqa: E402
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ._backend import ArgumentTypeError, ArgumentValueError, UnsupportedError  # noqa: E402
from .info import info  # noqa: E402
from . import bert_padding, nn  # noqa: E402
from .nn import replace  # noqa: E402

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "bert_padding",
    "info",
    "nn",
    "replace",
    "ArgumentTypeError",
    "ArgumentValueError",
    "UnsupportedError",
]
