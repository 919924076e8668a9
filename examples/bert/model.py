"""BERT, readable: the model that shows what it takes to never compute on padding.

Devlin et al. 2018: post-layer-norm blocks, learned positions and segments, GELU, and a head that predicts
masked tokens with the matrix that reads them; layers.py beside this folder has what it shares with GPT-2.

The T tokens of B sequences stand in a row, one sequence after the other. With flash attention they stay so
through the whole model. The other attentions need a rectangle: the model pads what it reads to B sequences
of S tokens, the longest of the batch, and takes the tokens out again at the end.

Shapes at the right: (..., C) is (T, C) or (B, S, C); H heads of D channels, C = H * D; M masked tokens, V
ids.
"""
import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from layers import Attention, Config, FeedForward, initialise

PRESETS = {
    "tiny":  dict(layers=2,  heads=2,  width=128),              # two minutes on two CPU cores
    "base":  dict(layers=12, heads=12, width=768),              # 109,514,298 parameters with 30,522 ids
    "large": dict(layers=24, heads=16, width=1024),             # 335,174,458
}


class Sequences:
    """Where the T tokens of a batch belong: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    `longest` is a number on the host, so that nothing here waits for a GPU.
    """

    def __init__(self, cu_seqlens, longest, total):             # (B + 1,), S, T
        self.cu_seqlens, self.longest, self.lengths = cu_seqlens, longest, cu_seqlens.diff()
        self.batch, device = len(self.lengths), cu_seqlens.device
        sequence = torch.arange(self.batch, device=device)
        sequence = sequence.repeat_interleave(self.lengths, output_size=total)              # (T,)
        self.positions = torch.arange(total, device=device) - cu_seqlens[sequence]          # (T,)
        self.places = sequence * longest + self.positions                                   # (T,), of B * S

    def pad(self, x):                                           # (T, ...) to (B, S, ...)
        padded = x.new_zeros(self.batch * self.longest, *x.shape[1:])
        return padded.index_copy(0, self.places, x).unflatten(0, (self.batch, self.longest))

    def unpad(self, x):                                         # (B, S, ...) to (T, ...)
        return x.flatten(0, 1).index_select(0, self.places)

    @cached_property
    def visible(self):                                          # (B, 1, 1, S): True where there is a key
        keys = torch.arange(self.longest, device=self.lengths.device)
        return (keys < self.lengths[:, None])[:, None, None]


def flash_attention(qkv, sequences, dropout):                   # (T, 3, H, D)
    from flash_attn import flash_attn_varlen_qkvpacked_func     # here, so that the other two run without it

    return flash_attn_varlen_qkvpacked_func(qkv, sequences.cu_seqlens, sequences.longest, dropout)


def standard_attention(qkv, sequences, dropout):                # (B, S, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, H, S, D) each
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])   # (B, H, S, S): never stored by flash
    probabilities = scores.masked_fill(~sequences.visible, -torch.inf).softmax(-1)
    return (F.dropout(probabilities, dropout) @ v).transpose(1, 2)


def sdpa_attention(qkv, sequences, dropout):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, sequences.visible, dropout).transpose(1, 2)


ATTENTION = {"flash": flash_attention, "standard": standard_attention, "sdpa": sdpa_attention}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        attend = ATTENTION[config.attention]
        self.attention, self.attention_norm = Attention(config, attend), layer_norm(config)
        self.feed_forward, self.feed_forward_norm = FeedForward(config, F.gelu), layer_norm(config)

    def forward(self, x, sequences):
        x = self.attention_norm(x + self.attention(x, sequences))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Head(nn.Module):
    """From hidden states to scores of tokens, with the embedding's own matrix."""

    def __init__(self, config):
        super().__init__()
        self.project, self.norm = nn.Linear(config.width, config.width), layer_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    def forward(self, x, tokens):                               # (M, C), (V, C)
        return F.linear(self.norm(F.gelu(self.project(x))), tokens, self.bias)              # (M, V)


def layer_norm(config):
    return nn.LayerNorm(config.width, eps=1e-12)


class BERT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.segments = nn.Embedding(2, config.width)
        self.norm = layer_norm(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        self.apply(initialise)

    def encode(self, ids, segments, cu_seqlens, longest):       # (T,), (T,), (B + 1,) int32, S
        """The last hidden states (T, C); a token sees its own sequence."""
        padded = self.config.attention != "flash"
        if padded:
            longest += -longest % 8                             # GPUs are slow at other shapes
        sequences = Sequences(cu_seqlens, longest, len(ids))
        inputs = ids, segments, sequences.positions
        if padded:
            inputs = map(sequences.pad, inputs)                 # (B, S) each
        ids, segments, positions = inputs
        x = self.norm(self.tokens(ids) + self.positions(positions) + self.segments(segments))
        x = F.dropout(x, self.config.dropout, self.training)    # (..., C)
        for block in self.blocks:
            x = block(x, sequences)
        return sequences.unpad(x) if padded else x

    def logits(self, ids, segments, cu_seqlens, longest, masked):
        """Scores (M, V) of the tokens in the rows `masked`, the only ones that the head computes."""
        hidden = self.encode(ids, segments, cu_seqlens, longest)
        return self.head(hidden.index_select(0, masked), self.tokens.weight)

    def forward(self, ids, segments, cu_seqlens, longest, masked, targets):
        """Mean negative log-likelihood of `targets` (M,), in nats per masked token."""
        return F.cross_entropy(self.logits(ids, segments, cu_seqlens, longest, masked), targets)
