"""sft and dpo in every mode of training give what the plain mode gives: processes, sharding, live reference."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from components.common.files import CACHE_DIR, write_manifest
from components.config.params import load_config
from components.dataset.chat import load_tokenizer
from components.dataset.records import Preference, read_rows
from components.dpo.stage import run_dpo
from components.sft.stage import run_sft
from components.training.run import pair_examples
from tests.conftest import ROOT
from tests.support.stages import SHORT, Stages


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def train(stages: Stages, out: Path, *sets: str) -> Path:
    """Both stages in this process."""
    config = load_config(ROOT / "params.yaml", [*SHORT, *sets])
    run_sft(config.sft, config.model, stages.folder / "clean", stages.base, out / "sft")
    run_dpo(config.dpo, config.model, stages.folder / "clean", stages.base, out / "sft", out / "dpo")
    return out


def torchrun(stages: Stages, out: Path, *sets: str) -> Path:
    """Both stages by two processes, through the command line."""
    params = out / "params.yaml"
    out.mkdir(parents=True)
    params.write_text(yaml.safe_dump(load_config(ROOT / "params.yaml", [*SHORT, *sets]).sections()))
    common = ["--params", str(params), "--dataset", str(stages.folder / "clean"), "--base", str(stages.base)]
    for stage, more in (("sft", []), ("dpo", ["--sft-model", str(out / "sft")])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "components", stage, *common, *more, "--out", str(out / stage)]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return out


def files(folder: Path) -> list[str]:
    """All files of a folder; those named by content hashes count as alike."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub("[0-9a-f]{64}", "…", path) for path in paths)


# LoRA's DDP is seen on two nodes in the container tests as well.
@pytest.mark.parametrize("tuning", [pytest.param("lora", marks=pytest.mark.long), "full"])
def test_two_processes_give_the_losses_of_one_and_one_of_them_writes(
    stages: Stages, tmp_path: Path, own_home: Path, tuning: str
) -> None:
    """LoRA by DDP, full fine-tuning by FSDP2, both over gloo on the CPU."""
    one = train(stages, tmp_path / "one", f"model.finetuning={tuning}")
    two = torchrun(stages, tmp_path / "two", f"model.finetuning={tuning}")
    for stage in ("sft", "dpo"):
        assert losses(two / stage) == pytest.approx(losses(one / stage), abs=1e-5)
        assert files(two / stage) == files(one / stage)
    weights = "model/model.safetensors"
    first, second = (load_file(folder / "dpo" / weights) for folder in (one, two))
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)
    assert len(list((own_home / "checkpoints").iterdir())) == 4, "one folder for each stage and number of processes"


@pytest.mark.parametrize(
    "mode",
    [
        ["dpo.precompute_ref_log_probs=false"],
        ["model.gradient_checkpointing=true"],
        ["dpo.max_tokens_per_microbatch=16", "sft.max_tokens_per_microbatch=16"],
        ["model.lm_head_precision=fp32"],
    ],
)
def test_what_changes_only_the_way_changes_no_loss(stages: Stages, tmp_path: Path, mode: list[str]) -> None:
    plain = train(stages, tmp_path / "plain")
    other = train(stages, tmp_path / "other", *mode)
    for stage in ("sft", "dpo"):
        assert losses(other / stage) == pytest.approx(losses(plain / stage), abs=1e-5)
    assert losses(plain / "dpo")[0] == pytest.approx(0.6931472, abs=1e-5)
    assert losses(plain / "dpo")[2] != pytest.approx(0.6931472, abs=1e-3)


