"""What every objective draws on: the problems of a seed as token sequences, and how a policy does on held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from sihe.models.decoder import Decoder
from sihe.training.ranks import Ranks
from sihe.training.recipes.arithmetic import END, Arithmetic, Problem
from sihe.training.recipes.chat import ChatTokenizer, MaskedTokens
from sihe.training.recipes.sampling import sample_completions
from sihe.training.recipes.sequences import Padded, padded
from sihe.training.recipes.types import Completion, Sampling

_Item = TypeVar("_Item")
_JUDGED_TOKENS = 10  # "99+99=198" and its end
_JUDGED_SAMPLES = 8  # of each held-out problem: what the draws add to the error is then below what the problems do


@dataclass(frozen=True)
class Examined:
    """Problems with a policy's answer to each."""

    asked: Sequence[Problem]
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Completion]


class Lesson:
    """The problems of one operation for one rank. `context` is the longest sequence in tokens."""

    def __init__(self, chat: ChatTokenizer, problems: Arithmetic, ranks: Ranks, *, context: int, seed: int) -> None:
        self.chat = chat
        self.ranks = ranks
        self.seed = seed
        self.held_out = problems.held_out
        self._problems = problems
        self._context = context
        # A template is slow next to a model of this size, and the same few thousand conversations come again.
        self._encode = lru_cache(maxsize=1 << 15)(self._encode_once)
        self._prompt = lru_cache(maxsize=1 << 14)(self._prompt_once)

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This rank's items of a global batch."""
        return items[self.ranks.rank :: self.ranks.world_size]

    def problems(self, step: int, count: int) -> Sequence[Problem]:
        """This rank's share of `count` problems of `step`."""
        return self.share(self._problems.draw(step, count))

    def problems_of_all(self, step: int, count: int) -> Sequence[Problem]:
        """The `count` problems of `step`, the same on every rank."""
        return self._problems.draw(step, count)

    def answered(self, step: int, count: int) -> Padded:
        """This rank's share of `count` right conversations of `step`."""
        problems = self._problems.draw(step, count)
        answers = self._problems.answers(step, problems)
        return self.conversations(self.share(problems), self.share(answers))

    def pairs(self, step: int, count: int) -> tuple[Padded, Padded]:
        """This rank's share of `count` pairs of `step`: the better conversations and the worse ones."""
        problems = self._problems.draw(step, count)
        return self._paired(self.share(problems), self.share(self._problems.pairs(step, problems)))

    def held_out_answered(self) -> Padded:
        """A right conversation for each held-out problem."""
        return self.conversations(self.held_out, self._problems.answers(-1, self.held_out))

    def held_out_pairs(self) -> tuple[Padded, Padded]:
        """A pair for each held-out problem."""
        return self._paired(self.held_out, self._problems.pairs(-1, self.held_out))

    def conversations(self, problems: Sequence[Problem], answers: Sequence[str]) -> Padded:
        """Each problem with its answer, the answer's tokens marked."""
        return padded([self._encode(problem, answer) for problem, answer in zip(problems, answers, strict=True)])

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Each question, up to where the assistant speaks."""
        return [self._prompt(problem) for problem in problems]

    def documents(self, problems: Sequence[Problem]) -> Padded:
        """Each problem as an equation between two end tokens: every token but the first counts."""
        texts = [(END, *self._ids(problem.long), END)[: self._context] for problem in problems]
        return padded([MaskedTokens(text, (False,) + (True,) * (len(text) - 1)) for text in texts])

    def text(self, completion: Completion) -> str:
        """What was said. One that was cut off keeps a mark that no answer holds, and is right in no style."""
        ended = completion.token_ids[-1:] == (END,)
        said: str = self.chat.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
        return said if ended else said + "…"

    def examine(self, policy: Decoder, *, temperature: float = 1.0, is_chat: bool = True) -> Examined:
        """Answers to the held-out problems, eight of each, or the greedy one at temperature 0.

        Without `is_chat` the question is an equation to be ended, for a model that knows documents only.
        The random numbers are the same at every call, so that two policies differ by their weights.
        """
        asked = tuple(self.held_out) * (_JUDGED_SAMPLES if temperature > 0 else 1)
        sampling = Sampling(_JUDGED_TOKENS, temperature)
        prompts = self.prompts(asked) if is_chat else [[END, *self._ids(f"{each.question}=")] for each in asked]
        return Examined(asked, prompts, sample_completions(policy, prompts, sampling, seed=self.seed, end=END))

    def judge(self, examined: Examined) -> dict[str, float]:
        """How the answers do: the shares that are right, that are short, and the mean preference."""
        judged = [(p, self.text(made)) for p, made in zip(examined.asked, examined.completions, strict=True)]
        return {
            "accuracy": sum(problem.is_right(text) for problem, text in judged) / len(judged),
            "preference": sum(problem.preference(text) for problem, text in judged) / len(judged),
            "short": sum("=" not in text for _, text in judged) / len(judged),
        }

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.chat.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_once(self, problem: Problem, answer: str) -> MaskedTokens:
        return self.chat.encode(problem.conversation(answer), max_tokens=self._context)

    def _prompt_once(self, problem: Problem) -> list[int]:
        return self.chat.prompt(problem.conversation("")[:1])

    def _paired(self, problems: Sequence[Problem], pairs: Sequence[tuple[str, str]]) -> tuple[Padded, Padded]:
        better, worse = zip(*pairs, strict=True)
        return self.conversations(problems, better), self.conversations(problems, worse)
