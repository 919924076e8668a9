"""What the blocks of GPT-2 and BERT share, and the settings that both are built from.

Shapes at the right: (..., C) is (B, S, C), B sequences of S tokens, or (T, C) where the tokens of all
sequences stand in a row; H heads of D channels, C = H * D.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    attention: str = "flash"


class Attention(nn.Module):
    """attend(qkv, *where, dropout) is the model's; `where` is what it has to know of the sequences."""

    def __init__(self, config, attend):
        super().__init__()
        self.heads, self.dropout, self.attend = config.heads, config.dropout, attend
        self.project_in = nn.Linear(config.width, 3 * config.width)
        self.project_out = nn.Linear(config.width, config.width)

    def forward(self, x, *where):                               # (..., C)
        qkv = self.project_in(x).unflatten(-1, (3, self.heads, -1))                 # (..., 3, H, D)
        heads = self.attend(qkv, *where, self.dropout if self.training else 0.0)    # (..., H, D)
        return F.dropout(self.project_out(heads.flatten(-2)), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, config, gelu):
        super().__init__()
        self.dropout, self.gelu = config.dropout, gelu
        self.project_in = nn.Linear(config.width, 4 * config.width)
        self.project_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        return F.dropout(self.project_out(self.gelu(self.project_in(x))), self.dropout, self.training)


def initialise(module):
    """For Module.apply: normal weights, biases of 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
