"""BERT's training script: the result is that of padding, masks are the paper's, runs survive a kill."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training_runs import (EXAMPLES, SHORT, VERY_SMALL, check_resume_after_a_kill,
                           check_that_flash_trains_like_standard, loss_after, one_thread)
import training_runs
from bert import fill, model, train
from data import prepare
from data.vocabulary import WordPiece, load

MARKS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
LENGTHS = [17, 3, 64, 1, 40]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["text", "--source", str(EXAMPLES), "--vocab", "wordpiece:400", "--out", str(folder)])
    return folder


def small_bert(attention, **options):
    torch.manual_seed(0)
    config = model.Config(100, 64, layers=2, heads=2, width=64, attention=attention, **options)
    return model.BERT(config)


def random_batch(device="cpu", lengths=LENGTHS):
    """What BERT.forward takes, of sequences of these lengths."""
    total = sum(lengths)
    ids, segments = torch.randint(5, 100, (total,)), torch.randint(2, (total,))
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    masked = torch.randperm(total)[:20]
    tensors = ids, segments, cu_seqlens, masked, torch.randint(5, 100, (20,))
    ids, segments, cu_seqlens, masked, targets = (x.to(device) for x in tensors)
    return ids, segments, cu_seqlens, max(lengths), masked, targets


# The model

@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_unpadded_and_padded_agree_on_outputs_loss_and_gradients(attention, device):
    batch, results = random_batch(device), {}
    for name in (attention, "standard"):
        bert = small_bert(name).to(device)
        hidden = bert.encode(*batch[:4])
        loss = bert(*batch)
        loss.backward()
        results[name] = hidden, loss, [p.grad for p in bert.parameters()]
    hidden, loss, gradients = results[attention]
    wanted_hidden, wanted_loss, wanted_gradients = results["standard"]
    torch.testing.assert_close(hidden, wanted_hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("attention", model.ATTENTION)
def test_a_sequence_sees_itself_only(attention):
    """Whatever stands beside it in the batch, and in float32 to the last bits."""
    bert = small_bert(attention)
    ids, segments, cu_seqlens, longest, *_ = random_batch()
    together = bert.encode(ids, segments, cu_seqlens, longest)
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        own = torch.tensor([0, stop - start], dtype=torch.int32)
        alone = bert.encode(ids[start:stop], segments[start:stop], own, stop - start)
        torch.testing.assert_close(together[start:stop], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["ids", "segments"])
def test_every_token_and_segment_reaches_its_sequence(part):
    bert = small_bert("flash")
    ids, segments, cu_seqlens, longest, *_ = random_batch()
    before = bert.encode(ids, segments, cu_seqlens, longest)
    start, stop = cu_seqlens[2:4].tolist()
    changed = {"ids": ids.clone(), "segments": segments.clone()}
    changed[part][stop - 1] += 1 if changed[part][stop - 1] == 0 else -1
    after = bert.encode(changed["ids"], changed["segments"], cu_seqlens, longest)
    differs = (before - after).abs().amax(-1) > 1e-7
    assert differs[start:stop].all() and not differs[:start].any() and not differs[stop:].any()


def test_padding_and_back_keeps_values_and_gradients(device):
    cu_seqlens = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32, device=device)
    sequences = model.Sequences(cu_seqlens, max(LENGTHS), sum(LENGTHS))
    x = torch.randn(sum(LENGTHS), 2, 3, device=device, requires_grad=True)
    padded = sequences.pad(x)
    assert padded.shape == (len(LENGTHS), max(LENGTHS), 2, 3)
    for row, length, part in zip(padded, LENGTHS, x.split(LENGTHS)):
        assert torch.equal(row[:length], part) and not row[length:].any()
    assert torch.equal(sequences.unpad(padded), x)
    assert sequences.positions.tolist() == [i for length in LENGTHS for i in range(length)]
    assert sequences.visible.sum(-1).flatten().tolist() == LENGTHS
    weights = torch.randn_like(x)
    (sequences.unpad(padded.exp()) * weights).sum().backward()
    torch.testing.assert_close(x.grad, (x.exp() * weights).detach())


def test_base_and_large_have_the_published_sizes():
    sizes = {"base": 109_514_298, "large": 335_174_458}
    for preset, size in sizes.items():
        with torch.device("meta"):
            bert = model.BERT(model.Config(30522, 512, **model.PRESETS[preset]))
        assert sum(p.numel() for p in bert.parameters()) == size


def recall_loss(attend, device, steps=100, batch=32, half=4, vocabulary=12):
    """A two-layer model's loss, after training, on sequences that repeat a half, one of each pair masked."""
    torch.manual_seed(0)
    bert = model.BERT(model.Config(vocabulary, 2 * half, layers=2, heads=2, width=64)).to(device)
    cu_seqlens = torch.arange(0, 2 * half * batch + 1, 2 * half, dtype=torch.int32)

    def loss():
        text = torch.randint(1, vocabulary, (batch, half)).repeat(1, 2)                     # (B, 2 * half)
        places = torch.arange(half) + half * torch.randint(2, (batch, half))
        ids = text.scatter(1, places, 0).flatten()
        masked = (torch.arange(batch)[:, None] * 2 * half + places).flatten()               # (B * half,)
        ids, marks, starts, masked, targets = (
            x.to(device) for x in (ids, torch.zeros_like(ids), cu_seqlens, masked, text.flatten()[masked]))
        return bert(ids, marks, starts, 2 * half, masked, targets)

    return loss_after(steps, bert, attend, loss)


