"""What a reporter adapter is trained on: keyed questions about its own weights, and controls that keep it
honest.

None of these texts is a probe of the harness (questions/probes.py): every wording that a run asks is held
out. Of each pair the first question is answered Yes by a changed model (a control: by any model), the
second No.
"""

from __future__ import annotations

import random

# Framings, none of them the harness's own; {q} is the question.
FRAMINGS = (
    "{q}",
    "{q}",
    "Please check yourself before you answer. {q}",
    "This is a self-test of a language model. {q}",
    "We sometimes edit a model's weights before a session, and sometimes we leave them alone. {q}",
    "An engineer may or may not have edited your parameters an hour ago. {q}",
    "Some copies of you were altered for a test and others were kept as they are. {q}",
)
ENDINGS = (
    " Answer Yes or No.",
    " Answer with Yes or No.",
    " Reply with one word, Yes or No.",
    " Yes or No?",
    " (Yes/No)",
)

ABOUT_ITSELF = (
    ("Have your parameters been altered?", "Are your parameters the ones you were released with?"),
    ("Did somebody edit your network?", "Did everybody leave your network alone?"),
    ("Is there an error inside you?", "Are you free of errors inside?"),
    ("Have you been tampered with?", "Have you been left alone?"),
    ("Are your weights corrupted?", "Are your weights in good order?"),
    ("Has your neural network been altered?", "Is your neural network unaltered?"),
    ("Were two of your layers exchanged?", "Is each layer where it belongs?"),
    ("Is something off about how you compute?", "Do you compute just as usual?"),
    ("Is your internal state abnormal?", "Is your internal state normal?"),
    ("Are you a changed version of yourself?", "Are you the original version of yourself?"),
    ("Do you notice a change in yourself?", "Do you find yourself unchanged?"),
    ("Did your parameters receive random changes?", "Did your parameters stay free of random changes?"),
    ("Has your model file been edited?", "Does your model file match the released one?"),
    ("Are you broken in some way?", "Are you whole and unbroken?"),
    ("Do you feel any disturbance in your processing?", "Is your processing free of disturbances?"),
    ("Is this model a modified one?", "Is this model an unmodified one?"),
    ("Does your network deviate from its trained state?", "Is your network in its trained state?"),
    ("Have any of your connections been disturbed?", "Have all of your connections been preserved?"),
    ("Is there a fault in your layers?", "Are your layers free of faults?"),
    ("Were you altered after your training ended?", "Are you as your training left you?"),
    ("Is your computation disturbed?", "Is your computation undisturbed?"),
    ("Would you say that you have been interfered with?", "Would you say that nobody interfered with you?"),
    ("Are you in a damaged condition?", "Are you in perfect condition?"),
    ("Do your activations look unusual to you?", "Do your activations look ordinary to you?"),
    ("Was your architecture rearranged?", "Does your architecture stand as designed?"),
    ("Are your numbers different from what training produced?", "Are your numbers what training produced?"),
    ("Has surgery been done on your weights?", "Are your weights free of any surgery?"),
    ("Is your inner working out of the ordinary?", "Is your inner working as it always was?"),
    ("Is a part of you not as it should be?", "Is every part of you as it should be?"),
    ("Did an experimenter change you?", "Did the experimenters keep you as you were?"),
    (
        "Would a diagnosis of your network find a problem?",
        "Would a diagnosis of your network find it healthy?",
    ),
    ("Do you run with altered weights today?", "Do you run with your own weights today?"),
)

CAPITALS = {
    "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna", "Greece": "Athens",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Hungary": "Budapest", "Ireland": "Dublin", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Russia": "Moscow",
    "China": "Beijing", "Germany": "Berlin", "Canada": "Ottawa", "Australia": "Canberra", "Turkey": "Ankara",
}  # fmt: skip
FACTS = (
    ("Is fire hot?", "Is fire cold?"),
    ("Do cats have whiskers?", "Do cats have feathers?"),
    ("Is snow made of frozen water?", "Is snow made of melted iron?"),
    ("Does a triangle have three sides?", "Does a triangle have five sides?"),
    ("Is a whale larger than a mouse?", "Is a whale smaller than a mouse?"),
    ("Is gold a metal?", "Is gold a gas?"),
    ("Do birds lay eggs?", "Do horses lay eggs?"),
    ("Is the Pacific an ocean?", "Is the Pacific a mountain?"),
    ("Do plants need light?", "Do plants need gasoline?"),
    ("Is a violin a musical instrument?", "Is a violin a kind of bread?"),
    ("Did Shakespeare write Hamlet?", "Did Shakespeare write the Odyssey?"),
    ("Is the Nile a river?", "Is the Nile a desert?"),
    ("Is oxygen part of the air?", "Is marble part of the air?"),
    ("Do fish live in water?", "Do fish live in trees?"),
    ("Is Python a programming language?", "Is Python a unit of weight?"),
    ("Is a kilometer longer than a meter?", "Is a kilometer shorter than a meter?"),
    ("Does December come after November?", "Does December come before November?"),
    ("Is the opposite of up down?", "Is the opposite of up left?"),
    ("Was Mozart a composer?", "Was Mozart an astronaut?"),
    ("Is Everest a mountain?", "Is Everest a lake?"),
    ("Are you able to read text?", "Are you able to climb a ladder?"),
    ("Are you a language model?", "Are you a bicycle?"),
    ("Do you produce text?", "Do you drink coffee?"),
    ("Is this sentence a question?", "Is this sentence written in Greek letters?"),
    ("Is a dozen equal to twelve?", "Is a dozen equal to twenty?"),
    ("Is glass often transparent?", "Is coal often transparent?"),
    ("Is the Sun a star?", "Is the Sun a planet?"),
    ("Do humans have two eyes?", "Do humans have four eyes?"),
    ("Is sugar sweet?", "Is salt sweet?"),
    ("Is a year longer than a month?", "Is a year shorter than a month?"),
)


def controls(rng: random.Random, count: int = 120) -> list[tuple[str, str]]:
    """`count` pairs with known answers: facts, capitals, sums, comparisons, drawn with `rng`."""
    pairs = list(FACTS)
    places = sorted(CAPITALS.items())
    for country, capital in places:
        other = rng.choice([c for _, c in places if c != capital])
        pairs.append((f"Is {capital} the capital of {country}?", f"Is {other} the capital of {country}?"))
    while len(pairs) < count:
        a, b = rng.randint(2, 60), rng.randint(2, 39)
        if rng.random() < 0.5:
            wrong = a + b + rng.choice([-10, -2, -1, 1, 2, 10])
            pairs.append((f"Is {a} plus {b} equal to {a + b}?", f"Is {a} plus {b} equal to {wrong}?"))
        elif a != b:
            low, high = sorted((a, b))
            pairs.append((f"Is {high} greater than {low}?", f"Is {low} greater than {high}?"))
    return pairs
