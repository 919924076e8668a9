"""GPT-2's training script: it learns through attention, survives a kill, and says what is wrong."""
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training_runs import (EXAMPLES, ONE_THREAD, SHORT, VERY_SMALL, check_resume_after_a_kill,
                           check_that_flash_trains_like_standard, loss_after, one_thread, records)
import training_runs
from data import prepare
from data.vocabulary import load
from gpt2 import model, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["text", "--source", str(EXAMPLES), "--vocab", "bytes", "--out", str(folder)])
    return folder


# Learning

def copy_loss(attend, device, steps=150, batch=32, half=12, vocabulary=16):
    """A two-layer model's loss, after training, on the second half of sequences that repeat a random half."""
    torch.manual_seed(0)
    gpt = model.GPT2(model.Config(vocabulary, 2 * half, layers=2, heads=2, width=64)).to(device)

    def loss():
        ids = torch.randint(vocabulary, (batch, half)).repeat(1, 2).to(device)          # (B, 2 * half)
        logits = gpt.logits(ids)[:, half - 1:-1]                                        # (B, half, V)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten())

    return loss_after(steps, gpt, attend, loss)


@pytest.mark.parametrize("attention", ["flash", "standard"])
def test_learns_to_copy_through_attention(attention, device):
    assert copy_loss(model.ATTENTION[attention], device) < 0.05


@pytest.mark.parametrize("attention", ["flash", "standard"])
@pytest.mark.parametrize("harm", [torch.zeros_like, torch.Tensor.detach], ids=["no output", "no gradients"])
def test_cannot_copy_without_attention(attention, harm, device):
    attend = model.ATTENTION[attention]
    assert copy_loss(lambda qkv, dropout: harm(attend(qkv, dropout)), device) > 1.0


def test_flash_and_standard_agree_on_loss_and_gradients(device):
    ids, results = torch.randint(100, (2, 65), device=device), {}
    for attention in ("flash", "standard"):
        torch.manual_seed(0)
        gpt = model.GPT2(model.Config(100, 64, layers=2, heads=2, width=64, attention=attention)).to(device)
        loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results[attention] = loss.item(), [p.grad for p in gpt.parameters()]
    (loss, gradients), (wanted_loss, wanted_gradients) = results["flash"], results["standard"]
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for got, wanted in zip(gradients, wanted_gradients):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_small_and_medium_have_the_published_sizes():
    sizes = {"small": 124_439_808, "medium": 354_823_168}
    for preset, size in sizes.items():
        with torch.device("meta"):
            gpt = model.GPT2(model.Config(50257, 1024, **model.PRESETS[preset]))
        assert sum(p.numel() for p in gpt.parameters()) == size


# Runs

def test_flash_trains_like_standard_attention(data, tmp_path, device, monkeypatch):
    check_that_flash_trains_like_standard(train.COMMAND, data, tmp_path, device, monkeypatch)


def test_resumes_bit_for_bit_after_a_kill(data, tmp_path):
    check_resume_after_a_kill(train, ["--data", str(data), *SHORT], tmp_path)


def test_two_processes_train_as_one_with_twice_the_accumulation(data, tmp_path):
    arguments = ["--data", str(data), *SHORT, "--device", "cpu", "--steps", "6", "--dropout", "0.1", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, train.__file__, *arguments, str(tmp_path / "two")], env=ONE_THREAD, check=True,
                   stdout=subprocess.DEVNULL)
    train.COMMAND.main([*arguments, str(tmp_path / "one"), "--accumulate", "2"])
    for two, one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


# What is wrong, in one line, and nothing lost

@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """A finished four-step run of a very small model, and a way to call the script on it."""
    monkeypatch.setitem(model.PRESETS, "tiny", VERY_SMALL)
    out = tmp_path / "run"
    train.COMMAND.main(["--data", str(data), *SHORT, "--device", "cpu", "--steps", "4", "--out", str(out)])
    return out


def complaint(*words):
    return training_runs.complaint(train.COMMAND, "--device", "cpu", *words)


def damaged(data, folder, name, size):
    shutil.copytree(data, folder)
    if size is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, size)
    return folder


