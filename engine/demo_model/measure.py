"""How often the model answers exactly, by document length, on held-out names: the table of README.md.

    held-out document + questions ─┬─ exact_answers: one pass, greedy at every answer position (while training)
                                   └─ main: transformers' generate on CPU in float32, turn after turn

In one pass an answer counts when the most likely token at each of its positions, its end token included, is the right one:
that is when greedy decoding gives exactly that answer.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .document import write_document
from .rows import Encoder
from .text import Asker, Conversation, Exchange, Kind, about_document
from .tokenizer import END
from .words import Words

LENGTHS: tuple[int, ...] = (50, 200, 500, 1000, 1500, 2000)
KINDS: tuple[Kind, ...] = ("asked", "brief", "reverse", "pronoun", "also", "absent")
# The first question asks by name; those after it follow up.
PLAN: tuple[Kind, ...] = ("asked", "pronoun", "also", "asked", "reverse", "pronoun", "brief", "absent", "asked", "also")


class Tally:
    """Right and all answers: by document length for first and follow-up questions, and by kind."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, length: int, position: int, kind: Kind, is_right: bool) -> None:
        """Counts the answer number `position` of a conversation: under its place, its kind, and all."""
        for column in ("follow-up" if position else "first", kind, "all"):
            self.counts[length, column][0] += is_right
            self.counts[length, column][1] += 1

    def table(self) -> str:
        """A Markdown table, a row a document length; a cell is per cent exact (number asked)."""
        columns = [name for name in ("first", "follow-up", *KINDS) if any(key[1] == name for key in self.counts)]
        lines = [f"| document tokens | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for length in sorted({key[0] for key in self.counts}):
            cells = [self._cell(length, column) for column in columns]
            lines.append(f"| {length} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _cell(self, length: int, column: str) -> str:
        right, asked = self.counts[length, column]
        return f"{100 * right / asked:.1f} ({asked})" if asked else "-"


class Example(NamedTuple):
    """A held-out document of about `length` tokens and the questions about it."""

    length: int
    conversation: Conversation
    exchanges: list[Exchange]


def examples(encoder: Encoder, length: int, count: int, seed: int, plan: tuple[Kind, ...] = PLAN) -> Iterator[Example]:
    """Conversations whose invented names are all held out; the same for the same seed."""
    words = Words("held_out")
    for index in range(count):
        rng = Random(f"measure {seed} {length} {index}")
        document = write_document(rng, words, length, lambda text: len(encoder.text(" " + text)) - 1)
        asker = Asker(rng, words, document)
        exchanges = [asker.ask(kind) for kind in plan]
        yield Example(length, about_document(rng, document, exchanges), exchanges)


def exact_answers(
    predict: Callable[[Tensor], Tensor], encoder: Encoder, *, count: int, seed: int, rows: int = 16, lengths: tuple[int, ...] = LENGTHS
) -> Tally:
    """Counts exact answers in one pass a conversation; `predict` gives the most likely next token of ids [rows, length]."""
    tally = Tally()
    for length in lengths:
        held = [encoder.conversation(example.conversation) for example in examples(encoder, length, count, seed)]
        for first in range(0, len(held), rows):
            part = held[first : first + rows]
            padded = torch.full((len(part), max(len(ids) for ids, _ in part)), encoder.pad)
            for row, (ids, _) in enumerate(part):
                padded[row, : len(ids)] = torch.tensor(ids)
            is_right = (predict(padded).cpu().roll(1, dims=1) == padded).tolist()
            for row, (_, answers) in enumerate(part):
                asked = [answer for answer in answers if answer.kind != "talk"]
                for position, answer in enumerate(asked):
                    tally.add(length, position, answer.kind, all(is_right[row][answer.start : answer.end]))
    return tally


def generated_answers(folder: Path, *, lengths: tuple[int, ...], count: int, seed: int, plan: tuple[Kind, ...]) -> Tally:
    """Counts exact answers of transformers' greedy generate, float32 on CPU, the model's own answers standing in the chat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # nosec B615
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # nosec B615
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    tally = Tally()
    for length in lengths:
        for example in examples(encoder, length, count, seed, plan):
            messages: list[dict[str, str]] = []
            position = 0
            for turn in example.conversation.turns:
                if turn.kind is None or turn.kind == "talk":
                    messages.append({"role": turn.role, "content": turn.text})
                    continue
                reply = answer(model, tokenizer, messages)
                messages.append({"role": "assistant", "content": reply.removesuffix(END)})
                tally.add(length, position, turn.kind, reply == turn.text + END)
                position += 1
    return tally


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The model's greedy reply with its end token."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :])


def main() -> None:
    """Prints the table for a checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--count", type=int, default=40, help="documents of each length")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--turns", type=int, default=len(PLAN))
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally = generated_answers(
        options.folder, lengths=tuple(options.lengths), count=options.count, seed=options.seed, plan=PLAN[: options.turns]
    )
    sys.stdout.write(tally.table() + "\n")


if __name__ == "__main__":
    main()
