"""Turns text into the token files that the examples train on, and says what a model without context scores.

    prepare.py text --out data/stdlib                        # text that comes with every Python
    prepare.py text --source my/notes --out data/notes       # a file, or every text file below a folder
    prepare.py text --dataset Salesforce/wikitext:wikitext-103-raw-v1 --out data/wikitext
    prepare.py text --vocab wordpiece:2048 --out data/stdlib-wordpiece           # for BERT

Writes train.bin and val.bin (uint16 ids, each document followed by the end-of-text id), the vocabulary and,
last, meta.json: a folder that has it is complete. The split is by document: no validation text has been seen.

The unigram entropy it prints is -mean over val of ln p(token), in nats per token, where
p(token) = (count in train + 1) / (tokens in train + vocabulary size). A model below it uses the context.
BERT predicts no [SEP], so none is counted.
"""
import argparse
import gzip
import hashlib
import json
import math
import sys
import sysconfig
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.vocabulary import BytePair, Bytes, Gpt2, WordPiece

VALIDATION_SHARE = 0.05
VOCABULARY_TEXTS = 20_000           # documents to train a vocabulary on: enough for its most frequent pairs
# Folders of the standard library that hold no text to learn from: installed packages, test data, code tables.
NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass
class Source:
    """Documents by key, read only when they are encoded: a corpus may be larger than memory."""
    name: str
    keys: Sequence
    read: Callable                  # key -> text, or None where the document is not text


def standard_library():
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    modules = [p.relative_to(root) for p in root.rglob("*.py")]
    modules = [str(p) for p in modules if not NOT_TEXT & set(p.parts)]
    version = "{}.{}.{}".format(*sys.version_info)
    return Source(f"standard library and help topics of Python {version}", sorted(modules) + sorted(topics),
                  lambda key: topics.get(key) or read_file(root / key))


def local_text(path):
    path = Path(path)
    if path.is_dir():
        files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        return Source(str(path), files, lambda key: read_file(path / key))
    if not path.is_file():
        sys.exit(f"error: no file or folder {path}: give --source a text file or a folder of text files")
    lines = (read_file(path) or "").splitlines(keepends=True)
    cut = math.ceil(len(lines) * (1 - VALIDATION_SHARE))
    parts = {"train": lines[:cut], "val": lines[cut:]}
    return Source(str(path), list(parts), lambda key: "".join(parts[key]))


def hub_dataset(name):
    try:
        import datasets
    except ImportError:
        sys.exit("error: --dataset needs a library (pip install datasets) and a connection: or use --source")
    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split="train")
    except Exception as error:      # the library raises a type of its own for each way to fail
        reason = str(error).splitlines()[0]
        sys.exit(f"error: no dataset {name} ({reason}): check name and connection, or use --source")
    if "text" not in rows.column_names:
        sys.exit(f"error: the dataset {name} has no column `text`, only {', '.join(rows.column_names)}")
    return Source(name, range(len(rows)), lambda key: rows[key]["text"])


def read_file(path):
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return file.read().decode()
    except UnicodeDecodeError:
        return None
    except OSError as error:
        sys.exit(f"error: cannot read {path} ({error.strerror}): make it readable, or move it away")


def split(keys):
    """(training keys, validation keys), the same on every machine: drawn by a hash of the key."""
    if list(keys) == ["train", "val"]:
        return ["train"], ["val"]
    order = sorted(keys, key=lambda key: hashlib.sha256(str(key).encode()).digest())
    held_out = max(1, round(len(order) * VALIDATION_SHARE))
    return order[held_out:], order[:held_out]


def texts(source, keys):
    return (text for key in keys if (text := source.read(key)))


def choose_vocabulary(arguments, training_texts):
    if arguments.vocab == "bytes":
        return Bytes()
    if arguments.vocab == "gpt2":
        return Gpt2(arguments.gpt2_ranks)
    kind, size = arguments.vocab
    if isinstance(size, str):
        return WordPiece.read(size)
    return kind.train(islice(training_texts, VOCABULARY_TEXTS), size)