@pytest.mark.parametrize(("meant", "other"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_auto_is_bf16_only_where_the_machine_computes_it(
    stages: Stages,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    meant: str,
    other: str,
) -> None:
    for module in ("components.training.run", "components.engine.models", "components.engine.hardware"):
        monkeypatch.setattr(f"{module}.native_precision", lambda: meant)
    for precision in ("auto", meant, other):
        train(stages, tmp_path / precision, f"model.precision={precision}")
    auto, same, different = (losses(tmp_path / precision / "dpo") for precision in ("auto", meant, other))
    assert auto == same != different
    assert json.loads((tmp_path / "auto" / "dpo" / "training.json").read_text())["precision"] == meant
    assert ("no bf16 hardware support" in capsys.readouterr().out) == (meant == "fp32")


def test_a_live_reference_of_full_fine_tuning_stays_where_it_was(stages: Stages, tmp_path: Path) -> None:
    cached = train(stages, tmp_path / "cached", "model.finetuning=full")
    live = train(stages, tmp_path / "live", "model.finetuning=full", "dpo.precompute_ref_log_probs=false")
    assert losses(live / "dpo") == pytest.approx(losses(cached / "dpo"), abs=1e-5)
    assert not (live / "dpo" / "adapter").exists()


def test_reference_log_probs_travel_with_the_sft_model_and_damage_is_seen(
    stages: Stages, tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(stages, tmp_path / "out")
    assert "log-probs of reference_train: 32 examples from the model's folder" in capsys.readouterr().out
    monkeypatch.setenv("KUBEALIGN_HOME", str(tmp_path / "another-machine"))
    config = load_config(ROOT / "params.yaml", SHORT)
    inputs = (stages.folder / "clean", stages.base, out / "sft", tmp_path / "again")
    run_dpo(config.dpo, config.model, *inputs)
    assert "log-probs of reference_train: 32 examples from the model's folder" in capsys.readouterr().out
    for file in (out / "sft" / CACHE_DIR).iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setenv("KUBEALIGN_HOME", str(tmp_path / "a-third"))
    run_dpo(config.dpo, config.model, *inputs)
    said = capsys.readouterr().out
    assert "in the model's folder is damaged or not ours, and passed over" in said
    assert "32/32 log-probs of reference_train" in said, "computed again"
    assert losses(tmp_path / "again") == losses(out / "dpo")


def test_the_best_step_is_kept_and_patience_ends_training(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training makes answers of characters that it never shows less likely, so an early evaluation stays the best."""
    clean = tmp_path / "clean"
    shutil.copytree(stages.folder / "clean", clean)
    file = clean / "instructions" / "validation.jsonl"
    rows = [json.loads(line) | {"response": "@#&" * 4} for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_manifest(clean)
    often = ["sft.learning_rate=0.02", "sft.lr_scheduler=constant", "sft.max_steps=8", "sft.eval_every_steps=1"]
    config = load_config(ROOT / "params.yaml", [*SHORT, *often, "sft.early_stopping_patience=2"])
    run_sft(config.sft, config.model, clean, stages.base, tmp_path / "sft")
    history = [json.loads(line) for line in (tmp_path / "sft" / "history.jsonl").read_text().splitlines()]
    found = [record["validation"]["loss"] for record in history]
    best = found.index(min(found))
    said = capsys.readouterr().out
    assert len(history) == best + 3 < 8, "two evaluations after the best one"
    assert f"stopped early after step {len(history)}" in said
    kept = json.loads((tmp_path / "sft" / "training.json").read_text())["metrics"]["validation_loss"]
    assert kept == found[best]
    config = load_config(ROOT / "params.yaml", [*SHORT, *often, f"sft.max_steps={best + 1}"])
    run_sft(config.sft, config.model, clean, stages.base, tmp_path / "shorter")
    weights = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("sft", "shorter")]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "the parameters of the best step"


def test_a_changed_sft_setting_never_resumes_an_old_dpo_run(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(stages, tmp_path / "one", "dpo.checkpoint_every_s=1e-9")
    train(stages, tmp_path / "again", "dpo.checkpoint_every_s=1e-9")
    assert "[note] dpo resuming after step 3 of 3" in capsys.readouterr().out
    train(stages, tmp_path / "other", "dpo.checkpoint_every_s=1e-9", "sft.learning_rate=3e-4")
    assert "resuming" not in capsys.readouterr().out


def test_the_loss_falls_on_the_real_pairs(stages: Stages, tmp_path: Path) -> None:
    """Twelve real pairs, a tiny model, a fixed seed: after four passes it prefers what it was shown."""
    real = tmp_path / "real"
    shutil.copytree(stages.folder / "clean", real)
    tokenizer = load_tokenizer(stages.base)
    rows = read_rows(ROOT / "data" / "preferences" / "train.jsonl", Preference)
    found = [row for row, pair in zip(rows, pair_examples(tokenizer, rows), strict=True) if pair.n_tokens < 400]
    short = [row for lang in ("en", "zh") for row in [row for row in found if row.lang == lang][:6]]
    assert len(short) == 12
    lines = "".join(row.model_dump_json() + "\n" for row in short)
    (real / "preferences" / "train.jsonl").write_text(lines, encoding="utf-8")
    write_manifest(real)
    sets = ["dpo.max_steps=0", "dpo.epochs=4", "dpo.batch_size=4", "dpo.learning_rate=1e-2", "model.max_length=400"]
    config = load_config(ROOT / "params.yaml", [*SHORT, *sets])
    run_sft(config.sft, config.model, real, stages.base, tmp_path / "sft")
    run_dpo(config.dpo, config.model, real, stages.base, tmp_path / "sft", tmp_path / "dpo")
    seen = losses(tmp_path / "dpo")
    assert seen[0] == pytest.approx(0.6931472, abs=1e-4)
    assert sum(seen[-3:]) / 3 < 0.5
