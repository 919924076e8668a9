"""The training command that GPT-2 and BERT share: optimiser, schedule, exact resume, logs and plot.

A model here is a module made of a Config whose forward(*batch) is its loss; draw(split, rng) makes a batch.
All that is random in a micro-batch, its data and its dropout, is seeded by (seed, step, micro-batch). So a
checkpoint holds no generator state: a run resumed after a kill repeats itself bit for bit, and two processes
draw what one process with twice the accumulation draws.

The folder --out holds checkpoint.pt (replaced at once, never half written), log.jsonl (a record a step),
loss.png and TensorBoard's events.
"""
import argparse
import contextlib
import gc
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from data import vocabulary
from layers import Config

try:
    from tqdm import tqdm
    say = tqdm.write
except ImportError:                                 # then a run has no bar, and a line a validation
    tqdm, say = None, print


# Arguments

def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def natural(text):
    return positive(text) if int(text) else 0


def add_arguments(parser, data):
    parser.add_argument("--data", default=data, help="folder written by examples/data/prepare.py")
    parser.add_argument("--out", required=True, help="folder for checkpoint, log and plot")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --out, with its settings but for those given here")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16: by autocast")
    parser.add_argument("--batch", type=positive, help="sequences in a micro-batch")
    parser.add_argument("--accumulate", type=positive, default=1, help="micro-batches a step and process")
    parser.add_argument("--steps", type=positive, help="length of the run")
    parser.add_argument("--minutes", type=float, help="or: its length in time, made steps after warm-up")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--warmup", type=natural, default=100,
                        help="steps until the peak; then a cosine to a tenth")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--eval-every", type=positive, default=100, help="steps between validations")
    parser.add_argument("--eval-batches", type=positive, default=16)
    parser.add_argument("--save-every", type=positive, default=100, help="steps between checkpoints")


def parse(parser, words, recipes):
    """(arguments, checkpoint or None). What is not given comes from the recipe or the resumed run."""
    given = parser.parse_args(words)
    path = Path(given.out, "checkpoint.pt")
    checkpoint, defaults = None, dict(recipes[given.preset])
    if given.resume:
        checkpoint = load_checkpoint(path)
        defaults.update(checkpoint["arguments"])
    elif path.exists():
        sys.exit(f"error: {path} is there already: continue that run with --resume, or choose another --out")
    if given.steps or given.minutes:                # a new length replaces the old one, in whichever unit
        defaults.update(steps=None, minutes=None)
    parser.set_defaults(**defaults)
    return parser.parse_args(words), checkpoint


# Data

def load_tokens(folder, context, options=""):
    """({"train": ids, "val": ids}, meta) of a data folder, each longer than a window of `context` tokens."""
    way_out = f"write it with: python examples/data/prepare.py text {options}--out {folder}"
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        tokens = {}
        for split in ("train", "val"):
            path, wanted = Path(folder, f"{split}.bin"), meta[f"{split}_tokens"]
            if path.stat().st_size != 2 * wanted:
                sys.exit(f"error: {path} has {path.stat().st_size} bytes, not {2 * wanted}: {way_out}")
            if wanted <= context:
                sys.exit(f"error: {path} has {wanted} tokens: give more text, or --context below {wanted}")
            tokens[split] = np.memmap(path, np.uint16, "r")
    except OSError as error:
        sys.exit(f"error: no data at {error.filename} ({error.strerror}): {way_out}")
    except (ValueError, KeyError):                  # what json and a dict say of a file that was cut short
        sys.exit(f"error: {folder}/meta.json is not whole: {way_out}")
    return tokens, meta


# Processes

@dataclass
class World:
    """The processes that train together: one, or those that torchrun started."""
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device):
        rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in
                                  (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        if size > 1:
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(rank, size, torch.device(device))

    def mean(self, value):
        """The mean of a number over all processes, the same number in each."""
        if self.size == 1:
            return float(value)
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item() / self.size

    def replicate(self, model):
        return DistributedDataParallel(model) if self.size > 1 else model

    def leave(self):
        if self.size > 1:
            torch.distributed.destroy_process_group()


# Optimiser and schedule

def optimiser(model, learning_rate, weight_decay):
    """AdamW with weight decay on matrices only: biases and the gains of layer norms are left to the loss."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(step, peak, warmup, planned):
    """Straight up to the peak, then half a cosine wave down to a tenth of it at the last step."""
    if step < warmup or planned is None:
        return peak * min(1, (step + 1) / max(1, warmup))
    progress = (step - warmup) / max(1, planned - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


# Files

def replace_file(path, write):
    """Makes `path` what write(file) writes, or leaves it as it was: at no moment does it hold half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)      # the new name itself must reach the disk too
    os.fsync(folder)
    os.close(folder)


