"""Writes text with a trained GPT-2: sample.py runs/tiny --prompt "def " --length 200 --temperature 0.8."""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2.model import GPT2
from training import load_trained


def write_text(model, words, prompt, length, temperature=0.8, top_k=50):
    """A document that starts with `prompt`; without one, as the documents of its data start."""
    device = next(model.parameters()).device
    ids = torch.tensor([[words.end, *words.encode([prompt])[0]]], device=device)    # (1, S)
    model.eval()
    return words.decode(model.sample(ids, length, temperature, top_k)[0, 1:].tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the --out folder of a training run")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--length", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, words = load_trained(arguments.run, GPT2)
    torch.manual_seed(arguments.seed)
    print(write_text(model, words, arguments.prompt, arguments.length, arguments.temperature,
                     arguments.top_k))


if __name__ == "__main__":
    main()
