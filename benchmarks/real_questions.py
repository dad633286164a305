"""Questions for the real pair: plain sentences over subjects; held-out ones share no subject."""

import random

FORMS = (
    "What is {0}?",
    "Explain {0} to a child in two sentences.",
    "Name three facts about {0}.",
    "Why does {0} matter?",
    "Write one sentence about {0}.",
    "How would you describe {0} to a friend?",
    "What do most people not know about {0}?",
    "Give one example that involves {0}.",
)
SUBJECTS = (
    *("rain", "copper", "a compiler", "yeast", "the moon", "chess", "a violin", "salt", "a river"),
    *("electricity", "tea", "a glacier", "honey", "a bicycle", "the heart", "glass", "paper"),
    *("a volcano", "cotton", "gravity", "a bridge", "coffee", "a library", "the sun", "wool"),
    *("a magnet", "rice", "a desert", "steam", "a clock", "a forest", "bread"),
)
HELD_OUT_SUBJECTS = (
    "snow",
    "iron",
    "a lighthouse",
    "cheese",
    "a comet",
    "a piano",
    "sand",
    "a map",
)
HELD_OUT = tuple(
    FORMS[(number + turn) % len(FORMS)].format(subject)
    for turn in range(4)
    for number, subject in enumerate(HELD_OUT_SUBJECTS)
)


def questions(seed: int) -> list[str]:
    """All questions of training, in the order of a seed."""
    found = [form.format(subject) for form in FORMS for subject in SUBJECTS]
    random.Random(seed).shuffle(found)
    return found
