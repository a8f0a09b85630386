"""Tokenization of messages with the model's chat template; the only place where text becomes token ids.

Special tokens come from the template alone. Where the text of a message has the name of one in it, such as
`<|im_end|>`, the name is encoded as the characters it consists of: it can neither end a turn nor begin another one.
"""

import copy
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from components.common.errors import InputError
from components.common.files import digest
from components.common.limits import time_limit
from components.dataset.records import Message

TEMPLATES = Path(__file__).parent / "templates"
MODEL_TEMPLATE = "model"
"""Name of the template that came with the model."""
MAX_TEMPLATE_BYTES = 8000
"""Longest template that may travel as a value; Kubeflow Pipelines takes 10,000 bytes for all that a step is given."""
MAX_TEMPLATE_CHARACTERS = 200_000
PROBE = "components.dataset.template_probe"
PROBE_LIMIT_S, PROBE_CPU_S, PROBE_BYTES = 60.0, 10, 2**30
"""Limits on rendering a template for the first time: wall and CPU time, and memory beyond that of Python itself."""
RENDER_LIMIT_S, RENDER_ONE_LIMIT_S = 60.0, 0.1
"""Limits on rendering conversations, in all and for each; one takes about 0.1 ms."""
REFUSALS = (KeyError, TypeError, ValueError, AttributeError, TemplateError)
OPENS_THOUGHT = re.compile(r"<(?P<tag>think|thinking|thought|reasoning)>\s*$")
"""End of a prompt after which a model writes its thoughts."""
SEEN = ("Kq", "Zv 7", "好的", "1", "The sky")
"""Short texts on which the habits of a tokenizer and its template are seen."""
CLOCK = "strftime_now"
"""What a template calls for today's date."""
READS_CLOCK = re.compile(CLOCK + r"""\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
CLOCK_KNOWN = re.compile(CLOCK + r"\s+is\s+(?P<not>not\s+)?defined")
SETS_DATE = re.compile(r"\bset\s+date_string\b")
CHANGES_PROMPT = "the chat template renders the prompt differently once an answer follows; choose another one"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a local model folder, chat template included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Llama 2's switch for the space before a piece of text; transformers reads it but does not save it.
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def is_template(value: str) -> bool:
    """Whether a value of model.chat_template is a template's text rather than a name."""
    return "{%" in value or "{{" in value


def shipped_templates() -> dict[str, Path]:
    """The files of the chat templates that ship with this package, by name."""
    return {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}


def choose_template(value: str, own: Any) -> str:
    """The configured chat template; no file is read but those that ship with this package.

    Args:
        value: `model`, `chatml`, `llama2`, or the text of a template.
        own: the template that came with the model: its text, or a list of named ones, of which `default` is taken.

    Raises:
        InputError: `model` without a template, an unknown name, or named templates without a default.
    """
    shipped = shipped_templates()
    if value == MODEL_TEMPLATE:
        if isinstance(own, list):
            named = {str(entry.get("name")): entry.get("template") for entry in own if isinstance(entry, dict)}
            if not named.get("default"):
                raise InputError(
                    f"the base model's chat templates are {', '.join(named) or 'unreadable'}, none of them `default`;"
                    " put the text of one into a file and name it in model.chat_template"
                )
            own = named["default"]
        if own:
            return str(own)
        raise InputError(
            f"the base model has no chat template; set model.chat_template to {', '.join(shipped)} or a Jinja file"
        )
    if is_template(value):
        return value.rstrip("\n")
    if value not in shipped:
        raise InputError(
            f"model.chat_template={value}: neither `model`, {', '.join(shipped)}, nor a template's text; a step reads"
            " no file by name: name the file in params.yaml or with --set, where `kubealign` reads it"
        )
    return shipped[value].read_text(encoding="utf-8").rstrip("\n")


def read_template(value: str, root: Path) -> str:
    """A value of model.chat_template as it may travel to a step: a name, or the text of the file that it names.

    Args:
        value: as in params.yaml.
        root: the project's folder; the file is in it.

    Raises:
        InputError: no such file in the project, or not the text of a template.
    """
    if value == MODEL_TEMPLATE or value in shipped_templates() or is_template(value):
        return value
    where, path = f"model.chat_template={value}", (root / value).resolve()
    if not path.is_file() or not path.is_relative_to(root.resolve()):
        names = ", ".join([f"`{MODEL_TEMPLATE}`", *shipped_templates()])
        raise InputError(f"{where}: neither {names}, nor a file in {root}; expected one of them")
    with path.open("rb") as file:
        content = file.read(MAX_TEMPLATE_BYTES + 1)
    if len(content) > MAX_TEMPLATE_BYTES:
        raise InputError(
            f"{where}: more than {MAX_TEMPLATE_BYTES} bytes, which a step's parameter cannot carry; put it into the"
            " model's folder as chat_template.jinja"
        )
    text = content.decode("utf-8", errors="replace")
    if not is_template(text):
        raise InputError(f"{where}: no Jinja template; expected a text with {{% … %}} or {{{{ … }}}}")
    return text


def with_beginning(template: str, tokenizer: Any) -> str:
    """A template with the beginning-of-sequence token in front, where the tokenizer puts it before every text, so that
    whoever renders the template gets it.
    """
    bos = tokenizer.bos_token
    wanted = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not wanted or _rendered(tokenizer, [{"role": "user", "content": SEEN[0]}], True).startswith(bos):
        return template
    return "{{ bos_token }}" + template


def with_date(template: str, day: date) -> str:
    """A template that renders this day wherever it would render today, whoever renders it.

    Calls of `strftime_now` become the day as text. A `date_string` for which the template has a default of its own, as
    those of Llama 3 have, is the day unless the caller gives another.

    Raises:
        InputError: it reads the clock in a way in which it cannot be stopped.
    """

    def stopped(call: re.Match[str]) -> str:
        return f"{call['quote']}{day.strftime(call['format'])}{call['quote']}"

    text = CLOCK_KNOWN.sub(lambda found: "false" if found["not"] else "true", READS_CLOCK.sub(stopped, template))
    if CLOCK in text:
        place = text.index(CLOCK)
        raise InputError(
            f"the chat template reads the clock by {text[place : place + 40]!r}, so prompts change every day;"
            f' expected {CLOCK}("…") with the format in quotes, which becomes model.template_date: choose another one'
            " (model.chat_template)"
        )
    if SETS_DATE.search(text):
        default = day.strftime("%d %b %Y")
        text = f'{{% if date_string is not defined %}}{{% set date_string = "{default}" %}}{{% endif %}}{text}'
    return text


def template_digest(value: str) -> str:
    """Identifier of the configured template: the hash of its text, else its name."""
    return digest(value.rstrip("\n")) if is_template(value) else value


def render_limit(conversations: int) -> AbstractContextManager[None]:
    """Limit the rendering of so many conversations: a template may loop without end over what it finds in one."""
    return time_limit(
        RENDER_LIMIT_S + conversations * RENDER_ONE_LIMIT_S,
        "the chat template takes too long; choose another one (model.chat_template)",
    )


def check_template(template: str) -> None:
    """Render a template once, in a process with limits on time and memory, before anything else does.

    Raises:
        InputError: it exceeds them, or no process renders it.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"the chat template has {len(template)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}: choose"
            " another one (model.chat_template)"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", PROBE, str(PROBE_CPU_S), str(PROBE_BYTES)],
            input=template,
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"the chat template does not end within {PROBE_LIMIT_S:.0f} s; choose another one") from error
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2][:200] or f"signal {-done.returncode}"
        raise InputError(
            f"the chat template cannot be rendered with {PROBE_CPU_S} s of CPU time and {PROBE_BYTES // 2**20} MiB for"
            f" one short conversation ({reason}); choose another one (model.chat_template)"
        )


def encode_prompt(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    """Token ids of the conversation up to the start of the assistant's answer."""
    return _ids(tokenizer, _render(tokenizer, prompt, answer=None))


def encode(tokenizer: Any, prompt: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the answer that follows it, including the end-of-sequence token.

    The tokens are those of the rendered whole, cut where the prompt ends; where the prompt's own tokens are no prefix
    of them, both are tokenized apart, as in generation. What the template puts after the end token is left out, since
    the model never generates it.

    Raises:
        InputError: the template changes the prompt once an answer follows, does not end an answer with a special
            token, or rejects the conversation.
    """
    before = _render(tokenizer, prompt, answer=None)
    completion = _completion(before, _render(tokenizer, prompt, answer), _shield(tokenizer).hide(answer))
    before_ids, (completion_ids,) = _split(tokenizer, [before], [0], [completion])[0]
    return before_ids, completion_ids


def encode_many(
    tokenizer: Any, prompts: Sequence[list[dict[str, str]]], answers: Sequence[Sequence[str]]
) -> list[tuple[list[int], list[list[int]]] | None]:
    """As `encode` for many rows at once: the ids of each prompt, and of each answer that may follow it.

    Args:
        tokenizer: the model's tokenizer.
        prompts: conversations as plain messages.
        answers: answers to each conversation.

    Returns:
        for each row prompt ids and completion ids; None for a conversation that the template rejects.

    Raises:
        InputError: as `encode`.
    """
    shield = _shield(tokenizer)
    prompts = [
        _folded(tokenizer, [turn | {"content": shield.hide(turn["content"])} for turn in prompt]) for prompt in prompts
    ]
    befores = _render_many(tokenizer, prompts, True)
    rows = [row for row, before in enumerate(befores) if before is not None]
    asked = [(row, shield.hide(answer)) for row in rows for answer in answers[row]]
    wholes = _render_many(
        tokenizer, [[*prompts[row], {"role": "assistant", "content": answer}] for row, answer in asked], False
    )
    refused = {row for (row, _), whole in zip(asked, wholes, strict=True) if whole is None}
    good = [row for row in rows if row not in refused]
    places = {row: place for place, row in enumerate(good)}
    owners, completions = [], []
    for (row, answer), whole in zip(asked, wholes, strict=True):
        if row in places:
            owners.append(places[row])
            completions.append(_completion(befores[row] or "", whole or "", answer))
    encoded: list[tuple[list[int], list[list[int]]] | None] = [None] * len(prompts)
    texts = [befores[row] or "" for row in good]
    for row, found in zip(good, _split(tokenizer, texts, owners, completions), strict=True):
        encoded[row] = found
    return encoded


def _completion(before: str, whole: str, answer: str) -> str:
    """What follows a rendered prompt when an answer is rendered.

    Where the prompt ends by opening a thought, as that of DeepSeek-R1 does, and the rendered answer has none, the
    completion is the answer's own thought, or an empty one, and the rest.

    Raises:
        InputError: the template changes the prompt.
    """
    if whole.startswith(before):
        return whole[len(before) :]
    opened = OPENS_THOUGHT.search(before)
    if not opened or not whole.startswith(before[: opened.start()]):
        raise InputError(CHANGES_PROMPT)
    closing = f"</{opened['tag']}>"
    thought, closed, _ = answer.partition(closing)
    thought = thought.strip().removeprefix(f"<{opened['tag']}>").strip("\n") if closed else ""
    rest = whole[opened.start() :].rpartition(closing)[2].lstrip("\n")
    return f"{thought}\n{closing}\n\n{rest}"


def _split(
    tokenizer: Any, befores: Sequence[str], owners: Sequence[int], completions: Sequence[str]
) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of prompts and of what follows each of them.

    Args:
        tokenizer: the model's tokenizer.
        befores: the rendered prompts.
        owners: for each completion the index of its prompt.
        completions: the rendered completions, up to the end of the conversation.
    """
    if not befores:
        return []
    joins = _habits(tokenizer).joins
    texts = [befores[owner] + text for owner, text in zip(owners, completions, strict=True)] if joins else completions
    ids = _many_ids(tokenizer, [*befores, *texts])
    split: list[tuple[list[int], list[list[int]]]] = [(found, []) for found in ids[: len(befores)]]
    for owner, completion, found in zip(owners, completions, ids[len(befores) :], strict=True):
        prompt, answers = split[owner]
        if not joins:
            tokens = found
        elif found[: len(prompt)] == prompt:
            tokens = found[len(prompt) :]
        else:
            tokens = _ids(tokenizer, completion)
        answers.append(_until_end(tokenizer, tokens))
    return split


def encode_conversation(
    tokenizer: Any, prompt: Sequence[Message], answer: str
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """As `encode`, with the token ranges of the earlier assistant turns in the prompt, each with its end of sequence.

    Returns:
        prompt ids, completion ids, and ranges [start, end) of prompt ids.

    Raises:
        InputError: the template changes an earlier turn once another follows, or the tokenizer has no offset
            mapping.
    """
    before, completion = encode(tokenizer, prompt, answer)
    text = _render(tokenizer, prompt, answer=None)
    end = str(tokenizer.convert_ids_to_tokens(end_of_answer(tokenizer)))
    spans = []
    for index, message in enumerate(prompt):
        if message.role != "assistant":
            continue
        start = len(_render(tokenizer, prompt[:index], answer=None))
        whole = _render(tokenizer, prompt[:index], message.content)
        stop = whole.rfind(end) + len(end)
        if stop <= start or not text.startswith(whole[:stop]):
            raise InputError(
                "the chat template renders an earlier answer differently once a turn follows, so it cannot be trained"
                " there; set sft.train_on_turns=last"
            )
        spans.append((start, stop))
    if not spans:
        return before, completion, []
    if not tokenizer.is_fast:
        raise InputError("this tokenizer has no offset mapping; set sft.train_on_turns=last")
    if "\ue000" in text:
        offsets = [(first, last) for _, first, last in _shield(tokenizer).encode([text])[0]]
    else:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ranges = []
    for start, stop in spans:
        inside = [index for index, (first, last) in enumerate(offsets) if first >= start and last <= stop > first]
        ranges.append((inside[0], inside[-1] + 1))
    return before, completion, ranges


def special_names(tokenizer: Any) -> re.Pattern[str]:
    """What finds the name of a special token in a text."""
    return _shield(tokenizer).names


class _Shield:
    """Keeps the names of special tokens in messages from becoming such tokens.

    In the messages a placeholder stands for each name while the template is rendered. A second tokenizer knows the
    placeholders as tokens of its own, which then become the ids of the name's characters; what stands around them is
    tokenized as it is around a special token.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.words = sorted({*added, *tokenizer.all_special_tokens}, key=lambda word: (-len(word), word))
        self.names = re.compile("|".join(map(re.escape, self.words)) or r"(?!)")
        self._numbers = {word: number for number, word in enumerate(self.words)}
        self._tokenizer = tokenizer
        self._copy: Any = None
        self._ids: dict[int, list[int]] = {}

    def hide(self, content: str) -> str:
        """A message's text with placeholders for the names in it."""
        return self.names.sub(lambda found: f"\ue000{self._numbers[found[0]]}\ue001", content)

    def encode(self, texts: list[str]) -> list[list[tuple[int, int, int]]]:
        """Token ids of rendered texts, each with the characters [start, stop) that it stands for."""
        if self._copy is None:
            self._copy = copy.deepcopy(self._tokenizer)
            places = [f"\ue000{number}\ue001" for number in range(len(self.words))]
            self._copy.add_tokens(places, special_tokens=True)
            ids = self._copy.convert_tokens_to_ids(places)
            self._ids = {place: self._plain(word) for place, word in zip(ids, self.words, strict=True)}
        found = self._copy(texts, add_special_tokens=False, return_offsets_mapping=self._copy.is_fast)
        tokens = []
        for row, ids in enumerate(found["input_ids"]):
            spans = found["offset_mapping"][row] if self._copy.is_fast else [(0, 0)] * len(ids)
            tokens.append(
                [(part, *span) for id_, span in zip(ids, spans, strict=True) for part in self._ids.get(id_, [id_])]
            )
        return tokens

    def _plain(self, word: str) -> list[int]:
        """Ids of a special token's name as text, such as it has in the middle of a line.

        Raises:
            InputError: the tokenizer has no other way to encode it.
        """
        special = set(self._tokenizer.convert_tokens_to_ids(self.words))
        line = self._tokenizer("\n", add_special_tokens=False)["input_ids"]
        for pieces in ([word], list(word)):
            ids: list[int] = []
            for piece in pieces:
                encoded = self._tokenizer("\n" + piece, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
                ids += encoded[len(line) :] if encoded[: len(line)] == line else encoded
            if not special & set(ids):
                return ids
        unknown = self._tokenizer.unk_token_id
        return [id_ for id_ in ids if id_ not in special or id_ == unknown]


_shields: WeakKeyDictionary[Any, _Shield] = WeakKeyDictionary()


def _shield(tokenizer: Any) -> _Shield:
    if tokenizer not in _shields:
        _shields[tokenizer] = _Shield(tokenizer)
    return _shields[tokenizer]


def _render(tokenizer: Any, prompt: Sequence[Message], answer: str | None) -> str:
    shield = _shield(tokenizer)
    messages = [{"role": message.role, "content": shield.hide(message.content)} for message in prompt]
    if answer is not None:
        messages.append({"role": "assistant", "content": shield.hide(answer)})
    messages = _folded(tokenizer, messages)
    return _rendered(tokenizer, messages, answer is None)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> str:
    with render_limit(1):
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except REFUSALS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template rejects a conversation of {roles}: {str(error).strip() or type(error).__name__};"
                " choose another one (model.chat_template)"
            ) from error
    return text


@dataclass(frozen=True)
class _Habits:
    """What a tokenizer with its template does, seen once on short conversations."""

    end: int
    """Id of the token that ends an answer."""
    joins: bool
    """Whether an answer's tokens depend on what stands before it, as those of SentencePiece do."""
    folds: bool
    """Whether a system message has to be the beginning of the user's first, since the template knows no such role."""


_seen: WeakKeyDictionary[Any, tuple[str, _Habits]] = WeakKeyDictionary()


def end_of_answer(tokenizer: Any) -> int:
    """Id of the token with which the template ends an answer: the tokenizer's end of sequence if it stands there, else
    the first special token after the answer, such as Gemma's `<end_of_turn>`.

    Raises:
        InputError: no special token stands there.
    """
    return _habits(tokenizer).end


def _habits(tokenizer: Any) -> _Habits:
    template = str(tokenizer.chat_template)
    if tokenizer not in _seen or _seen[tokenizer][0] != template:
        _seen[tokenizer] = template, _look(tokenizer)
    return _seen[tokenizer][1]


def _look(tokenizer: Any) -> _Habits:
    user, system = {"role": "user", "content": SEEN[0]}, {"role": "system", "content": SEEN[1]}
    try:
        before, asked = _rendered(tokenizer, [user], True), [user]
    except InputError:  # some want a system message first
        before, asked = _rendered(tokenizer, [system, user], True), [system, user]
    wholes = [_rendered(tokenizer, [*asked, {"role": "assistant", "content": answer}], False) for answer in SEEN]
    after = tokenizer(wholes[0].rpartition(SEEN[0])[2], add_special_tokens=False)["input_ids"]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [id_ for id_ in after if id_ in special]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in after else next(iter(ends), None)
    if end is None:
        raise InputError(f"the chat template does not end an answer with {tokenizer.eos_token!r}; choose another one")
    joins = False
    for whole in wholes:
        if whole.startswith(before):
            prompt, rest, all_of_it = _plain_ids(tokenizer, [before, whole[len(before) :], whole])
            joins = joins or (all_of_it[: len(prompt)] == prompt and all_of_it[len(prompt) :] != rest)
    try:
        folds = SEEN[1] not in _rendered(tokenizer, [system, user], True)
    except InputError:
        folds = True
    return _Habits(int(end), joins, folds)


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def _folded(tokenizer: Any, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation whose system message begins the user's first where the template has no such role, as Gemma's
    authors have it.
    """
    if [message["role"] for message in messages[:2]] != ["system", "user"] or not _habits(tokenizer).folds:
        return messages
    first = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return _many_ids(tokenizer, [text])[0]


def _many_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids = _plain_ids(tokenizer, texts)
    hidden = [row for row, text in enumerate(texts) if "\ue000" in text]
    for row, tokens in zip(
        hidden, _shield(tokenizer).encode([texts[row] for row in hidden]) if hidden else (), strict=True
    ):
        ids[row] = [id_ for id_, _, _ in tokens]
    return ids


def _until_end(tokenizer: Any, completion: list[int]) -> list[int]:
    end = end_of_answer(tokenizer)
    if end not in completion:
        name = str(tokenizer.convert_ids_to_tokens(end))
        raise InputError(f"the chat template does not end an answer with {name!r}; choose another one")
    last = len(completion) - 1 - completion[::-1].index(end)
    return completion[: last + 1]


def _render_many(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], generate: bool) -> list[str | None]:
    """Conversations as text; None where the template rejects one for the order of its roles or a missing field."""
    if not conversations:
        return []
    try:
        with render_limit(len(conversations)):
            texts: list[str | None] = tokenizer.apply_chat_template(
                list(conversations), tokenize=False, add_generation_prompt=generate
            )
        return texts
    except REFUSALS:
        if len(conversations) == 1:
            return [None]
        half = len(conversations) // 2
        parts = (conversations[:half], conversations[half:])
        return [text for part in parts for text in _render_many(tokenizer, part, generate)]