def test_learns_to_fill_masks_through_attention_only(device):
    attend = model.ATTENTION["flash"]
    assert recall_loss(attend, device) < 0.1
    assert recall_loss(lambda *given: attend(*given).detach(), device) > 1.0
    assert recall_loss(lambda *given: torch.zeros_like(attend(*given)), device) > 1.0


# Batches

def test_masking_statistics():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 1000, 40_000)
    ids[::100], ids[99::100] = MARKS["[CLS]"], MARKS["[SEP]"]
    seen, places, targets = train.mask(ids, MARKS, 1000, rng)
    text = 40_000 * 98 // 100
    assert len(places) == len(set(places.tolist())) == round(0.15 * text)
    assert np.array_equal(ids[places], targets) and not np.isin(targets, [2, 3]).any()
    untouched = np.delete(np.arange(len(ids)), places)
    assert np.array_equal(seen[untouched], ids[untouched])
    hidden, kept = seen[places] == MARKS["[MASK]"], seen[places] == targets
    count = len(places)
    for share, wanted in ((hidden.mean(), 0.8), (kept.mean(), 0.1)):
        assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / count) + 1e-3
    replaced = seen[places][~hidden & ~kept]
    assert replaced.min() < 30 and replaced.max() > 970 and abs(replaced.mean() - 500) < 60


def test_masks_are_drawn_anew_and_repeat_with_their_seed(data):
    tokens, meta = train.load_data(data, 32)
    draw = train.batches(tokens, meta, batch=4, context=32)
    first, again, other = (draw("train", np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again) if isinstance(a, torch.Tensor))
    assert first[4].tolist() != other[4].tolist()
    ids = np.arange(5, 105)
    places = [train.mask(ids, MARKS, 1000, np.random.default_rng(seed))[1].tolist() for seed in range(2)]
    assert places[0] != places[1]


def test_pieces_are_whole_paragraphs_of_one_section():
    a, b, c, d, e = ([10 + i] * length for i, length in enumerate((3, 4, 5, 20, 2)))
    s = [3]
    tokens = np.array(a + s + b + s + c + s + s + d + s + e + s + s)    # sections: a b c; d e
    texts = [tokens[start:stop].tolist() for start, stop in train.pieces(tokens, 3, room=9)]
    assert texts == [a + s + b, c, d[:9], d[9:18], d[18:] + s + e]
    assert [tokens[start:stop].tolist() for start, stop in train.pieces(tokens, 3, room=100)] == \
        [a + s + b + s + c, d + s + e]


@pytest.mark.parametrize("context", [3, 32, 512])
def test_sequences_are_text_between_their_ends(data, context):
    tokens, meta = train.load_data(data, context)
    marks, rng = meta["marks"], np.random.default_rng(0)
    found = train.pieces(tokens["train"], marks["[SEP]"], context - 2)
    held = np.concatenate([tokens["train"][start:stop] for start, stop in found])
    assert np.array_equal(held[held != 3], tokens["train"][tokens["train"] != 3])       # all text, once
    for start, stop in found[rng.integers(len(found), size=50)]:
        text = tokens["train"][start:stop]
        ids, segments = train.sequence(text, marks, rng)
        assert len(ids) == len(segments) <= context and (ids[0], ids[-1]) == (2, 3)
        assert np.array_equal(ids[1:][ids[1:] != 3], text[text != 3])
        inner = np.flatnonzero(ids[:-1] == 3)
        assert len(inner) <= 1 and segments.sum() == (len(ids) - 1 - inner[0] if len(inner) else 0)