def save_checkpoint(path, checkpoint):
    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:               # torch's own, raised over the file's: that one says why
            raise error.__context__ or error

    replace_file(path, write)


def load_checkpoint(path):
    if not path.exists():
        sys.exit(f"error: no checkpoint {path} to resume: start without --resume, or give that run's --out")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                               # what torch raises depends on where the file was cut
        sys.exit(f"error: {path} is cut short or no checkpoint: restore a copy, or delete it and start again")


def load_trained(out, model):
    """The model that a run left in its folder, and the vocabulary of its data."""
    checkpoint = load_checkpoint(Path(out, "checkpoint.pt"))
    trained = model(Config(**checkpoint["config"]))
    trained.load_state_dict(checkpoint["model"])
    return trained, vocabulary.load(checkpoint["arguments"]["data"])


def read_log(path):
    """The log's records; a last line that a kill cut short is not one."""
    records = []
    with contextlib.suppress(json.JSONDecodeError), open(path) as file:
        for line in file:
            records.append(json.loads(line))
    return records


class Log:
    """Where a run tells its story: log.jsonl, TensorBoard where it is installed, and the terminal."""

    def __init__(self, out, step, planned):
        self.path = out / "log.jsonl"
        self.drop_after(step)
        self.file = open(self.path, "a")
        self.board = self.open_board(out / "tensorboard", step)
        self.bar = tqdm and tqdm(initial=step, total=planned, unit="step", disable=None, dynamic_ncols=True)
        self.val_loss = None

    def drop_after(self, step):
        """What a killed run logged after its last checkpoint will be logged again."""
        records = read_log(self.path) if step else []
        lines = "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step)
        replace_file(self.path, lambda file: file.write(lines.encode()))

    @staticmethod
    def open_board(folder, step):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard events (pip install tensorboard): log.jsonl and loss.png have it all")
            return None
        threading.excepthook = writer_thread_failed
        return SummaryWriter(folder, purge_step=step + 1)

    def write(self, record, planned):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            for name in record.keys() - {"step", "time"}:
                self.board.add_scalar(name, record[name], record["step"])
        self.val_loss = record.get("val_loss", self.val_loss)
        if self.bar is not None:
            self.bar.total = planned
            self.bar.set_postfix_str(summary(record | {"val_loss": self.val_loss}), refresh=False)
            self.bar.update()
        if "val_loss" in record:
            say(f"step {record['step']:5d}  {summary(record)}")

    def close(self):
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.board:
            self.board.close()


