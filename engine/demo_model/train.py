"""Trains the demo model from nothing: tokenizer, weights, accuracy table; one GPU, some minutes.

python -m halfmoon.engine.demo_model.train --out DIR [--steps N] [--budget-s S]

tokenizer ─► batches (worker processes) ─► Muon on the layers' matrices, AdamW on the rest ─► DIR: a checkpoint folder
             length curriculum by step      warm-up, constant, linear to nothing              every --save-every-s
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Subset

from .llama import Llama, Shape
from .measure import exact_answers
from .muon import Muon
from .rows import Batches, Encoder
from .tokenizer import save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 200
DECAY_SHARE = 0.35
"""The last part of training, in which the learning rate falls to nothing."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    out: Path
    """Checkpoint folder to write."""
    steps: int
    """Steps to train at most."""
    budget_s: float
    """Seconds to train at most; the learning rate falls in time for whichever comes first."""
    batch_tokens: int
    lr: float
    seed: int
    workers: int
    resume: Path | None
    """A file that an earlier run wrote with --state: weights, optimizers and step."""
    state: Path | None
    """Where to keep weights, optimizers and step."""
    save_every_s: float
    report_every: int
    count: int
    """Held-out documents of each length in the last table."""
    compile: bool
    """Compile the layer; worth its ten seconds on a GPU."""
    shape: Shape


class Trainer:
    """The model, its two optimizers and the step they are at."""

    def __init__(self, options: Options, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.device = device
        self.step = 0
        self.started = time.monotonic()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = Llama(options.shape, dtype, compiled=options.compile).to(device)
        named = list(self.model.weights.items())
        layers = [weight for name, weight in named if weight.dim() == 2 and "embed" not in name]
        others = [weight for name, weight in named if weight.dim() == 1 or "embed" in name]
        self.optimizers: list[Optimizer] = [
            Muon(layers, lr=options.lr),
            AdamW(others, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"),
        ]
        if options.resume is not None:
            self._load_state(options.resume)

    def train(self, batches: Batches, tokenizer: Tokenizer) -> None:
        """Steps until the steps or the seconds are used up."""
        loader = DataLoader(
            Subset(batches, range(self.step, self.options.steps)),
            batch_size=None,
            num_workers=self.options.workers,
            prefetch_factor=8 if self.options.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        self.started = saved = time.monotonic()
        losses: list[Tensor] = []
        for ids, weights in loader:
            losses.append(self._step(ids.to(self.device, non_blocking=True).long(), weights.to(self.device, non_blocking=True)))
            if self.step % self.options.report_every == 0:
                loss = torch.stack(losses).mean().item()
                seconds = time.monotonic() - self.started
                logger.info("step %d  %.0f s  loss %.4f  row %d  lr x %.2f", self.step, seconds, loss, ids.shape[1], self._pace())
                losses.clear()
            if time.monotonic() - saved > self.options.save_every_s:
                self.save(tokenizer)
                logger.info("step %d  exact answers on held-out names\n%s", self.step, self.table(tokenizer, 24))
                saved = time.monotonic()
            if self._progress() >= 1:
                break
        self.save(tokenizer)

    def table(self, tokenizer: Tokenizer, count: int) -> str:
        """The accuracy table with the weights rounded as they are saved."""
        held = {name: tensor.clone() for name, tensor in self.model.tensors().items()}
        self.model.load_tensors({name: tensor.bfloat16() for name, tensor in held.items()})
        dtype, self.model.dtype = self.model.dtype, torch.float32
        tally = exact_answers(lambda ids: self.model.predict(ids.to(self.device)), Encoder(tokenizer), count=count, seed=5)
        self.model.dtype = dtype
        self.model.load_tensors(held)
        return tally.table()

    def save(self, tokenizer: Tokenizer) -> None:
        """Writes the checkpoint folder, and the state where one is kept."""
        write_checkpoint(self.options.out, self.model.shape, self.model.tensors(), tokenizer)
        if self.options.state is not None:
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            torch.save({"step": self.step, "weights": self.model.tensors(), "optimizers": optimizers}, self.options.state)

    def _step(self, ids: Tensor, weights: Tensor) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * self._pace()
        loss = self.model.loss(ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.detach()

    def _progress(self) -> float:
        return max(self.step / self.options.steps, (time.monotonic() - self.started) / self.options.budget_s)

    def _pace(self) -> float:
        return max(0.0, min(1.0, (self.step + 1) / WARM_UP_STEPS, (1 - self._progress()) / DECAY_SHARE))

    def _load_state(self, file: Path) -> None:
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.model.load_tensors(state["weights"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)


def write_checkpoint(folder: Path, shape: Shape, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """The folder as transformers loads it, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(tokenizer)
    ids = {"bos_token_id": encoder.begin, "eos_token_id": encoder.end, "pad_token_id": encoder.pad}
    config = shape.hf_config(bos=encoder.begin, eos=encoder.end, pad=encoder.pad)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({**ids, "do_sample": False, "max_new_tokens": 64}, indent=2) + "\n")
    save_file(
        {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    save_tokenizer(tokenizer, folder)


def parse() -> Options:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=12)
    for name in ("--resume", "--state"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--save-every-s", type=float, default=60.0)
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    given = vars(parser.parse_args())
    layers, hidden = given.pop("layers"), given.pop("hidden")
    shape = Shape(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=hidden // 64)
    return Options(**given, shape=shape)


def main() -> None:
    """Trains, saves and prints the accuracy table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, options.out)
    batches = Batches(str(options.out / "tokenizer.json"), options.seed, options.steps, options.batch_tokens)
    trainer = Trainer(options, device)
    trainer.train(batches, tokenizer)
    logger.info("step %d, %.0f s; exact answers on held-out names", trainer.step, time.monotonic() - trainer.started)
    logger.info("%s", trainer.table(tokenizer, options.count))


if __name__ == "__main__":
    main()
