"""One matrix, walked whole: a tiny model of every architecture goes through validate, sft, dpo, evaluate and export.

The exported folders are then read by transformers 4, which many a server is still built on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.common.files import read_json
from components.engine.export import load_plain
from components.engine.models import plain_logps
from tests.support.architectures import ARCHITECTURES, EVERY_TIME, make_base
from tests.support.stages import Stages

LORA = pytest.param((), id="lora")
FULL = pytest.param(("model.finetuning=full", "dpo.learning_rate=1e-4"), id="full", marks=pytest.mark.long)
MATRIX = [pytest.param(name, marks=() if name in EVERY_TIME else (pytest.mark.long,)) for name in ARCHITECTURES]


@pytest.fixture(scope="module")
def exported() -> dict[str, Path]:
    """The policy folders of the architectures that were walked, by name."""
    return {}


@pytest.mark.parametrize("settings", [LORA, FULL])
@pytest.mark.parametrize("name", MATRIX)
def test_an_architecture_goes_through_all_stages_and_is_exported_as_it_was_judged(
    name: str,
    settings: tuple[str, ...],
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    exported: dict[str, Path],
) -> None:
    folder = tmp_path_factory.mktemp(name)
    stages = Stages(folder / "stages", make_base(ARCHITECTURES[name], tiny_model, folder / "made"), *settings)
    found = stages.align("one", "dpo.max_steps=2", *settings)
    assert found["held_out"] and found["models"]["policy"]
    policy = folder / "stages" / "one" / "policy"
    stored = read_json(policy / "fingerprint.json")
    plain = plain_logps(load_plain(policy / "model"), stored["prompt"], stored["completion"])
    assert (plain - torch.tensor(stored["logps"])).abs().max() < 1e-3
    exported["-".join((name, *settings))] = policy


OF_YESTERDAY = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
CAPPED = ("gemma2",)
"""Transformers 4 takes torch's attention for them by itself, which leaves their soft cap out."""
READER = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

assert transformers.__version__.startswith("4.57")
found, capped = {}, sys.argv[1].split(",")
for name in sys.argv[2:]:
    policy = Path(name)
    stored = json.loads((policy / "fingerprint.json").read_text())
    options = {"attn_implementation": "eager"} if name in capped else {}
    lm = AutoModelForCausalLM.from_pretrained(policy / "model", local_files_only=True, **options).eval()
    assert lm.dtype == torch.float32
    ids = stored["prompt"] + stored["completion"]
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(stored["prompt"]) - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(1, torch.tensor(stored["completion"])[:, None])[:, 0]
    tokenizer = AutoTokenizer.from_pretrained(policy / "model", local_files_only=True)
    turns = [{"role": "user", "content": "Why is the sky blue? 天空为什么是蓝色的？"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    ends = GenerationConfig.from_pretrained(policy / "model").eos_token_id
    found[name] = [float((logps - torch.tensor(stored["logps"])).abs().max()), prompt == stored["prompt"], ends]
print(json.dumps(found))
"""


def test_transformers_of_yesterday_reads_the_same_model(exported: dict[str, Path], tmp_path: Path) -> None:
    """Its log-probs, its prompts and its end tokens, for every architecture that was walked before."""
    names = list(exported)
    assert names
    capped = ",".join(str(exported[name]) for name in exported if name.startswith(CAPPED))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, "--disable-pip-version-check", *OF_YESTERDAY], check=True)
    environment: dict[str, Any] = dict(os.environ) | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", READER, capped, *(str(exported[name]) for name in names)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        error, same_prompt, ends = found[str(exported[name])]
        assert error < 1e-3 and same_prompt and ends == 2, (name, error, same_prompt, ends)


def test_dpo_alone_aligns_the_base_model_itself(tiny_model: Path, tmp_path: Path) -> None:
    """`sft.epochs: 0` trains nothing: the SFT model is the base model, and the reference too."""
    stages = Stages(tmp_path / "stages", tiny_model, "sft.epochs=0")
    found = stages.align("one", "dpo.max_steps=2")
    sft, base = (found["models"][name]["overall"]["preference_log_loss"]["value"] for name in ("sft", "base"))
    assert sft == pytest.approx(base, abs=1e-6)
    assert found["models"]["policy"]["overall"]["rewards/margins"]["value"] != 0.0


@pytest.mark.parametrize("settings", [LORA, FULL])
def test_sft_alone_exports_the_sft_model_itself(settings: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    """`dpo.epochs: 0` trains nothing: the policy is the SFT model, whole or as an adapter of the same rank."""
    stages = Stages(tmp_path / "stages", tiny_model, *settings)
    found = stages.align("one", *settings, "dpo.epochs=0")
    assert found["comparisons"].keys() == {"base"} and found["beta"] is None
    policy, sft = tmp_path / "stages" / "one" / "policy", tmp_path / "stages" / "sft"
    if settings:
        whole = [load_file(folder / "model" / "model.safetensors") for folder in (policy, sft)]
        assert whole[0].keys() == whole[1].keys() and all(
            torch.equal(whole[0][name], whole[1][name]) for name in whole[0]
        )
        assert not (policy / "adapter").exists()
    else:
        ranks = [read_json(folder / "adapter" / "adapter_config.json")["r"] for folder in (policy, sft)]
        assert ranks[0] == ranks[1]
