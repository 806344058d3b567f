"""The tasks of one question and one answer: each a function of a random generator.

Knows nothing of the split, of tools or of earlier turns.
"""

from __future__ import annotations

import json
import random
from typing import Any

from workers.models.tiny.samples import (
    Sample,
    draw_city,
    draw_name,
    draw_operand,
    draw_word,
    sample_of,
)
from workers.models.tiny.words import (
    ACCENTED,
    ACCENTS,
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    EMOJI,
    FRUITS,
    NAMES,
    PLACES,
    PLAIN,
    THINGS,
    VERBS,
    WEATHER,
)

ADD = ("What is {a} + {b}?",) * 5 + (
    "What is {a} plus {b}?", "{a} + {b}", "{a} + {b} = ?", "Add {a} and {b}.",
    "Calculate {a} + {b}.", "How much is {a} + {b}?", "Please compute {a} + {b}.",
)  # fmt: skip
SUBTRACT = ("What is {a} - {b}?",) * 5 + (
    "What is {a} minus {b}?", "{a} - {b}", "{a} - {b} = ?", "Calculate {a} - {b}.",
    "How much is {a} - {b}?", "Please compute {a} - {b}.", "Take {b} from {a}.",
)  # fmt: skip


def addition(rng: random.Random) -> Sample:
    a, b = draw_operand(rng), draw_operand(rng)
    prompt = rng.choice(ADD).format(a=a, b=b)
    return sample_of("addition", prompt, f"{a} + {b} = {a + b}", f"{min(a, b)} {max(a, b)}")


def subtraction(rng: random.Random) -> Sample:
    a, b = draw_operand(rng), draw_operand(rng)
    prompt = rng.choice(SUBTRACT).format(a=a, b=b)
    return sample_of("subtraction", prompt, f"{a} - {b} = {a - b}", f"{a} {b}")


def reverse(rng: random.Random) -> Sample:
    word = draw_word(rng)
    forms = ("Reverse the word: {w}", "Reverse the word: {w}", "Reverse: {w}", 'Reverse "{w}".',
             "Write {w} backwards.")  # fmt: skip
    return sample_of("reverse", rng.choice(forms).format(w=word), word[::-1], word)


def upper(rng: random.Random) -> Sample:
    word = draw_word(rng) if rng.random() < 0.7 else f"{draw_word(rng)} {draw_word(rng)}"
    forms = ("Write in upper case: {w}", "Write in upper case: {w}", "Upper case: {w}",
             'Write "{w}" in capital letters.')  # fmt: skip
    return sample_of("upper", rng.choice(forms).format(w=word), word.upper(), word)


def letters(rng: random.Random) -> Sample:
    word = draw_word(rng)
    forms = ('How many letters are in "{w}"?', 'How many letters are in "{w}"?',
             "How many letters does {w} have?", "Count the letters: {w}")  # fmt: skip
    return sample_of("letters", rng.choice(forms).format(w=word), str(len(word)), word)


def sort_digits(rng: random.Random) -> Sample:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 8)))
    forms = ("Sort the digits: {d}", "Sort the digits: {d}", "Sort the digits of {d}.",
             "Write the digits of {d} in order.")  # fmt: skip
    return sample_of("sort", rng.choice(forms).format(d=digits), "".join(sorted(digits)), digits)


def repeat(rng: random.Random) -> Sample:
    def piece() -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(ACCENTED)
        if kind < 0.6:
            return "".join(rng.choice(EMOJI) for _ in range(rng.randint(1, 3)))
        if kind < 0.8:
            return rng.choice(PLAIN)
        letters = list(draw_word(rng))
        letters[rng.randrange(len(letters))] = rng.choice(ACCENTS)
        return "".join(letters)

    text = " ".join(piece() for _ in range(rng.randint(2, 5)))
    text += rng.choice(("", "", "", "!", "."))
    forms = ("Repeat exactly: {t}", "Repeat exactly: {t}", "Repeat: {t}", "Say: {t}")
    return sample_of("repeat", rng.choice(forms).format(t=text), text, text)


