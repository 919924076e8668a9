"""Text to token ids and back, the same way whichever vocabulary a data folder was written with.

    Bytes       one id per byte, nothing to learn
    BytePair    byte-level byte-pair encoding, trained on the corpus itself
    Gpt2        the 50,257 ids of GPT-2, from a local copy of its ranks (gpt2.tiktoken)

Each has `size`, the id `end` that closes a document, `encode(texts)`, `decode(ids)`, and `save(folder)`,
which writes what `load(folder)` reads back.
"""
import base64
import json
import sys
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


class Bytes:
    size, end = 257, 256

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i != self.end).decode(errors="replace")

    def save(self, folder):
        pass


class BytePair:
    FILE = "tokenizer.json"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.size, self.end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, texts, size):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, folder):
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(Path(folder, cls.FILE))))

    def encode(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def save(self, folder):
        self.tokenizer.save(str(Path(folder, self.FILE)))


class Gpt2:
    FILE = "gpt2.tiktoken"
    # How GPT-2 cuts text before merging: contractions, words, numbers, punctuation, runs of blanks.
    PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    size, end = 50257, 50256

    def __init__(self, ranks_file):
        try:
            import tiktoken
        except ImportError:
            sys.exit("error: GPT-2's vocabulary is read through tiktoken: pip install tiktoken")
        try:
            self.ranks_text = Path(ranks_file).read_bytes()
        except OSError as error:
            sys.exit(f"error: no GPT-2 ranks at {ranks_file} ({error.strerror}): name a copy of "
                     f"gpt2.tiktoken with --gpt2-ranks, or train a vocabulary with --vocab 4096")
        try:
            pairs = (line.split() for line in self.ranks_text.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except ValueError:          # a line that is not "base64 rank": some other file
            ranks = {}
        if len(ranks) != self.end:
            sys.exit(f"error: {ranks_file} holds {len(ranks)} ranks, not GPT-2's {self.end}: fetch it again")
        self.encoding = tiktoken.Encoding("gpt2", explicit_n_vocab=self.size, pat_str=self.PIECES,
                                          mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.end})

    @classmethod
    def load(cls, folder):
        return cls(Path(folder, cls.FILE))

    def encode(self, texts):
        return self.encoding.encode_ordinary_batch(list(texts))

    def decode(self, ids):
        return self.encoding.decode(ids)

    def save(self, folder):
        Path(folder, self.FILE).write_bytes(self.ranks_text)


def load(folder):
    """The vocabulary that the data in `folder` was written with."""
    kind = json.loads(Path(folder, "meta.json").read_text())["vocabulary"]
    return {"Bytes": lambda _: Bytes(), "BytePair": BytePair.load, "Gpt2": Gpt2.load}[kind](folder)
