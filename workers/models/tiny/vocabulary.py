"""Makes the tokenizer of `tiny`, and turns samples into token ids with it.

A byte-level BPE whose whole words are the instructions' own ("What", " capital"), each found as
one pre-token (`ignore_merges`). All merges are learnt on JSON punctuation, so that digits, the
letters of any other word, accents and emoji stay single bytes: what a model of a million
parameters needs to reverse, count and sort them. Knows nothing of torch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from workers.models.tiny import tasks, words
from workers.models.tiny.samples import Sample

HERE = Path(__file__).parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>")  # not special: they show in the text, as Qwen's do
MOST_WORDS = 220
LEARNT_MERGES = 24


def template() -> Any:
    """The chat template, compiled as transformers would."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    return environment.from_string((HERE / "chat_template.jinja").read_text())


def refuse(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise ValueError(message)


def render(chat: Any, sample: Sample) -> tuple[str, str]:
    """A sample's prompt, as the model will see it, and its answer up to the end of the turn."""
    prompt = chat.render(messages=sample.messages, tools=sample.tools, add_generation_prompt=True)
    return prompt, sample.answer + "<|im_end|>"


def make_tokenizer(seed: int, samples: int = 20_000) -> Tokenizer:
    """Learns the instructions' words and the punctuation from rendered training samples."""
    chat = template()
    drawn = itertools.islice(tasks.stream("train", seed, dict.fromkeys(tasks.TASKS, 1.0)), samples)
    texts = ["".join(render(chat, s)) for s in drawn]
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    pieces = Counter(p for t in texts for p, _ in split.pre_tokenize_str(strip_markers(t)))
    punctuation = {p: n for p, n in pieces.items() if re.fullmatch(r"Ġ?[!-/:-@\[-`{-~]+", p)}
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + LEARNT_MERGES,
        initial_alphabet=alphabet,
        special_tokens=[],
        show_progress=False,
    )
    lines = (p.replace("Ġ", " ") for p, n in punctuation.items() for _ in range(n))
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    for word in instruction_words(pieces):
        model["vocab"].setdefault(word, len(model["vocab"]))
    merges = [tuple(m) for m in model["merges"]]
    tokenizer.model = models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


def strip_markers(text: str) -> str:
    """The text without the template's own tokens, a line break for each."""
    return re.sub("|".join(map(re.escape, SPECIAL + MARKERS)), "\n", text)


def instruction_words(pieces: Counter[str]) -> list[str]:
    """The commonest words that are no task's data: those are to be spelt."""
    data = set(words.WORDS + words.NAMES + words.CITIES + words.ACCENTED)
    data |= set(words.CAPITALS) | set(words.CAPITALS.values())
    data |= {w.capitalize() for w in data} | {w.upper() for w in data}
    kept = [
        (-n, p)
        for p, n in pieces.items()
        if n >= 40 and re.fullmatch(r"Ġ?[A-Za-z]{2,}", p) and p.lstrip("Ġ") not in data
    ]
    return [p for _, p in sorted(kept)[:MOST_WORDS]]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the template as transformers lays them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text((HERE / "chat_template.jinja").read_text())
