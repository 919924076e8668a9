"""Trains GPT-2 on a folder of tokens: the command that shows flash_attn at its main job, on a CPU or on GPUs.

    train.py --data data/stdlib --out runs/tiny --minutes 2
    train.py --resume --out runs/tiny           # after a kill: the same run from its last checkpoint on
    torchrun --nproc-per-node 8 train.py --preset small --accumulate 5 --dtype bfloat16 --out runs/small
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training
from data import vocabulary
from gpt2.model import ATTENTION, GPT2, PRESETS, Config
from gpt2.sample import write_text

RECIPES = {             # what a preset is trained with unless the command line says otherwise
    "tiny":   dict(batch=8,  context=256,  lr=1e-3, warmup=40,  minutes=2.0, eval_every=50),
    "small":  dict(batch=12, context=1024, lr=6e-4, warmup=700, steps=100_000, accumulate=40),
    "medium": dict(batch=8,  context=1024, lr=3e-4, warmup=700, steps=100_000, accumulate=60),
}


def windows(tokens, batch, context):
    """draw(split, rng): inputs and targets (batch, context), windows that start anywhere in the split."""
    def draw(split, rng):
        starts = rng.integers(0, len(tokens[split]) - context, batch)
        ids = np.stack([tokens[split][start:start + context + 1] for start in starts])
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    return draw


def setup(words):
    """(the run that the command line `words` describes, ready to train, and what its data says of itself)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--attention", default="flash", choices=ATTENTION)
    parser.add_argument("--context", type=training.positive, help="tokens that the model sees at once")
    parser.add_argument("--prompt", default="", help="start of the text sample at the end")
    training.add_arguments(parser, data="data/stdlib")
    arguments, checkpoint = training.parse(parser, words, RECIPES)

    tokens, meta = training.load_tokens(arguments.data, arguments.context)
    torch.manual_seed(arguments.seed)
    model = GPT2(Config(meta["vocab_size"], arguments.context, **PRESETS[arguments.preset],
                        dropout=arguments.dropout, attention=arguments.attention))
    world = training.World.join(arguments.device)
    draw = windows(tokens, arguments.batch, arguments.context)
    return training.Run(model, draw, arguments, checkpoint, world), meta


def run(words):
    """Trains as the command line says."""
    started, meta = setup(words)
    started.train()
    started.leave()
    return started, meta


def report(run, meta):
    """After the run: the curve, a sample, and how far below the unigram entropy the model came."""
    model, arguments = run.model, run.arguments
    out = Path(arguments.out)
    title = f"GPT-2 {arguments.preset}, {arguments.attention} attention, {arguments.dtype}: {meta['source']}"
    training.plot_loss(out, title, meta["unigram_entropy"])
    torch.manual_seed(arguments.seed)
    text = write_text(model, vocabulary.load(arguments.data), arguments.prompt, length=200)
    (out / "sample.txt").write_text(text + "\n")
    val_loss = training.read_log(out / "log.jsonl")[-1]["val_loss"]
    print(f"\n{text}\n\nvalidation loss {val_loss:.4f}, {meta['unigram_entropy'] - val_loss:.4f} below the "
          f"unigram entropy {meta['unigram_entropy']:.4f}\n"
          f"{out / 'loss.png'} has the curve, {out / 'sample.txt'} the text above")


def main(words=None):
    finished, meta = run(words)
    if finished.world.rank == 0:
        try:
            report(finished, meta)
        except OSError as error:
            sys.exit(f"error: cannot write to {finished.out} ({error.strerror}): free the disk; then "
                     f"--resume plots the loss")


if __name__ == "__main__":
    main()