def extract(rng: random.Random) -> Sample:
    if rng.random() < 0.65:
        name, age, city = draw_name(rng), rng.randint(1, 99), draw_city(rng)
        facts: dict[str, Any] = {"name": name, "age": age, "city": city}
        sentence = rng.choice((
            f"{name} is {age} years old and lives in {city}.",
            f"{name}, aged {age}, lives in {city}.",
            f"{name} lives in {city} and is {age} years old.",
            f"My name is {name}, I am {age} and I live in {city}.",
        ))  # fmt: skip
    else:
        item = rng.choice([*THINGS, draw_word(rng)])
        color, price = rng.choice(COLORS), rng.randint(1, 99)
        facts = {"item": item, "color": color, "price": price}
        sentence = rng.choice((
            f"The {color} {item} costs {price} euros.",
            f"A {color} {item} is sold for {price} euros.",
            f"She paid {price} euros for the {color} {item}.",
        ))  # fmt: skip
    keys = list(facts)
    if rng.random() < 0.5:
        rng.shuffle(keys)
        keys = keys[: rng.randint(1, 3)]
    word = "keys" if len(keys) > 1 else "key"
    form = rng.choice(("Extract as JSON with {w} {k}: {s}",) * 3 + ("{s} Give JSON with {w} {k}.",))
    answer = json.dumps({k: facts[k] for k in keys}, ensure_ascii=False)
    return sample_of("json", form.format(w=word, k=", ".join(keys), s=sentence), answer)


def capital(rng: random.Random) -> Sample:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.2:
        back = ("Which country has the capital {c}?", "{c} is the capital of which country?")
        return sample_of("capital", rng.choice(back).format(c=city), country)
    forms = ("What is the capital of {c}?", "What is the capital of {c}?", "Capital of {c}?",
             "Name the capital of {c}.", "Which city is the capital of {c}?",
             "Tell me the capital of {c}.", "What is the capital city of {c}?")  # fmt: skip
    return sample_of("capital", rng.choice(forms).format(c=country), city)


def count(rng: random.Random) -> Sample:
    low = rng.randint(0, 90)
    high = low + rng.randint(2, 9 if rng.random() < 0.8 else 24)
    prompt = rng.choice(("Count from {a} to {b}.", "Count from {a} to {b}")).format(a=low, b=high)
    return sample_of("count", prompt, ", ".join(map(str, range(low, high + 1))), f"{low} {high}")


def choose(rng: random.Random) -> Sample:
    """Many answers are right: what a temperature is for."""
    kind, options = rng.choice((
        ("a color", COLORS), ("a fruit", FRUITS), ("an animal", ANIMALS), ("a city", CITIES),
        ("a number from 1 to 9", list("123456789")), ("a name", NAMES),
    ))  # fmt: skip
    verb = rng.choice(("Name", "Pick", "Choose", "Give me", "Tell me"))
    end = rng.choice((".", "", ", please."))
    return sample_of("choose", f"{verb} {kind}{end}", rng.choice(options), accepted=tuple(options))


def story(rng: random.Random) -> Sample:
    """Free text of a few sentences; trained on for long answers, not evaluated."""
    hero, name = rng.choice(ANIMALS), rng.choice(NAMES)
    lines = [f"Once there was a {rng.choice(ADJECTIVES)} {hero} called {name}."]
    for _ in range(rng.randint(2, 5)):
        thing = f"a {rng.choice(COLORS)} {rng.choice(THINGS)}"
        lines.append(rng.choice((
            f"One day {name} {rng.choice(VERBS)} {thing} in the {rng.choice(PLACES)}.",
            f"The {hero} met {rng.choice(NAMES)} and was {rng.choice(ADJECTIVES)}.",
            f"Then {name} {rng.choice(VERBS)} {thing}.",
            f"It was {rng.choice(WEATHER)} in the {rng.choice(PLACES)}.",
        )))  # fmt: skip
    lines.append(rng.choice((f"{name} was {rng.choice(ADJECTIVES)} again.", "The end.")))
    about = rng.choice(("Tell me a story.", "Write a story.", f"Tell me a story about a {hero}.",
                        f"Write a short story about {name} the {hero}."))  # fmt: skip
    return sample_of("story", about, " ".join(lines), f"{about} {' '.join(lines)}")


def chat(rng: random.Random) -> Sample:
    """Small talk, trained on so that a greeting gets one; not evaluated."""
    prompts, answer = rng.choice((
        (("Hello!", "Hello", "Hi", "Hi!", "Hey", "Good morning!"), "Hello! How can I help?"),
        (("Who are you?", "What are you?", "What is your name?"),
         "I am tiny, a small language model."),
        (("Thank you!", "Thanks", "Thanks!", "Thank you."), "You are welcome."),
        (("What can you do?", "Help"),
         "I can add, subtract, sort, reverse, count, extract JSON and call tools."),
        (("How are you?", "How are you today?"), "I am fine, thank you."),
        (("Bye", "Goodbye!", "Good night."), "Goodbye!"),
    ))  # fmt: skip
    prompt = rng.choice(prompts)
    return sample_of("chat", prompt, answer)
