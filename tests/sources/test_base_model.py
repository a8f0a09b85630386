"""Base models: what is refused, and how one is pinned."""

import pytest

from components.common.errors import InputError
from components.config.model import ModelConfig
from components.config.params import load_config
from components.sources.base_model import resolve_base
from tests.conftest import ROOT

PARAMS = ROOT / "params.yaml"


def base(name: str, **changes: object) -> ModelConfig:
    config = load_config(PARAMS)
    return ModelConfig(**config.model.model_dump() | {"base": name} | changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (base("no/such/folder"), "no such folder; expected `embedded`, a folder, s3://"),
        (base("org/name"), "a hub id needs the network; set model.allow_network"),
        (base("org/name", allow_network=True), "a hub id needs model.revision, a commit of 40 hexadecimal digits"),
        (base("models:/nothing/1"), "model.base=models:/nothing/1: .*not found"),
        (base("models:/x"), "expected models:/name/version or models:/name@alias"),
        (base(str(ROOT / "tests")), "the folder has no config.json"),
    ],
)
def test_a_base_model_that_cannot_be_used_is_refused_before_anything_runs(model: ModelConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_base(model, load_config(PARAMS).data)


def test_a_hub_id_with_network_and_revision_is_pinned() -> None:
    found = resolve_base(base("org/name", allow_network=True, revision="a" * 40), load_config(PARAMS).data)
    assert found.reference == f"hub:org/name@{'a' * 40}"