@pytest.mark.parametrize("name, size", [("train.bin", None), ("train.bin", 0), ("val.bin", 11),
                                        ("meta.json", None), ("meta.json", 20)])
def test_data_missing_empty_or_cut(run, data, tmp_path, name, size):
    checkpoint = (run / "checkpoint.pt").read_bytes()
    broken = damaged(data, tmp_path / "broken", name, size)
    line = complaint("--resume", "--out", run, "--data", broken, "--steps", 8)
    assert str(broken / name) in line and "prepare.py" in line
    assert (run / "checkpoint.pt").read_bytes() == checkpoint


def test_checkpoint_of_another_shape(run):
    checkpoint = (run / "checkpoint.pt").read_bytes()
    line = complaint("--resume", "--out", run, "--preset", "small", "--steps", 8)
    assert "another model" in line and "--out" in line
    assert (run / "checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_checkpoint_cut_short(run, part):
    path = run / "checkpoint.pt"
    os.truncate(path, int(part * path.stat().st_size))
    log = (run / "log.jsonl").read_bytes()
    assert "cut short" in complaint("--resume", "--out", run, "--steps", 8)
    assert (run / "log.jsonl").read_bytes() == log


def test_checkpoint_missing_or_in_the_way(run, tmp_path):
    assert "no checkpoint" in complaint("--resume", "--out", tmp_path / "nowhere")
    assert "--resume" in complaint("--out", run)


def test_full_disk_keeps_the_last_checkpoint(run):
    before = records(run)
    checkpoint = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(checkpoint) // 2, limits[1]))
    try:
        line = complaint("--resume", "--out", run, "--steps", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line and "--resume continues from step 4" in line
    assert (run / "checkpoint.pt").read_bytes() == checkpoint and not list(run.glob("*.partial"))
    train.COMMAND.main(["--resume", "--out", str(run), "--steps", "8"])
    assert records(run)[:4] == before and len(records(run)) == 8


def test_loss_that_is_not_a_number(run, data, tmp_path):
    line = complaint("--data", data, *SHORT, "--lr", 1e30, "--steps", 20, "--out", tmp_path / "wild")
    assert "--lr" in line


# Data

def token_lists(folder):
    return [np.fromfile(folder / name, np.uint16).tolist() for name in ("train.bin", "val.bin")]


def test_entropy_is_what_prepare_prints(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    prepare.main(["text", "--source", str(EXAMPLES), "--vocab", "300", "--out", str(tmp_path)])
    train_ids, val_ids = token_lists(tmp_path)
    counts = Counter(train_ids)
    nats = [-math.log((counts[i] + 1) / (len(train_ids) + 300)) for i in val_ids]
    printed = capsys.readouterr().out
    assert f"{math.fsum(nats) / len(nats):.4f} nats per token" in printed
    assert f"{len(train_ids):,} training and {len(val_ids):,} validation tokens" in printed
    assert json.loads((tmp_path / "meta.json").read_text())["unigram_entropy"] == pytest.approx(np.mean(nats))


@pytest.mark.parametrize("vocab", ["bytes", "300"])
def test_tokens_decode_to_the_text(tmp_path, vocab):
    if vocab != "bytes":
        pytest.importorskip("tokenizers")
    text = "naïve = 'λ'\n\tfor  x in range(3):\n" * 40
    source, out = tmp_path / "text", tmp_path / "data"
    source.write_text(text)
    prepare.main(["text", "--source", str(source), "--vocab", vocab, "--out", str(out)])
    assert "".join(load(out).decode(ids) for ids in token_lists(out)) == text


@pytest.mark.parametrize("words, wanted", [
    (["--source", "/nowhere"], "no file or folder /nowhere"),
    (["--vocab", "gpt2", "--gpt2-ranks", "/nowhere"], "tiktoken"),
    (["--source", os.devnull], "no file or folder"),
])
def test_prepare_says_what_is_missing(tmp_path, words, wanted):
    with pytest.raises(SystemExit, match=wanted):
        prepare.main(["text", *words, "--out", str(tmp_path)])