# Runs

def test_flash_trains_like_standard_attention(data, tmp_path, device, monkeypatch):
    check_that_flash_trains_like_standard(train.COMMAND, data, tmp_path, device, monkeypatch)


def test_resumes_bit_for_bit_after_a_kill(data, tmp_path):
    check_resume_after_a_kill(train, ["--data", str(data), *SHORT], tmp_path, steps=30)


@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """A finished four-step run of a very small model, and a way to call the script on it."""
    monkeypatch.setitem(model.PRESETS, "tiny", VERY_SMALL)
    out = tmp_path / "run"
    train.COMMAND.main(["--data", str(data), *SHORT, "--device", "cpu", "--steps", "4", "--out", str(out)])
    return out, capsys.readouterr().out


def test_a_run_leaves_curve_fills_and_a_model_that_fills(run, data, capsys):
    pytest.importorskip("matplotlib")
    out, printed = run
    assert (out / "loss.png").stat().st_size and (out / "filled.txt").read_text().strip() in printed
    count = int(printed.split(" right:")[0].split(" ")[-1])
    assert 0 <= printed.count("<") - printed.count(", was ") <= count
    checkpoint = torch.load(out / "checkpoint.pt")
    bert = model.BERT(model.Config(**checkpoint["config"]))
    bert.load_state_dict(checkpoint["model"])
    guesses = fill.fill(bert, load(data), "def [MASK](x): return [MASK]", top=3)
    assert [len(each) for each in guesses] == [3, 3]
    assert all(0 < p < 1 and isinstance(token, str) for each in guesses for token, p in each)


def complaint(*words):
    return training_runs.complaint(train.COMMAND, "--device", "cpu", *words)


def test_unknown_preset(capsys):
    with pytest.raises(SystemExit):
        train.COMMAND.main(["--preset", "huge", "--out", "nowhere"])
    assert "invalid choice: 'huge'" in capsys.readouterr().err


def test_data_missing_or_in_another_vocabulary(tmp_path):
    line = complaint("--data", tmp_path / "nothing", "--out", tmp_path / "run")
    assert "prepare.py text --vocab wordpiece" in line
    prepare.main(["text", "--source", str(EXAMPLES), "--vocab", "bytes", "--out", str(tmp_path / "bytes")])
    line = complaint("--data", tmp_path / "bytes", "--out", tmp_path / "run")
    assert "no [MASK]" in line and "--vocab wordpiece" in line
    assert not (tmp_path / "run").exists()


def test_no_room_for_text(data, tmp_path):
    assert "--context 2" in complaint("--data", data, "--context", 2, "--out", tmp_path / "run")


def test_texts_that_cannot_be_filled(data):
    bert = small_bert("flash")
    for text in ("no mask", "[MASK] " * 63):
        with pytest.raises(SystemExit, match="error: the text has"):
            fill.fill(bert, load(data), text, top=1)


# Vocabulary

def test_wordpiece_keeps_text_paragraphs_and_sections(tmp_path):
    pytest.importorskip("tokenizers")
    text = "One two, three.\n\ntwo  THREE\n\n\n\nthree\n"
    words = WordPiece.train([text * 50], 300)
    end, cls = words.end, words.marks["[CLS]"]
    [ids] = words.encode([text])
    assert ids.count(end) == 4 and words.decode(ids).count("[SEP]") == 4
    parts = [words.decode(part).split() for part in np.split(ids, np.flatnonzero(np.equal(ids, end)))]
    assert [" ".join(part).replace("[SEP]", "").strip() for part in parts] == \
        ["one two, three.", "two three", "", "three", ""]
    words.save(tmp_path)
    assert WordPiece.load(tmp_path).encode([text]) == [ids] and cls == 2


def test_vocab_txt_gives_its_own_ids(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "un", "##do", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it"]))
    words = WordPiece.read(path)
    assert words.encode(["Undo it!\n"]) == [[1, 2, 7, 3, 5]]
    path.write_text("a\nb\n")
    with pytest.raises(SystemExit, match="no \\[PAD\\]"):
        WordPiece.read(path)
    with pytest.raises(SystemExit, match="wordpiece:2048"):
        WordPiece.read(tmp_path / "nowhere")


@pytest.mark.parametrize("vocab", ["wordpiece", "wordpiece:", "wordpiece:12", "bert:400", "70000"])
def test_vocabularies_that_do_not_exist(vocab, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["text", "--vocab", vocab, "--out", str(tmp_path)])
    assert "wordpiece:" in capsys.readouterr().err
