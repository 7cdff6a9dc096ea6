"""Write the examination questions that the lm-eval tasks in `tasks/` ask.

They are held-out problems, chosen by a fixed seed.

    python make_tasks.py

One JSON line per question. `generate` tasks ask for the answer; `choice` tasks offer four answers
of which one is right, to be judged by their log probabilities.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from problems import DOMAINS, Problem, examination

TASKS = Path(__file__).parent / "tasks"
QUESTIONS, SEED = 200, 2
CHOICES = 4
CHOICE_DOMAINS = ("sum", "brackets")


def wrong_answer(domain: str, answer: str, rng: random.Random) -> str:
    """Return an answer as long as the right one, with one or two signs changed.

    They are of the domain's alphabet.
    """
    alphabet = {"sum": "0123456789", "brackets": ")]}>"}[domain]
    signs = list(answer)
    for place in rng.sample(range(len(signs)), min(len(signs), rng.randint(1, 2))):
        signs[place] = rng.choice(alphabet)
    return "".join(signs)


def choice(domain: str, problem: Problem) -> dict:
    """Make a question with four different answers in an order drawn by the prompt."""
    rng = random.Random(problem.prompt)
    answers = {problem.answer}
    while len(answers) < CHOICES:
        answers.add(wrong_answer(domain, problem.answer, rng))
    choices = sorted(answers)
    rng.shuffle(choices)
    return {"prompt": problem.prompt, "choices": choices, "label": choices.index(problem.answer)}


def questions() -> dict[str, list[dict]]:
    """Return the lines of each file: file name -> lines."""
    found = {}
    for domain in DOMAINS:
        chosen = examination(domain, QUESTIONS, SEED)
        found[f"{domain}.jsonl"] = [{"prompt": p.prompt, "answer": p.answer} for p in chosen]
        if domain in CHOICE_DOMAINS:
            found[f"{domain}_choice.jsonl"] = [choice(domain, p) for p in chosen]
    return found


def main() -> None:
    TASKS.mkdir(exist_ok=True)
    for name, lines in questions().items():
        (TASKS / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{TASKS / name}: {len(lines)} questions")


if __name__ == "__main__":
    main()
