"""What the tests of the training scripts share: one thread, short runs, killed runs, logs without times."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import flash_attn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import training

VERY_SMALL = dict(layers=2, heads=2, width=32)
SHORT = ["--batch", "2", "--context", "32", "--warmup", "4", "--eval-batches", "2"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1",              # and the package that this process tests:
                           "PYTHONPATH": str(Path(flash_attn.__file__).parents[1])}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share out; and a run must be compared with one of as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def records(out):
    """The log without what no two runs share: times and rates."""
    return [{k: v for k, v in record.items() if k not in ("time", "tokens_per_s")}
            for record in training.read_log(Path(out, "log.jsonl"))]


def check_resume_after_a_kill(train, arguments, folder, steps=40):
    """Kills a process that trains at a random step, resumes its run, and compares that bit for bit with one that
    ran through."""
    words = [*arguments, "--device", "cpu", "--steps", str(steps), "--dropout", "0.1", "--eval-every", "6",
             "--save-every", "5", "--out"]
    killed = subprocess.Popen([sys.executable, train.__file__, *words, str(folder / "killed")], env=ONE_THREAD,
                              stdout=subprocess.DEVNULL)
    log, step = folder / "killed" / "log.jsonl", random.randrange(6, steps - 4)
    while killed.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL

    train.COMMAND.run([*words, str(folder / "whole")])
    train.COMMAND.run(["--resume", "--out", str(folder / "killed")])
    assert [record["step"] for record in records(folder / "whole")] == list(range(1, steps + 1))
    assert records(folder / "killed") == records(folder / "whole")
    weights = [torch.load(folder / run / "checkpoint.pt")["model"] for run in ("whole", "killed")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


def loss_after(steps, model, attend, loss):
    """The last loss of a model that attends so; loss() draws a batch."""
    for block in model.blocks:
        block.attention.attend = attend
    adam = training.optimiser(model, 3e-3, 0.0)
    for _ in range(steps):
        value = loss()
        adam.zero_grad()
        value.backward()
        adam.step()
    return value.item()


def check_that_flash_trains_like_standard(command, data, folder, device, monkeypatch):
    """Both attentions of a model on the same batches: the same losses, which fall; then a text is to be seen."""
    monkeypatch.setitem(command.presets, "tiny", VERY_SMALL)
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 2e-2)):
        losses = {}
        for attention in ("flash", "standard"):
            out = folder / f"{attention}-{dtype}"
            train = command.main if (attention, dtype) == ("flash", "bfloat16") else command.run
            train(["--data", str(data), *SHORT, "--steps", "20", "--device", device, "--dtype", dtype,
                   "--attention", attention, "--out", str(out)])
            losses[attention] = [record["loss"] for record in records(out)]
        assert losses["flash"] == pytest.approx(losses["standard"], abs=bound)
        assert losses["flash"][-1] < losses["flash"][0]
    assert (folder / "flash-bfloat16" / command.shown).stat().st_size


def complaint(command, *words):
    """The line that a script ends with; a string as exit code is printed by Python and makes the code 1."""
    with pytest.raises(SystemExit) as error:
        command.main([str(word) for word in words])
    assert str(error.value.code).startswith("error: ") and "\n" not in error.value.code
    return error.value.code
