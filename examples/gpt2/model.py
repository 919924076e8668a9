"""GPT-2, readable: the model that shows what flash_attn changes in a script, one function call.

Radford et al. 2019: pre-layer-norm blocks, learned positions, tanh-GELU, one matrix that reads and predicts
tokens; layers.py beside this folder has what it shares with BERT.

Shapes at the right: B sequences of S tokens, H heads of D channels, C = H * D, V token ids.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from layers import Attention, Config, FeedForward, initialise

PRESETS = {
    "tiny":   dict(layers=4,  heads=3,  width=192),             # two minutes on two CPU cores
    "small":  dict(layers=12, heads=12, width=768),             # 124,439,808 parameters with 50,257 ids
    "medium": dict(layers=24, heads=16, width=1024),            # 354,823,168
}


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
GELU = partial(F.gelu, approximate="tanh")


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        attend = ATTENTION[config.attention]
        self.attention_norm, self.attention = nn.LayerNorm(config.width), Attention(config, attend)
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(config.width), FeedForward(config, GELU)

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
        self.apply(initialise)
        for name, weight in self.named_parameters():
            if name.endswith("project_out.weight"):             # 2 * layers of them add up in a residual
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

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
