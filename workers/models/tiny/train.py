"""Trains `tiny` from a seed on the CPU: tokenizer, decoder, export, evaluation, model card.

    python -m workers.models.tiny.train --work build/tiny           # all of it
    python -m workers.models.tiny.train --work build/tiny --resume  # go on from the last checkpoint

Needs the extra `train` (torch) and, for the export, the model builder's environment (export.py).
The same seed gives the same stream of samples; the weights are not promised to be the same, bit for
bit, on another processor or build of torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from workers.models.tiny import model as decoder
from workers.models.tiny import tasks, vocabulary
from workers.models.tiny.card import Figures, card
from workers.models.tiny.export import evaluation_prompts, export
from workers.models.tiny.samples import Sample

SEED = 7
FIRST = {
    "addition": 0.21, "subtraction": 0.26, "reverse": 0.06, "upper": 0.05, "letters": 0.03,
    "sort": 0.06, "repeat": 0.06, "json": 0.07, "capital": 0.05, "tools": 0.06,
    "follow_up": 0.05, "count": 0.02, "choose": 0.01, "story": 0.005, "chat": 0.005,
}  # fmt: skip
THEN = {  # more of what the first phase left behind
    "addition": 0.20, "subtraction": 0.24, "reverse": 0.08, "upper": 0.03, "letters": 0.02,
    "sort": 0.10, "repeat": 0.05, "json": 0.06, "capital": 0.08, "tools": 0.05,
    "follow_up": 0.05, "count": 0.03, "choose": 0.004, "story": 0.003, "chat": 0.003,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """So many steps of so many samples, the learning rate going from `start` to `end` times."""

    steps: int
    samples: int
    shares: dict[str, float]
    start: float = 1.0
    end: float = 0.0


WARM_UP = 200
MATRIX_RATE, OTHER_RATE = 0.01, 0.002
BATCH_TOKENS = 4096
MACHINE = (  # of the shipped weights; change it where others are made
    "One thread of a virtual x86-64 server processor (AVX-512, AMX) busy with other work too, "
    "stopped and resumed once, between the phases"
)
PHASES = (
    Phase(1750, 128, FIRST, 1.0, 1.0),
    Phase(2500, 128, THEN, 1.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, S], right-padded; causal attention makes padding harmless
    rows: Tensor  # [N] index into B*S of the positions whose next token is an answer's
    targets: Tensor  # [N]


class Encoder:
    """Samples to token ids and the positions where the answer starts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.chat = vocabulary.template()

    def pair(self, sample: Sample) -> tuple[list[int], int]:
        prompt, answer = vocabulary.render(self.chat, sample)
        encode = self.tokenizer.encode
        start = encode(prompt, add_special_tokens=False).ids
        return start + encode(answer, add_special_tokens=False).ids, len(start)


def batches(pairs: list[tuple[list[int], int]], budget: int) -> Iterator[Batch]:
    """Pairs sorted by length and cut so that no padded batch is over `budget` tokens."""
    pairs = sorted(pairs, key=lambda p: len(p[0]))
    while pairs:
        size = 1
        while size < len(pairs) and (size + 1) * len(pairs[size][0]) <= budget:
            size += 1
        part, pairs = pairs[:size], pairs[size:]
        width = len(part[-1][0])
        ids = torch.zeros(size, width, dtype=torch.long)
        rows: list[int] = []
        targets: list[int] = []
        for i, (tokens, start) in enumerate(part):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            rows += range(i * width + start - 1, i * width + len(tokens) - 1)
            targets += tokens[start:]
        yield Batch(ids, torch.tensor(rows), torch.tensor(targets))


