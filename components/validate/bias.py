"""How well trivial cues (length, an opening refusal, a format) predict the chosen answer.

A model trained on pairs that they predict learns the cue instead of what makes an answer better.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from components.dataset.validation import BiasSummary, ShareSummary
from components.validate.formats import FORMATS
from components.validate.scan import RowTable

Z95 = 1.959963985
ALL = "all"
FORMAT_LIMIT = 0.8
"""Share that the interval of a format must lie beyond, on either side, to be called a shortcut."""
LEAST_SHARE = 0.01
"""Share of the pairs that a format must tell apart for that."""


@dataclass(frozen=True)
class Share:
    """A share of `n` pairs with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def summary(self) -> ShareSummary:
        """The record in validation.json."""
        return {"share": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class Bias:
    """Trivial cues in a part of the pairs.

    Args:
        lang: language of the pairs, or `all`.
        source: source of the pairs, or `all`.
        pairs: number of pairs.
        longer_wins: share of the pairs of unequal length whose chosen answer has more characters.
        length_accuracy: accuracy of predicting the chosen answer from length; equal lengths count as a coin toss.
        refusal_loses: share of the pairs with exactly one refusal in which it is the rejected answer.
        refusal_accuracy: accuracy of predicting the chosen answer from that; all other pairs count as a coin toss.
        refusals_chosen: pairs whose chosen answer opens as a refusal or an AI disclaimer.
        refusals_rejected: pairs whose rejected answer does.
        formats: for each of `FORMATS`, share of the pairs with exactly one answer of that format in which it is the
            chosen one.
    """

    lang: str
    source: str
    pairs: int
    longer_wins: Share
    length_accuracy: float
    refusal_loses: Share
    refusal_accuracy: float
    refusals_chosen: int
    refusals_rejected: int
    formats: dict[str, Share]

    def summary(self) -> BiasSummary:
        """The record in validation.json."""
        return {
            "lang": self.lang,
            "source": self.source,
            "pairs": self.pairs,
            "longer_wins": self.longer_wins.summary(),
            "length_accuracy": self.length_accuracy,
            "refusal_loses": self.refusal_loses.summary(),
            "refusal_accuracy": self.refusal_accuracy,
            "refusals_chosen": self.refusals_chosen,
            "refusals_rejected": self.refusals_rejected,
            "formats": {name: share.summary() for name, share in self.formats.items()},
        }


@dataclass(frozen=True)
class Measure:
    """A statistic of a part of the pairs, and the limit of the check of the same name."""

    name: str
    part: str
    value: float
    limit: float


def find_bias(table: RowTable, valid: NDArray[np.bool_]) -> list[Bias]:
    """The bias of all pairs, of each language, and of each source of a language that has several.

    Args:
        table: preference pairs.
        valid: the pairs to include.
    """
    columns, names = table.columns, table.names
    parts = [_bias(table, valid, ALL, ALL)]
    for code, lang in enumerate(names["lang"]):
        of_lang = valid & (columns["lang"] == code)
        if not of_lang.any():
            continue
        parts.append(_bias(table, of_lang, lang, ALL))
        sources = np.unique(columns["source"][of_lang])
        parts += [
            _bias(table, of_lang & (columns["source"] == source), lang, names["source"][source])
            for source in (sources if len(sources) > 1 else [])
        ]
    return parts


def interval(successes: int, n: int) -> Share:
    """A share with its 95 % Wilson score interval; for n = 0, one half with the interval [0, 1]."""
    if n == 0:
        return Share(0.5, 0.0, 1.0, 0)
    share, spread = successes / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Share(share, max(0.0, middle - half), min(1.0, middle + half), n)


def part_name(lang: str, source: str) -> str:
    """Language and source of a part of the pairs; `all` for both."""
    return " ".join(name for name in (lang, source) if name != ALL) or ALL


def measures(parts: list[Bias], limit: float) -> list[Measure]:
    """The values of the data-set-level checks; a value is chance level unless its interval excludes chance."""
    values = []
    for part in parts:
        where = part_name(part.lang, part.source)
        for name, share, value in (
            ("length_shortcut", part.longer_wins, part.length_accuracy),
            ("refusal_shortcut", part.refusal_loses, part.refusal_accuracy),
        ):
            significant = share.low > 0.5 or share.high < 0.5
            values.append(Measure(name, where, value if significant else 0.5, limit))
        for cue, share in part.formats.items():
            nearest = max(share.low, 1 - share.high) if share.n >= LEAST_SHARE * part.pairs else 0.5
            values.append(Measure("format_shortcut", f"{where} {cue}", max(nearest, 0.5), FORMAT_LIMIT))
    return values


def _bias(table: RowTable, mask: NDArray[np.bool_], lang: str, source: str) -> Bias:
    columns = table.columns
    chosen, rejected = columns["chosen_characters"][mask], columns["rejected_characters"][mask]
    refusal_chosen, refusal_rejected = columns["refusal_chosen"][mask] == 1, columns["refusal_rejected"][mask] == 1
    pairs = len(chosen)
    longer = interval(int((chosen > rejected).sum()), int((chosen != rejected).sum()))
    loses = interval(int((refusal_rejected & ~refusal_chosen).sum()), int((refusal_rejected ^ refusal_chosen).sum()))
    return Bias(
        lang,
        source,
        pairs,
        longer,
        _accuracy(longer, pairs),
        loses,
        _accuracy(loses, pairs),
        int(refusal_chosen.sum()),
        int(refusal_rejected.sum()),
        _formats(columns["format_chosen"][mask], columns["format_rejected"][mask]),
    )


def _formats(chosen: NDArray[np.uint8], rejected: NDArray[np.uint8]) -> dict[str, Share]:
    shares = {}
    for number, name in enumerate(FORMATS):
        first, second = (chosen >> number) & 1 == 1, (rejected >> number) & 1 == 1
        shares[name] = interval(int((first & ~second).sum()), int((first ^ second).sum()))
    return shares


def _accuracy(share: Share, pairs: int) -> float:
    """Accuracy of the better of the rule and its opposite where the rule applies, and of a coin toss elsewhere."""
    return 0.5 + (max(share.value, 1 - share.value) - 0.5) * share.n / pairs if pairs else 0.5
