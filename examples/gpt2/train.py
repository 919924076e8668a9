"""Trains GPT-2 on a folder of tokens: the command that shows flash_attn at its main job, on a CPU or on GPUs.

    train.py --data data/stdlib --out runs/tiny --minutes 2
    train.py --resume --out runs/tiny           # after a kill: the same run from its last checkpoint on
    torchrun --nproc-per-node 8 train.py --preset small --accumulate 5 --dtype bfloat16 --out runs/small
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training
from gpt2.model import ATTENTION, GPT2, PRESETS
from gpt2.sample import write_text

RECIPES = {
    "tiny":   dict(batch=8,  context=256,  lr=1e-3, warmup=40,  minutes=2.0, eval_every=50),
    "small":  dict(batch=12, context=1024, lr=6e-4, warmup=700, steps=100_000, accumulate=40),
    "medium": dict(batch=8,  context=1024, lr=3e-4, warmup=700, steps=100_000, accumulate=60),
}


def windows(tokens, meta, batch, context):
    """draw(split, rng): inputs and targets (batch, context), windows that start anywhere in the split."""
    def draw(split, rng):
        starts = rng.integers(0, len(tokens[split]) - context, batch)
        ids = np.stack([tokens[split][start:start + context + 1] for start in starts])
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    return draw


def sample(run, words):
    torch.manual_seed(run.arguments.seed)
    return write_text(run.model, words, run.arguments.prompt, length=200)


COMMAND = training.Command(
    __doc__, "GPT-2", GPT2, PRESETS, RECIPES, ATTENTION, folder="data/stdlib",
    context="tokens that the model sees at once", draw=windows, shown="sample.txt", show=sample,
    options={"--prompt": dict(default="", help="start of the text sample at the end")})

if __name__ == "__main__":
    COMMAND.main()
