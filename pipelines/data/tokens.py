"""A row as its model reads it: its tokens, and which of them a training predicts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.errors import InputError
from components.config.params import Config
from components.dataset.chat import choose_template, encode, encode_conversation, load_tokenizer, with_date
from components.dataset.records import SPLITS, Instruction, Preference, iter_lines
from components.sources.base_model import EMBEDDED

NUMBER_DIGITS = 7
"""Most digits of a row's number; what is longer is the beginning of an id."""


@dataclass(frozen=True)
class Token:
    """A token of a row."""

    part: str
    """`prompt`, `chosen`, `rejected` or `response`."""
    id: int
    text: str
    predicted: bool
    """Whether a loss is taken on it."""


def find_row(folder: Path, kind: type[Preference | Instruction], which: str) -> tuple[str, Preference | Instruction]:
    """A row of a data set and its split.

    Args:
        folder: the data set's folder.
        kind: its schema.
        which: a number in the training split, from 1, or the beginning of an id.

    Raises:
        InputError: there is none, or several ids begin so.
    """
    number = int(which) if which.isdecimal() and len(which) <= NUMBER_DIGITS else 0
    found: list[tuple[str, Any]] = []
    for split in ("train",) if number else SPLITS:
        for position, (_, raw) in enumerate(iter_lines(folder / f"{split}.jsonl"), start=1):
            if position == number or (not number and str(raw.get("id")).startswith(which)):
                found.append((split, raw))
    if len(found) != 1:
        place = f"{folder}/train.jsonl" if number else str(folder)
        raise InputError(
            f"row {which}: {len(found)} rows of {place}; expected one, by its number among the training rows or by the"
            " beginning of its id"
        )
    return found[0][0], kind.model_validate(found[0][1])


def tokens_of(config: Config, project: Path, row: Preference | Instruction) -> list[Token]:
    """The tokens of a row's prompt, and of each of its answers after it.

    Args:
        config: names the base model, the template and the turns that are trained.
        project: the project's folder.
        row: a pair or an instruction.

    Raises:
        InputError: the base model is not a folder of this machine, or its template does not fit.
    """
    base = project / "data" / "base_model" if config.model.base == EMBEDDED else project / config.model.base
    if not base.is_dir():
        raise InputError(
            f"model.base={config.model.base}: tokens need the model's tokenizer in a folder of this machine; name one"
            " with --set model.base=FOLDER"
        )
    tokenizer = load_tokenizer(base)
    template = choose_template(config.model.chat_template, tokenizer.chat_template)
    tokenizer.chat_template = with_date(template, config.model.template_date)
    trained: set[int] = set()
    if isinstance(row, Instruction) and config.sft.train_on_turns == "all":
        prompt, response, ranges = encode_conversation(tokenizer, row.prompt, row.response)
        trained = {position for start, stop in ranges for position in range(start, stop)}
        answers = {"response": response}
    else:
        texts = (
            {"response": row.response}
            if isinstance(row, Instruction)
            else {"chosen": row.chosen, "rejected": row.rejected}
        )
        encoded = {name: encode(tokenizer, row.prompt, text) for name, text in texts.items()}
        prompt = next(iter(encoded.values()))[0]
        answers = {name: ids for name, (_, ids) in encoded.items()}
    tokens = [Token("prompt", id_, tokenizer.decode([id_]), place in trained) for place, id_ in enumerate(prompt)]
    for name, ids in answers.items():
        tokens += [Token(name, id_, tokenizer.decode([id_]), True) for id_ in ids]
    return tokens
