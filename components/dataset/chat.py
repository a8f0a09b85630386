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


def choose_template(value: str, own: str | None) -> str:
    """The configured chat template; no file is read but those that ship with this package.

    Args:
        value: `model`, `chatml`, `llama2`, or the text of a template.
        own: the template that came with the model, if any.

    Raises:
        InputError: `model` without a template, or an unknown name.
    """
    shipped = shipped_templates()
    if value == MODEL_TEMPLATE:
        if own:
            return own
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

    They are tokenized separately, as in generation. Template text after the end-of-sequence token is left out, since
    the model never generates it.

    Raises:
        InputError: the template changes the prompt once an answer follows, or does not end it with the end token.
    """
    before = _render(tokenizer, prompt, answer=None)
    whole = _render(tokenizer, prompt, answer)
    if not whole.startswith(before):
        raise InputError(CHANGES_PROMPT)
    return _ids(tokenizer, before), _until_end(tokenizer, _ids(tokenizer, whole[len(before) :]))


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
    prompts = [[turn | {"content": shield.hide(turn["content"])} for turn in prompt] for prompt in prompts]
    befores = _render_many(tokenizer, prompts, True)
    good = [row for row, before in enumerate(befores) if before is not None]
    owners = [row for row in good for _ in answers[row]]
    asked = [
        [*prompts[row], {"role": "assistant", "content": shield.hide(answer)}]
        for row in good
        for answer in answers[row]
    ]
    wholes = _render_many(tokenizer, asked, False)
    refused = {row for row, whole in zip(owners, wholes, strict=True) if whole is None}
    texts = [befores[row] or "" for row in good]
    for row, whole in zip(owners, wholes, strict=True):
        before = befores[row] or ""
        if whole is not None and not whole.startswith(before):
            raise InputError(CHANGES_PROMPT)
        texts.append("" if whole is None else whole[len(before) :])
    if not texts:
        return [None] * len(prompts)
    ids = _many_ids(tokenizer, texts)
    encoded: list[tuple[list[int], list[list[int]]] | None] = [None] * len(prompts)
    for row, prompt_ids in zip(good, ids, strict=False):
        encoded[row] = None if row in refused else (prompt_ids, [])
    for row, completion in zip(owners, ids[len(good) :], strict=True):
        entry = encoded[row]
        if entry is not None:
            entry[1].append(_until_end(tokenizer, completion))
    return encoded


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
    spans = []
    for index, message in enumerate(prompt):
        if message.role != "assistant":
            continue
        start = len(_render(tokenizer, prompt[:index], answer=None))
        whole = _render(tokenizer, prompt[:index], message.content)
        stop = whole.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)
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
    with render_limit(1):
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return _many_ids(tokenizer, [text])[0]


def _many_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    hidden = [row for row, text in enumerate(texts) if "\ue000" in text]
    for row, tokens in zip(
        hidden, _shield(tokenizer).encode([texts[row] for row in hidden]) if hidden else (), strict=True
    ):
        ids[row] = [id_ for id_, _, _ in tokens]
    return ids


def _until_end(tokenizer: Any, completion: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    if end not in completion:
        raise InputError(f"the chat template does not end an answer with {tokenizer.eos_token!r}; choose another one")
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
