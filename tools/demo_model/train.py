"""Train the demo model, for as long as one likes. usage: train.py WORK [--from FOLDER] [--rate RATE], later
train.py WORK --decay MILLION_TOKENS

--from begins with the weights of another checkpoint of this shape; where its tokenizer differs, the embedding of a token is
the mean of those of the old tokens that spell it. Where its rate has been zero, a lower peak is kinder: --rate 1e-3.

The rate is constant after a warm-up, so training may stop at any time. The last phase, --decay, takes it to zero over so
many tokens from the newest state on; the state before it is kept as WORK/stable.pt. WORK/checkpoint is in Hugging Face form.

Everything is in WORK/state.pt: stop the program with SIGTERM or SIGINT, or pull the plug, and start it again. While a file
WORK/PAUSE exists it sleeps. WORK/log.jsonl gets a line every 20 steps and one for every evaluation.

Matrices are trained with Muon (momentum, made orthogonal), the rest with AdamW. On a CPU every worker is a process with one
thread: workers take small batches from one counter and meet a few times a step, so that a busy machine does not stall every
product.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from model import Model, Shape, product_dtype, save
from model import load as load_model
from tokenizers import Tokenizer
from torch import Tensor

LENGTH, ROWS = 512, 8
"""Tokens of a window, windows of a small batch."""
BATCHES = ((10e6, 2), (math.inf, 4))
"""Small batches of a step, up to so many tokens."""
RATE, WARM_UP, DECAY, BETAS, MOMENTUM = 2e-3, 150, 0.1, (0.9, 0.95), 0.95
MUON_SIZE = 0.5
"""Root mean square of a Muon update at rate 1, so that both take one rate (60 steps: 0.4 better than 0.2 and than AdamW)."""
BALANCE, Z_LOSS, LARGEST_NORM = 0.01, 1e-3, 1.0
ITERATIONS = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip
"""Coefficients of the Newton-Schulz steps."""
LOG_STEPS, SAVE_SECONDS, EVALUATE_SECONDS, EVALUATED = 20, 300, 900, 48
"""EVALUATED: windows of an evaluation."""
MATRICES = "gate_up", "down", ".q.weight", ".k.weight", ".v.weight", ".o.weight"


@torch.no_grad()
def orthogonal(matrices: Tensor) -> Tensor:
    """Singular values to about one, for a stack of matrices."""
    x = matrices.to(product_dtype()).view(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in ITERATIONS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


def muon(name: str, parameter: Tensor, gradient: Tensor, state: list[Tensor], rate: float) -> None:
    (momentum,) = state
    momentum.lerp_(gradient, 1 - MOMENTUM)
    update = gradient.lerp(momentum, MOMENTUM)
    parts = 2 if name.endswith("gate_up") else 1
    for part, target in zip(update.chunk(parts, -1), parameter.chunk(parts, -1), strict=True):
        target.sub_(orthogonal(part), alpha=rate * MUON_SIZE * math.sqrt(max(part.shape[-2:])))


def adam(parameter: Tensor, gradient: Tensor, state: list[Tensor], rate: float, count: int) -> None:
    first, second = state
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    size = (second / (1 - BETAS[1] ** count)).sqrt_().add_(1e-10)
    parameter.addcdiv_(first, size, value=-rate / (1 - BETAS[0] ** count))


class Data:
    """Windows of the token stream; every epoch has its own order and its own shift."""

    def __init__(self, work: Path, device: str) -> None:
        self.tokens, self.device = np.memmap(work / "tokens.bin", np.uint16, "r"), device
        self.windows, self.epoch = (len(self.tokens) - LENGTH - 1) // LENGTH, -1
        self.held_out = {}
        for file in sorted(work.glob("heldout*.bin")):
            tokens = np.fromfile(file, np.uint16)
            self.held_out[file.stem] = tokens, file.with_suffix(".txt").stat().st_size / len(tokens)

    def _cut(self, source: np.ndarray, starts: list[int]) -> tuple[Tensor, Tensor]:
        rows = np.stack([source[start : start + LENGTH + 1] for start in starts]).astype(np.int64)
        rows = torch.from_numpy(rows).to(self.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _start(self, window: int) -> int:
        epoch, at = divmod(window, self.windows)
        if epoch != self.epoch:
            random = np.random.default_rng(epoch)
            self.epoch, self.order, self.shift = epoch, random.permutation(self.windows), int(random.integers(LENGTH))
        return int(self.order[at]) * LENGTH + self.shift

    def batch(self, first: int) -> tuple[Tensor, Tensor]:
        return self._cut(self.tokens, [self._start(window) for window in range(first, first + ROWS)])

    @torch.no_grad()
    def evaluate(self, model: Model) -> dict[str, float]:
        """Nats per byte of every held-out text."""
        results = {}
        for name, (tokens, bytes_per_token) in self.held_out.items():
            starts = np.linspace(0, len(tokens) - LENGTH - 1, EVALUATED).astype(int).tolist()
            batches = [self._cut(tokens, starts[i : i + ROWS]) for i in range(0, EVALUATED, ROWS)]
            results[name] = sum(model(*batch)[0].item() for batch in batches) / (EVALUATED * LENGTH * bytes_per_token)
        return results


class Trainer:
    """What all workers share: weights, every worker's gradients, the optimizers' states, counters."""

    def __init__(self, work: Path, workers: int, device: str, begin: Path | None = None, peak: float = RATE) -> None:
        torch.manual_seed(0)
        self.work, self.workers, self.device, self.data = work, workers, device, Data(work, device)
        self.model = Model(Shape()).to(device).share_memory()
        self.named = dict(self.model.named_parameters())
        self.state = {
            name: [torch.zeros_like(p).share_memory_() for _ in range(1 if name.endswith(MATRICES) else 2)]
            for name, p in self.named.items()
        }
        self.gradients = [
            {name: torch.zeros_like(p).share_memory_() for name, p in self.named.items()} for _ in range(workers)
        ]
        self.numbers = dict(tokens=0, steps=0, seconds=0.0, cpu_seconds=0.0, decay_from=0, decay_tokens=0, peak=peak)
        self.sums, self.norms = torch.zeros(workers, 3).share_memory_(), torch.zeros(workers).share_memory_()
        context = multiprocessing.get_context("fork")
        self.barrier, self.next, self.stopping = context.Barrier(workers), context.Value("q", 0), context.Value("b", 0)
        self.context, self.paused, self.signalled = context, 0, context.Value("b", 0)
        if (work / "state.pt").exists():
            self.load()
        elif begin is not None:
            self.begin_with(begin)

    def load(self) -> None:
        stored = torch.load(self.work / "state.pt", map_location=self.device)
        self.numbers |= stored["numbers"]
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(stored["model"][name])
                for mine, other in zip(self.state[name], stored["state"][name], strict=True):
                    mine.copy_(other)

    @torch.no_grad()
    def begin_with(self, folder: Path) -> None:
        """Another checkpoint's weights; embeddings by the spelling of tokens."""
        old, new = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (folder, self.work))
        weights = load_model(folder).state_dict()
        before, known = weights.pop("embedding.weight"), old.get_vocab()
        self.model.load_state_dict(weights, strict=False)
        for token, index in new.get_vocab().items():
            ids = [known[token]] if token in known else [part.id for part in old.model.tokenize(token)]
            self.model.embedding.weight[index] = before[ids].mean(0)

    def save(self) -> None:
        """Written beside, then renamed: a crash leaves the old state."""
        weights = {name: parameter.detach() for name, parameter in self.named.items()}
        fresh = self.work / "state.new"
        torch.save(dict(numbers=self.numbers, model=weights, state=self.state), fresh)
        os.replace(fresh, self.work / "state.pt")
        save(self.model, self.work / "checkpoint", self.work / "tokenizer.json")

    def log(self, **values: float) -> None:
        values = {name: self.numbers[name] for name in ("tokens", "seconds", "cpu_seconds", "steps")} | values
        line = json.dumps({name: round(value, 5) for name, value in values.items()})
        with open(self.work / "log.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def start_decay(self, tokens: int) -> None:
        """Decay over so many tokens from here on, unless a decay is under way."""
        if not self.numbers["decay_tokens"]:
            if (self.work / "state.pt").exists():
                shutil.copyfile(self.work / "state.pt", self.work / "stable.pt")
            self.numbers |= dict(decay_from=self.numbers["tokens"], decay_tokens=tokens)

    def rate(self) -> float:
        """Peak rate after the warm-up, linear to zero in the last phase."""
        n = self.numbers
        left = 1 - (n["tokens"] - n["decay_from"]) / n["decay_tokens"] if n["decay_tokens"] else 1
        return n["peak"] * min(1, (n["steps"] + 1) / WARM_UP) * max(0, left)

    def finished(self) -> bool:
        n = self.numbers
        return n["decay_tokens"] > 0 and n["tokens"] >= n["decay_from"] + n["decay_tokens"]

    def work_step(self, rank: int) -> None:
        """One worker's part of a step: its small batches, then its share of the parameters."""
        mine = self.gradients[rank]
        for gradient in mine.values():
            gradient.zero_()
        self.sums[rank] = 0
        batches = next(count for tokens, count in BATCHES if self.numbers["tokens"] < tokens)
        while (i := self.take()) < batches:
            self.pause()
            loss, balance, z_loss = self.model(*self.data.batch(self.numbers["tokens"] // LENGTH + i * ROWS))
            loss = loss / (ROWS * LENGTH)
            ((loss + BALANCE * balance + Z_LOSS * z_loss) / batches).backward()
            self.sums[rank] += torch.stack((loss, balance, z_loss)).detach().cpu() / batches
        self.barrier.wait()
        names = self.share(rank)
        with torch.no_grad():
            for name in names:
                for other in self.gradients[:rank] + self.gradients[rank + 1 :]:
                    mine[name].add_(other[name])
            self.norms[rank] = sum(mine[name].square().sum().item() for name in names)
            self.barrier.wait()
            scale = min(1.0, LARGEST_NORM / (self.norms.sum().item() ** 0.5 + 1e-6))
            self.update(names, mine, scale)
        self.numbers["steps"] += 1
        self.numbers["tokens"] += batches * ROWS * LENGTH

    def pause(self) -> None:
        """Sleep while WORK/PAUSE exists."""
        while (self.work / "PAUSE").exists() and not self.signalled.value:
            time.sleep(1)
            self.paused += 1

    def take(self) -> int:
        with self.next.get_lock():
            self.next.value += 1
            return self.next.value - 1

    def share(self, rank: int) -> list[str]:
        """Parameters that this worker updates; matrices of the layers alternate."""
        names = sorted(self.named, key=lambda name: (self.named[name].numel(), name))
        return names[rank :: self.workers]

    def update(self, names: list[str], gradients: dict[str, Tensor], scale: float) -> None:
        rate = self.rate()
        for name in names:
            parameter, gradient = self.named[name], gradients[name].mul_(scale)
            if parameter.ndim >= 2:
                parameter.mul_(1 - rate * DECAY)
            if name.endswith(MATRICES):
                muon(name, parameter, gradient, self.state[name], rate)
            else:
                adam(parameter, gradient, self.state[name], rate, self.numbers["steps"] + 1)

    def run(self, rank: int) -> None:
        """The loop of every worker; worker 0 also waits, logs, evaluates and saves."""
        if self.device == "cpu":
            torch.set_num_threads(1)
            torch.set_flush_denormal(True)
        for name, parameter in self.named.items():
            parameter.grad = self.gradients[rank][name]
        leader = Leader(self) if rank == 0 else None
        while True:
            if leader:
                leader.before_step()
            self.barrier.wait()
            if self.stopping.value:
                return
            self.work_step(rank)
            self.barrier.wait()
            if leader:
                leader.after_step()


class Leader:
    """What only the first worker does, between two steps."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.saved = self.evaluated = time.time()
        self.losses: list[Tensor] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signal)

    def _signal(self, *_: object) -> None:
        self.trainer.signalled.value = 1

    def before_step(self) -> None:
        trainer = self.trainer
        trainer.pause()
        trainer.next.value = 0
        self.began, self.cpu, trainer.paused = time.time(), time.process_time(), 0
        if trainer.signalled.value or trainer.finished():
            self._evaluate()
            trainer.save()
            trainer.stopping.value = 1

    def after_step(self) -> None:
        trainer, now = self.trainer, time.time()
        trainer.numbers["seconds"] += now - self.began - trainer.paused
        trainer.numbers["cpu_seconds"] += (time.process_time() - self.cpu) * trainer.workers
        self.losses.append(trainer.sums.sum(0))
        if trainer.numbers["steps"] % LOG_STEPS == 0:
            loss, balance, z_loss = torch.stack(self.losses).mean(0).tolist()
            norm = trainer.norms.sum().item() ** 0.5
            trainer.log(loss=loss, balance=balance, z_loss=z_loss, norm=norm, rate=trainer.rate())
            self.losses = []
        if now - self.evaluated > EVALUATE_SECONDS:
            self._evaluate()
        if now - self.saved > SAVE_SECONDS:
            trainer.save()
            self.saved = now

    def _evaluate(self) -> None:
        self.trainer.log(**self.trainer.data.evaluate(self.trainer.model))
        self.evaluated = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--from", dest="begin", type=Path, metavar="FOLDER", help="a checkpoint to begin with")
    parser.add_argument("--workers", type=int, default=2, help="processes, on a CPU (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=RATE, help="its peak, of a new training (default: %(default)s)")
    parser.add_argument("--decay", type=float, metavar="MILLION_TOKENS", help="begin the last phase")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    workers, device = (1, "cuda") if cuda else (arguments.workers, "cpu")
    trainer = Trainer(arguments.work, workers, device, arguments.begin, arguments.rate)
    if arguments.decay:
        trainer.start_decay(int(arguments.decay * 1e6))
    others = [
        trainer.context.Process(target=follow, args=(trainer, rank), daemon=True) for rank in range(1, trainer.workers)
    ]
    for process in others:
        process.start()
    trainer.run(0)
    for process in others:
        process.join()


def follow(trainer: Trainer, rank: int) -> None:
    """A further worker; the first one answers signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    trainer.run(rank)


if __name__ == "__main__":
    main()
