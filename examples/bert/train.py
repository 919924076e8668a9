"""Trains BERT to fill in masked tokens: the command that shows flash_attn on sequences of different lengths.

    train.py --data data/stdlib-wordpiece --out runs/bert-tiny --minutes 2
    train.py --resume --out runs/bert-tiny      # after a kill: the same run from its last checkpoint on
    torchrun --nproc-per-node 8 train.py --preset base --accumulate 1 --dtype bfloat16 --out runs/bert-base
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training
from bert.fill import show_fills
from bert.model import ATTENTION, BERT, PRESETS

RECIPES = {
    "tiny":  dict(batch=16, context=128, lr=2e-3, warmup=100, minutes=2.0, eval_every=100),
    "base":  dict(batch=32, context=512, lr=1e-4, warmup=10_000, steps=1_000_000, accumulate=8, dropout=0.1),
    "large": dict(batch=16, context=512, lr=1e-4, warmup=10_000, steps=1_000_000, accumulate=16, dropout=0.1),
}
MASKED_SHARE = 0.15
ENDS = 2                # [CLS] before a sequence, [SEP] after it


# Batches

def pieces(tokens, separator, room):
    """(start, stop) of what sequences are made of: the whole paragraphs of one section that fit in `room`.

    A paragraph ends at a separator, a section at two. A paragraph that alone is too long is cut.
    """
    found, start, stop, begin = [], 0, 0, 0
    for end in np.flatnonzero(tokens == separator).tolist():
        section_ends = end == begin
        if section_ends or end - start > room:
            if stop > start:
                found.append((start, stop))
            start = end + 1 if section_ends else begin
            while end - start > room:
                found.append((start, start + room))
                start += room
        stop, begin = max(start, end), end + 1
    return np.array(found)                                      # (pieces, 2)


def sequence(tokens, marks, rng):
    """(ids, segments) of one sequence, [CLS] A [SEP] B [SEP], cut in two at a random end of a paragraph."""
    ids = np.concatenate(([marks["[CLS]"]], tokens, [marks["[SEP]"]]), dtype=np.int64)
    ends = np.flatnonzero(ids == marks["[SEP]"])
    kept = rng.choice(ends)                                     # the last one: a single segment
    segments = (np.arange(len(ids)) > kept).astype(np.int64)
    inner = np.setdiff1d(ends[:-1], kept)
    return np.delete(ids, inner), np.delete(segments, inner)


def mask(ids, marks, vocabulary_size, rng):
    """(ids with some hidden, their places, what was there), drawn anew each time that a text is used.

    Of the text's tokens 15 % are to be predicted. Of these, 80 % read [MASK], 10 % a random token, and 10 %
    what they are: so a model has to know every token, seen or not, from its context.
    """
    text = np.flatnonzero(~np.isin(ids, (marks["[CLS]"], marks["[SEP]"])))
    places = rng.choice(text, max(1, round(MASKED_SHARE * len(text))), replace=False)
    targets, fate, ids = ids[places], rng.random(len(places)), ids.copy()
    ids[places[fate < 0.8]] = marks["[MASK]"]
    replaced = places[fate >= 0.9]
    ids[replaced] = rng.integers(vocabulary_size, size=len(replaced))
    return ids, places, targets


def batches(tokens, meta, batch, context):
    """draw(split, rng): what BERT.forward takes, for `batch` sequences of at most `context` tokens."""
    marks, size = meta["marks"], meta["vocab_size"]
    found = {split: pieces(ids, marks["[SEP]"], context - ENDS) for split, ids in tokens.items()}

    def draw(split, rng):
        chosen = found[split][rng.integers(len(found[split]), size=batch)]
        drawn = [sequence(tokens[split][start:stop], marks, rng) for start, stop in chosen]
        lengths = [len(ids) for ids, _ in drawn]
        ids, segments = (np.concatenate(parts) for parts in zip(*drawn))                    # (T,) each
        ids, masked, targets = mask(ids, marks, size, rng)
        cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        ids, segments, cu_seqlens, masked, targets = map(
            torch.from_numpy, (ids, segments, cu_seqlens, masked, targets))
        return ids, segments, cu_seqlens, max(lengths), masked, targets

    return draw


# The command

def load_data(folder, context):
    """(tokens, meta) of a folder that BERT can train on."""
    if context <= ENDS:
        sys.exit(f"error: --context {context} leaves no room for text beside [CLS] and [SEP]: give 128, say")
    tokens, meta = training.load_tokens(folder, context, "--vocab wordpiece:2048 ")
    if "[MASK]" not in meta.get("marks", {}):
        sys.exit(f"error: {folder} is written in the vocabulary {meta['vocabulary']}, which has no [MASK]: "
                 f"write another: python examples/data/prepare.py text --vocab wordpiece:2048 "
                 f"--out {folder}-wordpiece")
    return tokens, meta


def fills(run, words):
    return show_fills(run.model, words, run.draw("val", np.random.default_rng(run.arguments.seed)))


COMMAND = training.Command(
    __doc__, "BERT", BERT, PRESETS, RECIPES, ATTENTION, folder="data/stdlib-wordpiece",
    context="tokens of the longest sequence", load=load_data, draw=batches, shown="filled.txt", show=fills)

if __name__ == "__main__":
    COMMAND.main()