def write_tokens(path, documents, vocabulary):
    """Encodes documents into one uint16 file; returns how often each id occurs in it."""
    counts = np.zeros(vocabulary.size, np.int64)
    with open(path, "wb") as file:
        while batch := list(islice(documents, 256)):
            ids = np.array([i for ids in vocabulary.encode(batch) for i in (*ids, vocabulary.end)], np.uint16)
            counts += np.bincount(ids, minlength=vocabulary.size)
            file.write(ids.tobytes())
    return counts


def unigram_entropy(train_counts, val_counts):
    """Nats per validation token under the training set's smoothed token frequencies (top of the file)."""
    p = (train_counts + 1) / (train_counts.sum() + train_counts.size)
    return float(-(val_counts * np.log(p)).sum() / val_counts.sum())


def prepare_text(arguments):
    if arguments.dataset:
        source = hub_dataset(arguments.dataset)
    else:
        source = local_text(arguments.source) if arguments.source else standard_library()
    train_keys, val_keys = split(source.keys)
    vocabulary = choose_vocabulary(arguments, texts(source, train_keys))

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    train_counts = write_tokens(out / "train.bin", texts(source, train_keys), vocabulary)
    val_counts = write_tokens(out / "val.bin", texts(source, val_keys), vocabulary)
    if not (train_counts.sum() and val_counts.sum()):
        sys.exit(f"error: {source.name} is too little text: training and validation need a document each")
    vocabulary.save(out)
    meta = {"source": source.name, "vocabulary": type(vocabulary).__name__, "vocab_size": vocabulary.size,
            "marks": vocabulary.marks,
            "train_documents": len(train_keys), "val_documents": len(val_keys),
            "train_tokens": int(train_counts.sum()), "val_tokens": int(val_counts.sum())}
    for counts in (train_counts, val_counts):
        counts[list(vocabulary.marks.values())] = 0
    meta["unigram_entropy"] = unigram_entropy(train_counts, val_counts)
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    print(f"{out}: {meta['source']}\n"
          f"  {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
          f"vocabulary of {meta['vocab_size']:,}\n"
          f"  unigram entropy of the validation tokens {meta['unigram_entropy']:.4f} nats per token")


def vocabulary_choice(text):
    """`bytes`, `gpt2`, or a class and the size to train it to, or the file to read it from."""
    if text in ("bytes", "gpt2"):
        return text
    kind, _, size = text.rpartition(":")
    if kind in ("", "wordpiece"):
        if kind and size and not size.isdecimal():
            return WordPiece, size
        if size.isdecimal() and 257 <= int(size) <= 65536:  # every byte and a mark; ids are uint16
            return WordPiece if kind else BytePair, int(size)
    raise argparse.ArgumentTypeError(f"{text!r} is not `bytes`, `gpt2`, a size from 257 to 65536, or "
                                     f"`wordpiece:` with such a size or the name of a vocab.txt")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    text = tasks.add_parser("text", help="tokens for a language model")
    origin = text.add_mutually_exclusive_group()
    origin.add_argument("--source", help="text file, or a folder of text files (.gz too)")
    origin.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a text dataset of the Hugging Face hub")
    text.add_argument("--vocab", type=vocabulary_choice, default="4096",
                      metavar="SIZE|gpt2|bytes|wordpiece:SIZE|wordpiece:FILE",
                      help="byte-pair encoding trained to this size (default 4096), GPT-2's own, bytes, or "
                           "for BERT WordPiece, trained to a size or with the words of a vocab.txt")
    text.add_argument("--gpt2-ranks", default=Gpt2.FILE, metavar="FILE", help="its ranks, for --vocab gpt2")
    text.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args(arguments)
    try:
        prepare_text(arguments)
    except OSError as error:
        sys.exit(f"error: cannot write {arguments.out} ({error.strerror}): free the disk, or change --out")


if __name__ == "__main__":
    main()
