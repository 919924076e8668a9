"""The training benchmark: every attention on the same data, batches halved where memory ends."""
import importlib.util
import json

import pytest
import torch

from training_runs import VERY_SMALL, one_thread
import throughput
from data import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """write(model): a folder of its data, text of many short sections."""
    source = tmp_path_factory.mktemp("text") / "short.py"
    source.write_text("".join(f"def times{n}(x):\n    return {n} * x\n\n\n" for n in range(2000)))

    def write(model):
        folder = tmp_path_factory.mktemp(model)
        vocabulary = {"gpt2": "bytes", "bert": "wordpiece:300"}[model]
        prepare.main(["text", "--source", str(source), "--vocab", vocabulary, "--out", str(folder)])
        return folder

    return write


def run(data, out, device, *words, steps=5):
    folders = [word for model in {word.partition(":")[0] for word in words if ":" in word}
               for word in (f"--{model}-data", str(data(model)))]
    throughput.main([*words, *folders, "--device", device, "--dtype", "float32", "--batch", "2", "--context", "32",
                     "--steps", str(steps), "--dropout", "0", "--out", str(out)])
    [path] = out.glob("training-*.json")
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def very_small_models(monkeypatch):
    for command in throughput.MODELS.values():
        for preset in command.presets:
            monkeypatch.setitem(command.presets, preset, VERY_SMALL)


@pytest.mark.parametrize("cases", [("gpt2:tiny", "gpt2:medium"), ("bert:tiny",)], ids=" ".join)
def test_all_attentions_train_alike_side_by_side(cases, data, tmp_path, device, capsys):
    if "bert:tiny" in cases:
        pytest.importorskip("tokenizers")
    results = run(data, tmp_path, device, *cases)
    assert [(f"{cell['model']}:{cell['preset']}", cell["attention"]) for cell in results["cells"]] == \
        [(case, attention) for case in cases for attention in ("standard", "sdpa", "flash")]
    for cell in results["cells"]:
        losses = {attention: results["losses"][f"{cell['model']}:{cell['preset']}:{attention}"]
                  for attention in (cell["attention"], "standard")}
        assert losses[cell["attention"]] == pytest.approx(losses["standard"], abs=1e-4)
        seconds = cell["ms_per_step"] * 1e-3
        assert cell["sequences_per_s"] == pytest.approx(2 / seconds, rel=1e-4)
        assert cell["tokens_per_s"] == pytest.approx(cell["tokens_per_step"] / seconds, rel=0.05)
        padding_counts = cell["model"] == "gpt2"                        # there is none
        assert (cell["tokens_per_step"] == 64) == padding_counts
        assert (cell["peak_gb"] is None) == (device == "cpu")
    assert results["stamp"].keys() == {"cpu", "gpu"}
    printed = capsys.readouterr().out.split("case  ")[1].splitlines()
    assert len([line for line in printed if "loss" in line]) == 3 * len(cases)
    assert bool(list(tmp_path.glob("training-*.png"))) == bool(importlib.util.find_spec("matplotlib"))


def test_a_call_adds_to_an_earlier_one(data, tmp_path, capsys):
    for attention in "flash", "sdpa", "sdpa":
        results = run(data, tmp_path, "cpu", "gpt2:tiny", "--attention", attention, "--add")
    assert [cell["attention"] for cell in results["cells"]] == ["flash", "sdpa"]
    assert results["losses"].keys() == {"gpt2:tiny:flash", "gpt2:tiny:sdpa"}
    with pytest.raises(SystemExit, match="steps = 5, not 6"):
        run(data, tmp_path, "cpu", "gpt2:tiny", "--add", steps=6)
    assert list(run(data, tmp_path, "cpu", "gpt2:tiny", "--attention", "flash")["losses"]) == ["gpt2:tiny:flash"]


def test_batches_that_do_not_fit_are_halved(data, tmp_path, monkeypatch):
    train, tried = throughput.train, []

    def small_memory(arguments, model, preset, attention, batch, accumulate):
        tried.append((batch, accumulate))
        if batch > 1:
            raise torch.OutOfMemoryError("full")
        return train(arguments, model, preset, attention, batch, accumulate)

    monkeypatch.setattr(throughput, "train", small_memory)
    [cell] = run(data, tmp_path, "cpu", "gpt2:tiny", "--attention", "flash")["cells"]
    assert tried == [(2, 1), (1, 2)] and (cell["batch"], cell["accumulate"]) == (1, 2)


@pytest.mark.parametrize("words, wanted", [(["bert:huge"], "bert:base"), (["gpt2:tiny", "--steps", "4"], "untimed")])
def test_cases_that_cannot_be(words, wanted, capsys):
    with pytest.raises(SystemExit):
        throughput.main(words)
    assert wanted in capsys.readouterr().err
