"""Fills in masks with a trained BERT: fill.py runs/bert-tiny "for i in [MASK](len(x)):" --top 5."""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bert.model import BERT
from training import load_trained


@torch.no_grad()
def probabilities(model, batch):
    """What the model gives each token (M, V) in the masked places of a batch, with its targets or without."""
    model.eval()
    device = next(model.parameters()).device
    batch = [x.to(device) if isinstance(x, torch.Tensor) else x for x in batch]
    return model.logits(*batch[:5]).float().softmax(-1)


def show_fills(model, words, batch, sequences=6):
    """The first sequences of a batch as text, with the model's likeliest token in every masked place."""
    ids, _, cu_seqlens, _, masked, targets = batch
    guesses = probabilities(model, batch).argmax(-1).tolist()
    shown = [words.tokenizer.id_to_token(i) for i in ids.tolist()]
    right = 0
    for place, target, guess in zip(masked.tolist(), targets.tolist(), guesses):
        guess, target = map(words.tokenizer.id_to_token, (guess, target))
        shown[place] = f"<{guess}>" if guess == target else f"<{guess}, was {target}>"
        right += guess == target
    bounds = cu_seqlens[:sequences + 1].tolist()
    lines = [" ".join(shown[start:stop]) for start, stop in zip(bounds, bounds[1:])]
    head = f"Masks of validation text filled in, {right} of {len(targets)} right:"
    return "\n\n".join([head, *lines])


def fill(model, words, text, top):
    """For each [MASK] in the text, its likeliest tokens: [(token, probability), ...]."""
    marks = words.marks
    ids = [marks["[CLS]"], *words.tokenizer.encode(text).ids, marks["[SEP]"]]
    if marks["[MASK]"] not in ids or len(ids) > model.config.context:
        found = ids.count(marks["[MASK]"])
        sys.exit(f"error: the text has {len(ids)} tokens with its ends and {found} [MASK]: "
                 f"give one of at most {model.config.context} with at least one [MASK]")
    ids = torch.tensor(ids)                                                                     # (T,)
    masked = (ids == marks["[MASK]"]).nonzero()[:, 0]
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    best = probabilities(model, (ids, torch.zeros_like(ids), cu_seqlens, len(ids), masked)).topk(top)
    return [[(words.tokenizer.id_to_token(i), p) for i, p in zip(tokens, shares)]
            for tokens, shares in zip(best.indices.tolist(), best.values.tolist())]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the --out folder of a training run")
    parser.add_argument("text", help="with one [MASK] or more")
    parser.add_argument("--top", type=int, default=5, help="tokens to list for each mask")
    arguments = parser.parse_args()
    model, words = load_trained(arguments.run, BERT)
    for guesses in fill(model, words, arguments.text, arguments.top):
        print("  ".join(f"{token} {p:.0%}" for token, p in guesses))


if __name__ == "__main__":
    main()