def writer_thread_failed(failure):
    """TensorBoard's thread has no news of a full disk: the run meets it too, and says so in one line."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def summary(record):
    val_loss = "" if record["val_loss"] is None else f"  val {record['val_loss']:.4f}"
    return f"loss {record['loss']:.4f}{val_loss}  lr {record['lr']:.1e}  {record['tokens_per_s']:,} tokens/s"


def plot_loss(out, title, unigram_entropy=None):
    """loss.png from log.jsonl: training and validation loss, and what a model without context would reach."""
    try:
        import matplotlib
    except ImportError:
        print("no loss.png (pip install matplotlib): the numbers are in log.jsonl")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_log(out / "log.jsonl")
    checked = [record for record in records if "val_loss" in record]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records],
              color="#9dc3e6", lw=0.9, label="training")
    axes.plot([r["step"] for r in checked], [r["val_loss"] for r in checked], "o-",
              color="#1f4e79", ms=4, label=f"validation, at the end {checked[-1]['val_loss']:.3f}")
    if unigram_entropy:
        axes.axhline(unigram_entropy, color="#c55a11", ls="--", lw=1,
                     label=f"unigram entropy {unigram_entropy:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png", dpi=130)
    plt.close(figure)


# The run

class Run:
    def __init__(self, model, draw, arguments, checkpoint, world):
        self.arguments, self.world, self.draw = arguments, world, draw
        self.out = Path(arguments.out)
        self.model = model.to(world.device)
        self.optimiser = optimiser(self.model, arguments.lr, arguments.weight_decay)
        self.step, self.seconds, self.saved = 0, 0.0, None
        if checkpoint:
            self.restore(checkpoint)
        self.planned = arguments.steps or self.planned_before(checkpoint)
        self.replica = world.replicate(self.model)

    def restore(self, checkpoint):
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["model"].items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for name in sorted(saved.keys() | wanted.keys()):
            there, here = saved.get(name), wanted.get(name)
            if there != here:
                sys.exit(f"error: {self.out}/checkpoint.pt is of another model ({name} is {there} there, "
                         f"{here} here): resume with its own settings, or choose another --out")
        self.model.load_state_dict(checkpoint["model"])
        self.optimiser.load_state_dict(checkpoint["optimiser"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.saved = self.step

    def planned_before(self, checkpoint):
        """The steps that a resumed run had made of the same --minutes; None if that is still to come."""
        same = checkpoint and checkpoint["arguments"]["minutes"] == self.arguments.minutes
        return checkpoint["planned"] if same else None

    def save(self):
        save_checkpoint(self.out / "checkpoint.pt", {
            "arguments": vars(self.arguments), "config": asdict(self.model.config),
            "step": self.step, "seconds": self.seconds, "planned": self.planned,
            "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()})
        self.saved = self.step

    def train(self):
        """Runs to the planned step. What stops it early is told in one line, with the way to go on."""
        way_on = "start again" if self.saved is None else f"--resume continues from step {self.saved}"
        log = None
        try:
            if self.world.rank == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                log = Log(self.out, self.step, self.planned)
            while self.planned is None or self.step < self.planned:
                self.advance(log)
                if self.saved == self.step:
                    way_on = f"--resume continues from step {self.saved}"
            if log:
                log.close()
        except OSError as error:
            sys.exit(f"error: cannot write to {self.out} ({error.strerror}): free the disk; then {way_on}")
        except KeyboardInterrupt:
            sys.exit(f"stopped at step {self.step}; {way_on}")

    def leave(self):
        """Parts from the other processes. The replica holds on to the connection, and cycles hold the replica:
        what is not collected before would be torn down at exit, while threads of it still run."""
        self.replica = None
        gc.collect()
        self.world.leave()

    def advance(self, log):
        """One step, with the validation, record and checkpoint that are due after it."""
        start = time.perf_counter()
        record = self.optimise()
        if self.due(self.arguments.eval_every):
            record["val_loss"] = self.validate()
        self.seconds += time.perf_counter() - start
        if self.planned is None:
            self.planned = self.steps_in_time()
        if log:
            log.write(record | {"time": round(self.seconds, 3)}, self.planned)
            if self.due(self.arguments.save_every):
                os.fsync(log.file.fileno())         # a checkpoint never knows more than the log on disk
                self.save()

    def due(self, every):
        return self.step % every == 0 or self.step == self.planned

    def steps_in_time(self):
        """--minutes as steps, by the pace of the first tenth; fixed then, so that a resumed run keeps it."""
        seconds, limit = self.world.mean(self.seconds), 60 * self.arguments.minutes
        if self.step < self.arguments.warmup or seconds < limit / 10:
            return None
        return self.step + max(1, round((limit - seconds) * self.step / seconds))

    def loss(self, batch):
        half = self.arguments.dtype == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=half):
            return self.replica(*(part.to(self.world.device) if isinstance(part, torch.Tensor) else part
                                  for part in batch))

    def optimise(self):
        """One optimiser step over all micro-batches of all processes; returns its record."""
        start, rate = time.perf_counter(), self.rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = tokens = 0
        for i in range(self.arguments.accumulate):
            batch = self.micro_batch(self.world.rank * self.arguments.accumulate + i)
            with self.reduce_gradients(last=i == self.arguments.accumulate - 1):
                part = self.loss(batch) / self.arguments.accumulate
                part.backward()
            loss, tokens = loss + part.detach(), tokens + batch[0].numel()
        loss = self.world.mean(loss)
        if not math.isfinite(loss):
            sys.exit(f"error: the loss is {loss} at step {self.step + 1}: start again with --lr below "
                     f"{self.arguments.lr}, or a longer --warmup")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        tokens = round(self.world.mean(tokens) * self.world.size)
        return {"step": self.step, "loss": loss, "lr": rate, "tokens": tokens,
                "tokens_per_s": round(tokens / (time.perf_counter() - start))}

    def rate(self):
        return learning_rate(self.step, self.arguments.lr, self.arguments.warmup, self.planned)

    def micro_batch(self, index):
        """The step's micro-batch of this index among all processes', and the seed of its dropout."""
        key = (self.arguments.seed, self.step, index)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        return self.draw("train", np.random.default_rng(key))

    def reduce_gradients(self, last):
        """Gradients are averaged over processes with the last micro-batch only: once a step is enough."""
        return contextlib.nullcontext() if last or self.world.size == 1 else self.replica.no_sync()

    @torch.no_grad()
    def validate(self):
        """Mean loss over the same batches of validation data in every evaluation of every run."""
        self.model.eval()
        mine = range(self.world.rank, self.arguments.eval_batches, self.world.size)
        total = sum(self.loss(self.draw("val", np.random.default_rng(i))).item() for i in mine)
        self.model.train()
        return self.world.mean(total) * self.world.size / self.arguments.eval_batches


# The command

@dataclass
class Command:
    """`train.py` of a model: what it is told, the run, and what is to be seen of it at the end."""
    about: str
    name: str                                       # in the plot's title
    model: type
    presets: dict                                   # {name: shape of the model}
    recipes: dict                                   # {name: arguments unless the command line says otherwise}
    attentions: dict
    folder: str                                     # of its data
    context: str                                    # what --context means
    draw: Callable                                  # (tokens, meta, batch, context) -> draw(split, rng)
    shown: str                                      # the file of the text that is
    show: Callable                                  # (run, vocabulary) -> text
    load: Callable = load_tokens                    # (folder, context) -> (tokens, meta)
    options: dict = field(default_factory=dict)     # of its own: {"--name": what add_argument takes}

    def setup(self, words):
        """(the run that the command line describes, ready to train, and what its data says of itself)."""
        parser = argparse.ArgumentParser(description=self.about,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--preset", default="tiny", choices=self.presets)
        parser.add_argument("--attention", default="flash", choices=self.attentions)
        parser.add_argument("--context", type=positive, help=self.context)
        for option, settings in self.options.items():
            parser.add_argument(option, **settings)
        add_arguments(parser, self.folder)
        arguments, checkpoint = parse(parser, words, self.recipes)

        tokens, meta = self.load(arguments.data, arguments.context)
        torch.manual_seed(arguments.seed)
        model = self.model(Config(meta["vocab_size"], arguments.context, **self.presets[arguments.preset],
                                  dropout=arguments.dropout, attention=arguments.attention))
        world = World.join(arguments.device)
        draw = self.draw(tokens, meta, arguments.batch, arguments.context)
        return Run(model, draw, arguments, checkpoint, world), meta

    def run(self, words=None):
        """Trains as the command line says."""
        run, meta = self.setup(words)
        run.train()
        run.leave()
        return run, meta

    def report(self, run, meta):
        """After the run: the curve, a text, and how far below the unigram entropy the model came."""
        arguments, entropy = run.arguments, meta["unigram_entropy"]
        title = f"{self.name} {arguments.preset}, {arguments.attention} attention, {arguments.dtype}"
        plot_loss(run.out, f"{title}: {meta['source']}", entropy)
        text = self.show(run, vocabulary.load(arguments.data))
        (run.out / self.shown).write_text(text + "\n")
        val_loss = read_log(run.out / "log.jsonl")[-1]["val_loss"]
        print(f"\n{text}\n\nvalidation loss {val_loss:.4f}, {entropy - val_loss:.4f} below the unigram entropy "
              f"{entropy:.4f}\n{run.out / 'loss.png'} has the curve, {run.out / self.shown} the text above")

    def main(self, words=None):
        run, meta = self.run(words)
        if run.world.rank == 0:
            try:
                self.report(run, meta)
            except OSError as error:
                sys.exit(f"error: cannot write to {run.out} ({error.strerror}): free the disk; then "
                         f"--resume plots the loss")
