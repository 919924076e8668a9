"""Text to token ids and back, the same way whichever vocabulary a data folder was written with.

    Bytes       one id per byte, nothing to learn
    BytePair    byte-level byte-pair encoding, trained on the corpus itself
    Gpt2        the 50,257 ids of GPT-2, from a local copy of its ranks (gpt2.tiktoken)
    WordPiece   BERT's kind, uncased: trained on the corpus, or from a local copy of a vocab.txt

Each has `size`, the id `end` that closes a document, `encode(texts)`, `decode(ids)`, and `save(folder)`,
which writes what `load(folder)` reads back. `marks` names the ids that are no text, if there are any.
"""
import base64
import json
import re
import sys
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


class Bytes:
    size, end, marks = 257, 256, {}

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i != self.end).decode(errors="replace")

    def save(self, folder):
        pass


class BytePair:
    FILE, marks = "tokenizer.json", {}

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
    size, end, marks = 50257, 50256, {}

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


class WordPiece:
    """Its ids keep what BERT's batches need of a text: [SEP] closes a paragraph, one more a section.

    A blank line ends a paragraph; two end a section, as around the definitions of a Python module.
    """
    FILE = "tokenizer.json"
    MARKS = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    PARAGRAPH, SECTION = (re.compile(r"\n" + blank_lines * r"[^\S\n]*\n" + r"\s*") for blank_lines in (1, 2))

    def __init__(self, tokenizer):
        self.tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()
        self.marks = {mark: tokenizer.token_to_id(mark) for mark in self.MARKS}
        self.end = self.marks["[SEP]"]

    @classmethod
    def train(cls, texts, size):
        from tokenizers import models, trainers

        tokenizer = cls.uncased(models.WordPiece(unk_token="[UNK]"))
        tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=list(cls.MARKS), show_progress=False))
        return cls(tokenizer)

    @classmethod
    def read(cls, path):
        from tokenizers import models

        try:
            words = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"error: no vocabulary at {path} ({error}): name a vocab.txt, or train a vocabulary "
                     f"with --vocab wordpiece:2048")
        ids = {word: i for i, word in enumerate(words)}
        if missing := [mark for mark in cls.MARKS if mark not in ids]:
            sys.exit(f"error: {path} has no {', '.join(missing)}: it is not the vocab.txt of a BERT")
        tokenizer = cls.uncased(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.add_special_tokens(list(cls.MARKS))
        return cls(tokenizer)

    @staticmethod
    def uncased(model):
        from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    @classmethod
    def load(cls, folder):
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(Path(folder, cls.FILE))))

    def encode(self, texts):
        """Ids of each text without its last [SEP]: that one is `end`."""
        return [[i for section in self.SECTION.split(text) for i in self.section(section)][:-1]
                for text in texts]

    def section(self, text):
        encodings = self.tokenizer.encode_batch(self.PARAGRAPH.split(text))
        return [i for encoding in encodings if encoding.ids for i in (*encoding.ids, self.end)] + [self.end]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder):
        self.tokenizer.save(str(Path(folder, self.FILE)))


def load(folder):
    """The vocabulary that the data in `folder` was written with."""
    kind = json.loads(Path(folder, "meta.json").read_text())["vocabulary"]
    return {"Bytes": lambda _: Bytes(), "BytePair": BytePair.load, "Gpt2": Gpt2.load,
            "WordPiece": WordPiece.load}[kind](folder)
