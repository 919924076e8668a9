"""The side-by-side timing of training: every attention on the same data, batches halved where memory ends."""
import json

import pytest
import torch

from training_runs import EXAMPLES, one_thread
import throughput
from bert import model as bert_model
from data import prepare
from gpt2 import model as gpt2_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folders = {"gpt2": "bytes", "bert": "wordpiece:400"}
    for model, vocabulary in folders.items():
        folders[model] = tmp_path_factory.mktemp(model)
        prepare.main(["text", "--source", str(EXAMPLES), "--vocab", vocabulary, "--out", str(folders[model])])
    return folders


def run(data, out, *words):
    throughput.main([*words, "--gpt2-data", str(data["gpt2"]), "--bert-data", str(data["bert"]), "--device", "cpu",
                     "--dtype", "float32", "--batch", "2", "--context", "32", "--steps", "5", "--dropout", "0",
                     "--out", str(out)])
    [path] = out.glob("training-*.json")
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def very_small_models(monkeypatch):
    for module in (gpt2_model, bert_model):
        monkeypatch.setitem(module.PRESETS, "tiny", dict(layers=1, heads=2, width=32))


def test_all_attentions_train_alike_side_by_side(data, tmp_path, capsys):
    results = run(data, tmp_path, "gpt2:tiny", "bert:tiny")
    assert [(cell["model"], cell["attention"]) for cell in results["cells"]] == \
        [(model, attention) for model in ("gpt2", "bert") for attention in ("standard", "sdpa", "flash")]
    for cell in results["cells"]:
        standard = results["losses"][f"{cell['model']}:tiny:standard"]
        assert results["losses"][f"{cell['model']}:tiny:{cell['attention']}"] == pytest.approx(standard, abs=1e-4)
        seconds = cell["ms_per_step"] * 1e-3
        assert cell["sequences_per_s"] == pytest.approx(2 / seconds, rel=1e-4)
        assert cell["tokens_per_s"] == pytest.approx(cell["tokens_per_step"] / seconds, rel=0.02)
    assert all(cell["tokens_per_step"] == 64 for cell in results["cells"][:3])
    assert all(cell["tokens_per_step"] < 64 for cell in results["cells"][3:])       # no padding counts
    assert len(capsys.readouterr().out.splitlines()) == 7 and list(tmp_path.glob("training-*.png"))


def test_batches_that_do_not_fit_are_halved(data, tmp_path, monkeypatch):
    train, tried = throughput.train, []

    def small_memory(arguments, model, preset, attention, batch, accumulate):
        tried.append((batch, accumulate))
        if batch > 1:
            raise torch.OutOfMemoryError("full")
        return train(arguments, model, preset, attention, batch, accumulate)

    monkeypatch.setattr(throughput, "train", small_memory)
    [cell] = run(data, tmp_path, "gpt2:tiny", "--attention", "flash")["cells"]
    assert tried == [(2, 1), (1, 2)] and (cell["batch"], cell["accumulate"]) == (1, 2)


@pytest.mark.parametrize("words, wanted", [(["bert:huge"], "bert:base"), (["gpt2:tiny", "--steps", "4"], "untimed")])
def test_cases_that_cannot_be(words, wanted, capsys):
    with pytest.raises(SystemExit):
        throughput.main(words)
    assert wanted in capsys.readouterr().err
