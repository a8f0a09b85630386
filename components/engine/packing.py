"""Lay examples end to end in one row of tokens, each prompt once, and plan which examples share a step.

An example is a prompt and its completions: one for SFT, chosen and rejected for DPO. In the row it is
`prompt | completion | completion`, and the positions of each completion continue those of the prompt. `attention.py`
decides which tokens see which. Sharing the prompt is the prefix sharing of arXiv 2410.20305.

Shapes: T tokens of the row, N completion tokens, S completions.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """Token ids of a prompt and of its completions, none of them empty.

    `answers` are ranges [start, end) of the prompt that are predicted as part of the only completion: the earlier
    assistant turns of a conversation.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    answers: Sequence[tuple[int, int]] = ()

    @property
    def n_predicted(self) -> int:
        """Tokens that are predicted."""
        return sum(end - start for start, end in self.answers) + sum(map(len, self.completions))

    @property
    def n_tokens(self) -> int:
        """Tokens that the example occupies in a pack."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


class Segment(NamedTuple):
    """Where one example lies in the row: the prompt in [start, end), its completions in the ranges that follow."""

    start: int
    end: int
    branches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pack:
    """One forward pass: T tokens in one row, and where its N completion tokens are predicted."""

    input_ids_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    predictor_N: Tensor
    """Row index whose hidden state predicts each completion token."""
    target_N: Tensor
    sequence_N: Tensor
    """Which completion (0 .. S-1, in the order of the examples) each completion token belongs to."""
    n_sequences: int

    def to(self, device: torch.device) -> "Pack":
        """The same pack with its tensors on `device`."""
        return Pack(
            self.input_ids_T.to(device),
            self.positions_T.to(device),
            self.segments,
            self.predictor_N.to(device),
            self.target_N.to(device),
            self.sequence_N.to(device),
            self.n_sequences,
        )


def pack(examples: Sequence[Example]) -> Pack:
    """Lay the examples end to end.

    Args:
        examples: at least one; each prompt and completion holds at least one token.

    Returns:
        the pack; completions are numbered in the order of the examples.

    Raises:
        ValueError: an empty prompt or completion, which could not be predicted.
    """
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    target: list[int] = []
    sequence: list[int] = []
    segments: list[Segment] = []
    n_sequences = 0
    for example in examples:
        if not example.prompt or not all(example.completions) or any(start < 1 for start, _ in example.answers):
            raise ValueError("an example to pack has an empty prompt or completion, or predicts its first token")
        if example.answers and len(example.completions) != 1:
            raise ValueError("answers within the prompt go with a single completion")
        n_prompt, start = len(example.prompt), len(ids)
        end = start + n_prompt
        ids += example.prompt
        positions += range(n_prompt)
        branches = []
        for first, last in example.answers:
            predictor += range(start + first - 1, start + last - 1)
            target += example.prompt[first:last]
            sequence += [n_sequences] * (last - first)
        for completion in example.completions:
            first = len(ids)
            ids += completion
            positions += range(n_prompt, n_prompt + len(completion))
            predictor += [end - 1, *range(first, first + len(completion) - 1)]
            target += completion
            sequence += [n_sequences] * len(completion)
            branches.append((first, len(ids)))
            n_sequences += 1
        segments.append(Segment(start, end, tuple(branches)))
    as_tensor = torch.tensor
    return Pack(
        as_tensor(ids),
        as_tensor(positions),
        tuple(segments),
        as_tensor(predictor),
        as_tensor(target),
        as_tensor(sequence),
        n_sequences,
    )


def balance(indices: Sequence[int], n_tokens: Sequence[int], n_shares: int) -> list[list[int]]:
    """Divide examples into shares of similar size: longest first, each to the share with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(n_shares)]
    load = [0] * n_shares
    for index in sorted(indices, key=lambda i: (-n_tokens[i], i)):
        least = load.index(min(load))
        shares[least].append(index)
        load[least] += n_tokens[index]
    return shares


def first_fit_decreasing(indices: Sequence[int], n_tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack examples into packs of at most `max_tokens` tokens: longest first, each into the first pack with room.

    An example longer than `max_tokens` gets a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-n_tokens[i], i)):
        for slot, left in enumerate(room):
            if n_tokens[index] <= left:
                packs[slot].append(index)
                room[slot] -= n_tokens[index]
                break
        else:
            packs.append([index])
            room.append(max_tokens - n_tokens[index])
    return packs


def plan_steps(n_examples: int, epochs: float, batch_size: int, seed: int) -> list[list[int]]:
    """The examples of every step of a training run, the same for the same arguments on every machine.

    Each epoch visits every example once in an order drawn from (seed, epoch); `batch_size` consecutive examples form a
    step, and the last step of an epoch takes the rest. A fractional epoch stops after that share of its steps.

    Args:
        n_examples: size of the data set.
        epochs: passes over the examples; 0 for no step.
        batch_size: examples in an optimiser step, over all packs and processes.
        seed: of the order.
    """
    steps_per_epoch = -(-n_examples // batch_size)
    total = max(1, round(epochs * steps_per_epoch)) if epochs else 0
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < total:
        order = list(range(n_examples))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[first : first + batch_size] for first in range(0, n_examples, batch_size)]
        epoch += 1
    return steps[:total]
