"""What each step depends on: its order. The only place that knows; all keys are digests of orders.

    orders = make_orders(config.sections(), facts)

KFP's cache goes by a step's order, as it is the step's parameter; the lineage of a model is the digest of the orders
that decide its weights; checkpoints, `kubealign ci plan`, `ci retrain` and what `register` records read the same
function, so they cannot disagree.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from components.common.errors import InputError
from components.common.files import digest
from components.config.model import ModelSource
from components.stages import BY_NAME, LINEAGE, ORDERED, Stage

MAX_BYTES = 10000
"""KFP's limit of a parameter that a step puts out (MAX_PARAMETER_BYTES)."""
Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What the names of a run's configuration mean. Digests of folders are DVC's, the others are sha256.

    The first ones say what is used, those without a default; the others are known once these are: `lineage` is the key
    of everything that decides the weights, `config` that of the judgement and the stored format too; `incumbent` the
    champion to beat as models:/name/version, `decision` the key of what is asked of the test set, and `decision_index`
    its number among all that were asked, from 1; `project_commit` the commit that `kubealign ci retrain` judges.
    """

    data_repo: str
    data_path: str
    data_commit: str
    preferences_digest: str
    instructions_digest: str
    data_clean: bool
    """Whether a commit records just this data."""
    test_set: str
    """md5 of the test side's pairs."""
    base_reference: str
    base_digest: str
    template: str
    template_digest: str
    template_date: str
    git_commit: str
    code: Mapping[str, str]
    """The digest of every stage's code."""
    lineage: str = ""
    config: str = ""
    incumbent: str = ""
    decision: str = ""
    decision_index: int = 0
    project_commit: str = ""


@dataclass(frozen=True)
class Order:
    """What a step depends on: sections of the configuration, facts and code; `origin` says where its inputs are."""

    stage: str
    sections: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    origin: dict[str, Any]
    code: str

    @property
    def digest(self) -> str:
        """The same for orders whose results are the same."""
        return digest([self.stage, self.sections, self.facts, self.code])

    def as_json(self) -> str:
        """As the step's parameter.

        Raises:
            InputError: it is longer than KFP takes.
        """
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        if len(text.encode()) > MAX_BYTES:
            largest = max(self.sections, key=lambda name: len(json.dumps(self.sections[name])))
            raise InputError(
                f"the order of {self.stage} has {len(text.encode())} bytes, and Kubeflow Pipelines takes {MAX_BYTES};"
                f" make the longest list or text of the section {largest} shorter"
            )
        return text


def read_order(text: str) -> Order:
    """An order from a step's parameter.

    Raises:
        InputError: it is none.
    """
    try:
        return Order(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(f"order: expected what `resolve` puts out, found {text[:80]!r}: {error}") from error


def make_orders(sections: Sections, facts: Facts) -> dict[str, Order]:
    """The order of every stage behind `resolve`.

    Args:
        sections: the whole configuration as plain values, checked; the precision and the hardware definite.
        facts: what its names mean.
    """
    known = {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
    return {name: make_order(BY_NAME[name], sections, known, facts.code.get(name, "")) for name in ORDERED}


def make_order(stage: Stage, sections: Sections, facts: Mapping[str, Any], code: str) -> Order:
    """The order of one stage, of whose sections and facts no others need be there.

    Raises:
        ValueError: the precision or the hardware is still `auto`.
    """
    model = {name: value for name, value in sections["model"].items() if name not in ModelSource.model_fields}
    for name in ("precision", "hardware"):
        if "model" in stage.sections and model.get(name) == "auto":
            raise ValueError(f"model.{name} is auto; resolve it before an order is made")
    return Order(
        stage.name,
        _selected({**sections, "model": model}, stage.sections),
        {name: facts[name] for name in stage.facts},
        {name: facts[name] for name in stage.origin},
        code,
    )


def _selected(sections: Sections, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The sections, or the single keys `section.key`, of these names."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        section, _, key = name.partition(".")
        found[section] = {key: sections[section][key]} if key else dict(sections[section])
    return found


def lineage(orders: Mapping[str, Order]) -> str:
    """The key of everything that decides a model's weights."""
    return digest([orders[name].digest for name in LINEAGE])[:32]


def config_key(sections: Sections, facts: Facts) -> str:
    """The key of what a retraining would make: the weights, how they are judged whoever is champion, how stored."""
    orders = make_orders(sections, replace(facts, incumbent="", decision_index=0))
    stored = [sections["register"].get(name) for name in ("name", "format")]
    return digest([lineage(orders), orders["evaluate"].digest, stored])[:32]


def with_keys(sections: Sections, facts: Facts) -> Facts:
    """The facts with `lineage` and `config`, which follow from the others and the configuration."""
    return replace(facts, lineage=lineage(make_orders(sections, facts)), config=config_key(sections, facts))


def decision_key(orders: Mapping[str, Order], incumbent: str) -> str:
    """The key of what is asked of the test set: which weights are compared with which champion, and by what rules."""
    return digest([lineage(orders), incumbent, orders["evaluate"].sections])[:32]
