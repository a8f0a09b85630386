"""The configuration: errors that name the key, defaults, and what every field says."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from components.common.errors import InputError
from components.config.params import FORM_FIELDS, Config, config_from_arguments, load_config, pipeline_arguments
from components.config.renamed import RENAMED
from tests.conftest import ROOT

PARAMS = ROOT / "params.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.betta=1", "dpo.betta: no such key; did you mean dpo.beta?"),
        ("dop.beta=1", "dop: no such key; did you mean dpo?"),
        ("dpo.beta=-1", r"dpo.beta: input should be greater than 0, found -1 \(KL penalty"),
        ("dpo.loss_type=ppo", "dpo.loss_type: input should be 'sigmoid', 'robust', .* or 'orpo', found 'ppo'"),
        ("model.precision=fp16", "model.precision: fp16 overflows"),
        ("prepare.split.train=0.9", "prepare.split: the shares add up to 1.45; expected 1"),
        ("data.repo=https://me:secret@example.org/x.git", "data.repo: a user or token in a URL"),
        ("beta=1", "--set beta=1: expected section.key=value, such as dpo.beta=0.2"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_config(PARAMS, [override])
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_of_an_old_file_is_named_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    section, key = old.split(".")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({section: {key: "x"}}))
    with pytest.raises(InputError, match=rf"{re.escape(old)}: renamed; write {re.escape(new)}$"):
        load_config(tmp_path / "params.yaml")
    with pytest.raises(InputError, match=f"{re.escape(old)}: renamed"):
        load_config(PARAMS, [f"{old}=1"])
    assert new.split(" ", maxsplit=1)[0].split(".")[1] in Config().sections()[section]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("setting", ["use_dora=true", "modules_to_save=[lm_head]"])
def test_what_peft_could_train_and_we_could_not_export_is_refused_with_its_reason(stage: str, setting: str) -> None:
    key = f"{stage}.{setting.partition('=')[0]}"
    with pytest.raises(InputError, match=rf"{key}: .*add up.*model\.finetuning=full$"):
        load_config(PARAMS, [f"{stage}.{setting}"])


def test_training_nothing_is_refused_while_either_stage_may_be_left_out() -> None:
    assert load_config(PARAMS, ["sft.epochs=0"]).dpo.epochs and load_config(PARAMS, ["dpo.epochs=0"]).sft.epochs
    with pytest.raises(InputError, match=r"sft\.epochs and dpo\.epochs"):
        load_config(PARAMS, ["sft.epochs=0", "dpo.epochs=0"])
    arguments = pipeline_arguments(load_config(PARAMS)) | {"sft_epochs": 0.0, "dpo_epochs": 0.0}
    with pytest.raises(InputError, match=r"sft\.epochs and dpo\.epochs"):
        config_from_arguments(arguments)


def test_smoothing_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="label_smoothing means nothing to the loss ipo"):
        load_config(PARAMS, ["dpo.loss_type=ipo", "dpo.label_smoothing=0.1"])


def test_a_key_that_the_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("dpo: {learning_rate: 1.0e-5}\n")
    assert load_config(tmp_path / "params.yaml") == load_config(PARAMS, ["dpo.learning_rate=1e-5"])
    read = load_config(
        tmp_path / "params.yaml", ["data.revision=1.2", "sft.learning_rate=5e-7", "cluster.train.gpus=2"]
    )
    assert (read.data.revision, read.sft.learning_rate, read.cluster.train.gpus) == ("1.2", 5e-7, 2)


def test_the_shipped_file_shows_every_key_with_its_default() -> None:
    assert yaml.safe_load(PARAMS.read_text()) == Config().sections()


def test_a_value_is_read_as_the_kind_that_it_replaces() -> None:
    assert load_config(PARAMS, ["dpo.learning_rate=5e-7"]).dpo.learning_rate == 5e-7
    for text in ("1.2", "12e4567", "2026"):
        assert load_config(PARAMS, [f"data.revision={text}"]).data.revision == text


def test_every_field_says_what_it_means() -> None:
    def fields(kind: type[BaseModel]) -> list[str]:
        missing = []
        for name, field in kind.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                missing += fields(field.annotation)
            elif not field.description:
                missing.append(f"{kind.__name__}.{name}")
        return missing

    assert fields(Config) == []


def test_form_fields_are_taken_out_of_the_json_and_may_not_be_given_twice() -> None:
    arguments = pipeline_arguments(load_config(PARAMS))
    text = arguments["dpo_section"]
    assert set(FORM_FIELDS) <= set(arguments) and "beta" not in json.loads(text)
    assert config_from_arguments(arguments) == load_config(PARAMS)
    assert config_from_arguments(arguments | {"dpo_beta": 0.3}).dpo.beta == 0.3
    twice = arguments | {"dpo_section": json.dumps(json.loads(text) | {"beta": 0.1})}
    with pytest.raises(InputError, match="dpo.beta is the form field dpo_beta; .*dpo_section"):
        config_from_arguments(twice)


def test_a_rule_of_a_whole_section_names_the_section_and_shows_none_of_it() -> None:
    arguments = pipeline_arguments(load_config(PARAMS)) | {"dpo_loss_type": "ipo"}
    smoothed = json.dumps(json.loads(arguments["dpo_section"]) | {"label_smoothing": 0.1})
    with pytest.raises(InputError) as error:
        config_from_arguments(arguments | {"dpo_section": smoothed})
    assert re.match(r"the run: dpo: label_smoothing means nothing to the loss ipo", str(error.value))
    assert "batch_size" not in str(error.value)
