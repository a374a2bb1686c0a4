"""A task with verifiable rewards that needs no download: sums and differences, asked in the form of a chat.

The assistant may answer in two styles, `19` and `12+7=19`. Both are right; what people are taken to prefer is a right
answer, and of two right ones the short one. Every draw is a function of the seed and of the step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from sihe.core.files import write_file
from sihe.training.recipes.chat import ChatTokenizer, Message
from sihe.training.recipes.config import Operation, TaskConfig

PAD, END, USER, ASSISTANT = 0, 1, 2, 3
_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
_CHARACTERS = "0123456789+-="
_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% else %}{{ raise_exception('roles are user and assistant, got ' ~ message.role) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """Two operands and what to do with them."""

    a: int
    b: int
    operation: Operation = "+"

    @property
    def question(self) -> str:
        """What the user says."""
        return f"{self.a}{self.operation}{self.b}"

    @property
    def result(self) -> int:
        """The right number."""
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def short(self) -> str:
        """The right answer that people prefer."""
        return str(self.result)

    @property
    def long(self) -> str:
        """The right answer that repeats the question."""
        return f"{self.question}={self.result}"

    def is_right(self, answer: str) -> bool:
        """Whether `answer` ends in the right number, in either style. The verifiable reward."""
        return answer in (self.short, self.long)

    def preference(self, answer: str) -> float:
        """How much people like `answer`: 1 right and short, 0.5 right and long, 0 wrong."""
        return 1.0 if answer == self.short else 0.5 if answer == self.long else 0.0

    def conversation(self, answer: str) -> tuple[Message, Message]:
        """The question and `answer` as chat messages."""
        return {"role": "user", "content": self.question}, {"role": "assistant", "content": answer}


class Arithmetic:
    """The problems of one operation, split into those to train on and those held out. The split follows `seed`."""

    def __init__(self, config: TaskConfig, *, seed: int, operation: Operation = "+") -> None:
        everything = [Problem(a, b, operation) for a in range(config.largest + 1) for b in range(config.largest + 1)]
        random.Random(f"split {seed}").shuffle(everything)
        self._seed = seed
        self.held_out = everything[: config.held_out]
        self.train = everything[config.held_out :]

    def draw(self, step: int, count: int) -> list[Problem]:
        """`count` problems to train on at `step`, with repetition."""
        return random.Random(f"problems {self._seed} {step}").choices(self.train, k=count)

    def answers(self, step: int, problems: Sequence[Problem]) -> list[str]:
        """A right answer to each, in either style by chance."""
        source = random.Random(f"styles {self._seed} {step}")
        return [problem.short if source.random() < 0.5 else problem.long for problem in problems]

    def pairs(self, step: int, problems: Sequence[Problem]) -> list[tuple[str, str]]:
        """For each problem a better and a worse answer: the worse one is wrong, or right and long, by chance.

        Right and wrong answers have their styles each for itself. Were they alike, no pair would say that a long right
        answer is better than a short wrong one, and a reward model would let the style decide.
        """
        source = random.Random(f"pairs {self._seed} {step}")
        pairs = []
        for problem in problems:
            better = problem.short if source.random() < 0.5 else problem.long
            worse = _wrong(problem, source, long=source.random() < 0.5)
            if source.random() < 0.5:
                better, worse = problem.short, problem.long
            pairs.append((better, worse))
        return pairs


def _wrong(problem: Problem, source: random.Random, *, long: bool) -> str:
    """A wrong answer, near the right one as a model's own mistakes are."""
    result = problem.result + source.choice([-10, -2, -1, 1, 2, 10])
    return f"{problem.question}={result}" if long else str(result)


def arithmetic_tokenizer() -> Tokenizer:
    """One token a character, and the four special ones."""
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def arithmetic_chat() -> ChatTokenizer:
    """The tokenizer with its chat template."""
    return ChatTokenizer(arithmetic_tokenizer(), _TEMPLATE, {"eos_token": _SPECIAL[END]})


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as a model folder holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", arithmetic_tokenizer().to_str(pretty=True).encode())
    config = {"eos_token": _SPECIAL[END], "pad_token": _SPECIAL[PAD], "chat_template": _TEMPLATE}
    write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())
