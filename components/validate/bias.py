"""How well something trivial tells the chosen answer: its length, or that one of the two opens as a refusal.

A model that is trained on such pairs learns the trivial thing instead of what makes an answer better.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from components.dataset.validation import BiasSummary, ShareSummary
from components.validate.scan import Found

Z95 = 1.959963985
ALL = "all"


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval, of `n` pairs."""

    value: float
    low: float
    high: float
    n: int

    def summary(self) -> ShareSummary:
        """For validation.json."""
        return {"share": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class Bias:
    """What is trivial about a part of the pairs.

    Args:
        lang: of the pairs, or `all`.
        source: of the pairs, or `all`.
        longer_wins: share of the pairs, those of equal length left out, whose chosen answer has more characters.
        length_accuracy: of telling the chosen answer by length; equal lengths are a coin.
        refusal_loses: share of the pairs with one refusal in which it is the rejected answer.
        refusal_accuracy: of telling the chosen answer by that; all other pairs are a coin.
        refusals_chosen: pairs whose chosen answer opens as a refusal or an AI disclaimer.
        refusals_rejected: pairs whose rejected answer does.
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

    def summary(self) -> BiasSummary:
        """For validation.json."""
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
        }


@dataclass(frozen=True)
class Measure:
    """A number about a part of the pairs, and the limit that the check of the same name sets."""

    name: str
    part: str
    value: float
    limit: float


def find_bias(found: Found, valid: NDArray[np.bool_]) -> list[Bias]:
    """Of all pairs, of each language, and of each source in a language when it has several.

    Args:
        found: preference pairs.
        valid: the pairs that count.
    """
    columns, names = found.columns, found.names
    parts = [_bias(found, valid, ALL, ALL)]
    for code, lang in enumerate(names["lang"]):
        of_lang = valid & (columns["lang"] == code)
        if not of_lang.any():
            continue
        parts.append(_bias(found, of_lang, lang, ALL))
        sources = np.unique(columns["source"][of_lang])
        parts += [
            _bias(found, of_lang & (columns["source"] == source), lang, names["source"][source])
            for source in (sources if len(sources) > 1 else [])
        ]
    return parts


def interval(successes: int, n: int) -> Share:
    """A share with its 95 % Wilson score interval; of nothing, one half with no information."""
    if n == 0:
        return Share(0.5, 0.0, 1.0, 0)
    share, spread = successes / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Share(share, max(0.0, middle - half), min(1.0, middle + half), n)


def measures(parts: list[Bias], limit: float) -> list[Measure]:
    """What the checks of the data set as a whole look at; the value is chance unless its interval excludes chance."""
    found = []
    for part in parts:
        for name, share, value in (
            ("length_shortcut", part.longer_wins, part.length_accuracy),
            ("refusal_shortcut", part.refusal_loses, part.refusal_accuracy),
        ):
            seen = share.low > 0.5 or share.high < 0.5
            where = " ".join(word for word in (part.lang, part.source) if word != ALL) or ALL
            found.append(Measure(name, where, value if seen else 0.5, limit))
    return found


def _bias(found: Found, where: NDArray[np.bool_], lang: str, source: str) -> Bias:
    columns = found.columns
    chosen, rejected = columns["first_characters"][where], columns["second_characters"][where]
    opens, opens_rejected = columns["refusal_first"][where] == 1, columns["refusal_second"][where] == 1
    pairs = len(chosen)
    longer = interval(int((chosen > rejected).sum()), int((chosen != rejected).sum()))
    loses = interval(int((opens_rejected & ~opens).sum()), int((opens_rejected ^ opens).sum()))
    return Bias(
        lang,
        source,
        pairs,
        longer,
        _accuracy(longer, pairs),
        loses,
        _accuracy(loses, pairs),
        int(opens.sum()),
        int(opens_rejected.sum()),
    )


def _accuracy(share: Share, pairs: int) -> float:
    """Of the better of the rule and its opposite on the pairs it speaks of, and of a coin on the others."""
    return 0.5 + (max(share.value, 1 - share.value) - 0.5) * share.n / pairs if pairs else 0.5
