"""GPT-2, whole and readable: the model that shows what flash_attn changes in a script, one function call.

Radford et al. 2019: pre-layer-norm blocks, learned positions, tanh-GELU, one matrix that reads and predicts
tokens. Shapes at the right: B sequences of S tokens, H heads of D channels, C = H * D, V token ids.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    "tiny":   dict(layers=4,  heads=3,  width=192),             # two minutes on two CPU cores
    "small":  dict(layers=12, heads=12, width=768),             # 124,439,808 parameters with 50,257 ids
    "medium": dict(layers=24, heads=16, width=1024),            # 354,823,168
}


@dataclass
class Config:
    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    attention: str = "flash"


def flash_attention(qkv, dropout):                              # (B, S, 3, H, D)
    from flash_attn import flash_attn_qkvpacked_func            # here, so that the other two run without it

    return flash_attn_qkvpacked_func(qkv, dropout_p=dropout, causal=True)


def standard_attention(qkv, dropout):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, H, S, D) each
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])   # (B, H, S, S): never stored by flash
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (F.dropout(probabilities, dropout) @ v).transpose(1, 2)


def sdpa_attention(qkv, dropout):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


ATTENTION = {"flash": flash_attention, "standard": standard_attention, "sdpa": sdpa_attention}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attend = ATTENTION[config.attention]
        self.project_in = nn.Linear(config.width, 3 * config.width)
        self.project_out = nn.Linear(config.width, config.width)

    def forward(self, x):                                       # (B, S, C)
        qkv = self.project_in(x).unflatten(-1, (3, self.heads, -1))             # (B, S, 3, H, D)
        heads = self.attend(qkv, self.dropout if self.training else 0.0)        # (B, S, H, D)
        return F.dropout(self.project_out(heads.flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.project_in = nn.Linear(config.width, 4 * config.width)
        self.project_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        hidden = F.gelu(self.project_in(x), approximate="tanh")                 # (B, S, 4 C)
        return F.dropout(self.project_out(hidden), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(config.width), FeedForward(config)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialise)
        for name, weight in self.named_parameters():
            if name.endswith("project_out.weight"):             # 2 * layers of them add up in a residual
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def logits(self, ids):                                      # (B, S)
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(positions)        # (B, S, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)       # (B, S, V)

    def forward(self, ids, targets):
        """Mean negative log-likelihood of `targets` (B, S), in nats per token."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def sample(self, ids, length, temperature=0.8, top_k=50):
        """Appends `length` sampled tokens to the prompt `ids` (B, S)."""
        for _ in range(length):
            scores = self.logits(ids[:, -self.config.context:])[:, -1].float() / temperature  # (B, V)
            least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
            probabilities = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
            ids = torch.cat((ids, torch.multinomial(probabilities, 1)), dim=1)
        return ids