def answer_logits(forward: Any, model: decoder.Llama, batch: Batch) -> Tensor:
    """[N,V]; `forward` is the model, compiled or not."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = forward(batch.ids).flatten(0, 1)[batch.rows]
        return functional.linear(hidden, model.embed_tokens.weight).float()


@torch.no_grad()
def accuracy(model: decoder.Llama, encoder: Encoder, number: int) -> dict[str, float]:
    """Share of held-out answers of which every token is the likeliest after the ones before it:
    what greedy decoding gets right where one answer is."""
    scores = {}
    for task in tasks.EVALUATED:
        right = total = 0
        pairs = [encoder.pair(s) for s in tasks.evaluation(task, number)]
        for batch in batches(pairs, 8192):
            hit = answer_logits(model, model, batch).argmax(-1) == batch.targets
            owner = batch.rows // batch.ids.shape[1]
            wrong = torch.zeros(len(batch.ids)).index_add_(0, owner, (~hit).float())
            right += int((wrong == 0).sum())
            total += len(batch.ids)
        scores[task] = round(right / total, 3)
    return scores


def optimizers(model: decoder.Llama) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int) -> float:
    """The learning rate's factor at a step: warm-up, then each phase's straight line."""
    first = 0
    for phase in PHASES:
        if step < first + phase.steps:
            part = (step - first) / phase.steps
            return min(1.0, (step + 1) / WARM_UP) * (phase.start + (phase.end - phase.start) * part)
        first += phase.steps
    return 0.0


def sample_stream(step: int) -> Iterator[list[Sample]]:
    """The samples of each step from `step` on. Every step has its own seed: resuming is exact."""
    first = 0
    for phase in PHASES:
        for own in range(max(step, first), first + phase.steps):
            drawn = tasks.stream("train", SEED * 1_000_000 + own, phase.shares)
            yield list(itertools.islice(drawn, phase.samples))
        first += phase.steps


class Training:
    """The weights, the optimizers' states and how far they have come."""

    def __init__(self, tokenizer: Tokenizer, work: Path) -> None:
        torch.manual_seed(SEED)
        size = -(-tokenizer.get_vocab_size() // 8) * 8
        self.model = decoder.Llama(decoder.Shape(size))
        self.forward = torch.compile(self.model, dynamic=True)
        self.optimizers = optimizers(self.model)
        self.rates = [g["lr"] for o in self.optimizers for g in o.param_groups]
        self.encoder = Encoder(tokenizer)
        self.path = work / "checkpoint.pt"
        self.step, self.seconds = 0, 0.0

    def load(self) -> None:
        state = torch.load(self.path)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.path)

    def advance(self, samples: list[Sample]) -> float:
        """One step; the loss is the mean over the answers' tokens."""
        pairs = [self.encoder.pair(s) for s in samples]
        answers = sum(len(tokens) - start for tokens, start in pairs)
        total = 0.0
        for batch in batches(pairs, BATCH_TOKENS):
            logits = answer_logits(self.forward, self.model, batch)
            loss = functional.cross_entropy(logits, batch.targets, reduction="sum") / answers
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * rate(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def run(self) -> None:
        """To the end of the last phase, with a checkpoint and a line of scores every 250 steps."""
        total, losses = sum(p.steps for p in PHASES), []
        for samples in sample_stream(self.step):
            began = time.monotonic()
            losses.append(self.advance(samples))
            self.seconds += time.monotonic() - began
            if self.step % 50 == 0:
                mean = sum(losses) / len(losses)
                print(f"step={self.step}/{total} loss={mean:.4f} seconds={self.seconds:.0f}")
                losses.clear()
            if self.step % 250 == 0 or self.step == total:
                self.save()
                scores = accuracy(self.model, self.encoder, 100)
                print(f"step={self.step} {json.dumps(scores)}", flush=True)


def replay() -> tuple[int, int]:
    """How many samples the training stream has, and how many of them have an evaluated prompt."""
    asked = {prompt for prompt, _ in evaluation_prompts()}
    seen = overlap = 0
    chat = vocabulary.template()
    for samples in sample_stream(0):
        seen += len(samples)
        overlap += sum(vocabulary.render(chat, s)[0] in asked for s in samples)
    return seen, overlap


def figures(training: Training) -> Figures:
    seen, overlap = replay()
    return Figures(
        parameters=sum(p.numel() for p in training.model.parameters()),
        tokens=training.encoder.tokenizer.get_vocab_size(),
        seed=SEED,
        phases=[(p.steps, p.samples, p.start, p.end, p.shares) for p in PHASES],
        rates=(MATRIX_RATE, OTHER_RATE),
        warm_up=WARM_UP,
        machine=MACHINE,
        minutes=training.seconds / 60,
        torch=torch.__version__,
        seen=seen,
        overlap=overlap,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the HF folder")
    parser.add_argument("--output", type=Path, default=vocabulary.HERE, help="the ONNX folder")
    parser.add_argument("--builder-python", default=sys.executable, help="has onnxruntime-genai")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.work / "hf"
    tokenizer = vocabulary.make_tokenizer(SEED)
    vocabulary.save_tokenizer(tokenizer, folder)
    training = Training(tokenizer, options.work)
    if options.resume:
        training.load()
    training.run()
    decoder.save(training.model, folder, tokenizer.get_vocab())
    check, scores = export(folder, options.output, options.builder_python)
    text = card(figures(training), check, scores, options.output)
    (options.output / "README.md").write_text(text)


if __name__ == "__main__":
    main()
