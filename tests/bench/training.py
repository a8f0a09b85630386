"""The training engine against TRL 1.16: alternately in one process, on the embedded model and the real pairs.

`make bench`, or `python tests/bench/training.py --rounds 5`. It prints and writes (build/bench/training.json) the
paired ratios TRL / ours of CPU time and wall time for the same optimiser steps, differences of loss and gradient, and
peak memory in processes of their own, and puts a table into docs/performance.md between its markers. TRL runs in the
fastest of the settings that are tried first; ours as params.yaml has it. The reference log-probs are cached on both
sides. Errors of gradients are against one that transformers computes in fp64. Without bf16 in hardware TRL is at its
best in fp32, as it would compute bf16 by software: ours in bf16 is compared with that.
"""

import argparse
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from components.common.files import read_json, write_json
from components.common.memory import peak_memory_mib
from components.config.params import Config, load_config
from components.dataset.chat import load_tokenizer
from components.dataset.records import Preference, read_rows
from components.dpo.stage import cached_reference, make_objective
from components.engine import loop
from components.engine.cpu.memory import configure_malloc
from components.engine.hardware import native_precision
from components.engine.history import StepRecord
from components.engine.models import DPO_ADAPTER, PackedModel, load_causal_lm, trainable_state
from components.engine.packing import Example, pack
from components.sft.stage import objective as sft_objective
from components.tracking.run import stage_run
from components.training.run import add_adapter, loop_settings, pair_examples, step_metrics

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "data" / "base_model"
MARK = re.compile(r"(<!-- bench:training -->\n).*?(<!-- /bench:training -->)", re.S)
LONG_PROMPT = 128
"""Tokens from which a prompt counts as long; the median of the real ones."""
SEARCH_ROUNDS = 3
"""Counted steps of each of TRL's settings, when the fastest is looked for."""

Step = Callable[[], float]


def config(*sets: str) -> Config:
    """The shipped configuration; no checkpoint falls into a measured step."""
    often = ["dpo.checkpoint_every_s=1e9", "sft.checkpoint_every_s=1e9"]
    return load_config(ROOT / "params.yaml", [*often, *sets])


LONG = config().model.max_length
"""Tokens of the longest pair, as shipped."""


def sample(n: int, seed: int = 0) -> list[Preference]:
    """Real training pairs, equally many of each language and of short and long prompts."""
    tokenizer = load_tokenizer(BASE)
    rows = read_rows(ROOT / "data" / "preferences" / "train.jsonl", Preference)
    random.Random(seed).shuffle(rows)
    bins: dict[tuple[str, bool], list[Preference]] = {}
    for row, example in zip(rows, pair_examples(tokenizer, rows), strict=True):
        length = len(example.prompt) + max(map(len, example.completions))
        if length <= LONG:
            bins.setdefault((row.lang, len(example.prompt) >= LONG_PROMPT), []).append(row)
    chosen = [row for group in bins.values() for row in group[: -(-n // len(bins))]][:n]
    random.Random(seed).shuffle(chosen)
    return chosen


def our_model(cfg: Config, dtype: torch.dtype | None = None) -> PackedModel:
    """Base model with one fresh adapter; `dtype` fp32 keeps the base in fp32 under autocast, as TRL does."""
    lm = load_causal_lm(BASE, "fp32" if dtype == torch.float32 else cfg.model.precision)
    if cfg.model.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PackedModel(lm, cfg.model.precision)
    add_adapter(model, DPO_ADAPTER, cfg.dpo)
    return model


class Ours:
    """Our loop, a step at a time."""

    def __init__(self, kind: str, cfg: Config, rows: list[Preference], dtype: torch.dtype | None = None) -> None:
        tokenizer = load_tokenizer(BASE)
        pairs = pair_examples(tokenizer, rows)
        self.model = our_model(cfg, dtype)
        if kind == "dpo":
            # A fresh adapter changes nothing yet, so the policy's log-probs are the reference's.
            self.reference = np.asarray(loop.sequence_logps(self.model, pairs))
            self.data = loop.TrainingSet(pairs, [row.id for row in rows], [1.0] * len(rows))
            self.objective = make_objective(cached_reference(self.reference), cfg.dpo)
            settings = loop_settings(cfg.dpo)
        else:
            examples = [Example(pair.prompt, [pair.completions[0]]) for pair in pairs]
            weights = [float(example.n_predicted) for example in examples]
            self.data = loop.TrainingSet(examples, [row.id for row in rows], weights)
            self.objective = sft_objective
            settings = loop_settings(cfg.sft)
        self.batches = loop.plan(self.data, settings)
        self.folder = tempfile.TemporaryDirectory()
        self.steps: Iterator[StepRecord] = loop.train(
            self.model, self.data, self.objective, settings, Path(self.folder.name), print
        )

    def step(self) -> float:
        return next(self.steps).loss

    def gradient(self, indices: list[int]) -> tuple[float, torch.Tensor]:
        """Loss and whole gradient of a batch at the present parameters."""
        batch = pack([self.data.examples[index] for index in indices])
        normaliser = float(sum(self.data.weights[index] for index in indices))
        self.model.train()
        loss, _ = self.objective(self.model(batch), batch, indices, normaliser)
        parameters = list(trainable_state(self.model).values())
        return loss.item(), flat(torch.autograd.grad(loss, parameters))


def exact_gradient(ours: Ours, cfg: Config, indices: list[int]) -> torch.Tensor:
    """The gradient of `Ours.gradient`, at the same parameters, by transformers' own forward passes in fp64."""
    from transformers import AutoModelForCausalLM

    plain = PackedModel(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).requires_grad_(False), "fp32")
    plain.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_adapter(plain, DPO_ADAPTER, cfg.dpo)
    plain.lm.train().double()
    parameters, present = trainable_state(plain), trainable_state(ours.model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(present[name])
    normaliser = float(sum(ours.data.weights[index] for index in indices))
    for index in indices:
        example = ours.data.examples[index]
        logps = []
        for completion in example.completions:
            logits_TV = plain.lm(input_ids=torch.tensor([[*example.prompt, *completion]]), use_cache=False).logits[0]
            log_softmax_CV = logits_TV[len(example.prompt) - 1 : -1].log_softmax(1)
            logps.append(log_softmax_CV.gather(1, torch.tensor(completion)[:, None])[:, 0])
        loss, _ = ours.objective(torch.cat(logps), pack([example]), [index], normaliser)
        loss.backward()
    return flat(parameter.grad for parameter in parameters.values())


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


class Trl:
    """TRL's trainer, an optimiser step at a time over the same pairs."""

    def __init__(self, kind: str, cfg: Config, rows: list[Preference], **options: Any) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

        torch.manual_seed(0)
        self.kind, self.micro = kind, options.pop("micro")
        dtype = options.pop("dtype", torch.float32)
        section = cfg.dpo if kind == "dpo" else cfg.sft
        arguments = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": self.micro,
            "bf16": cfg.model.precision == "bf16",
            "use_cpu": True,
            "max_length": None,
            "optim": "adamw_torch_fused",
            "learning_rate": section.learning_rate,
            "report_to": [],
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        } | options
        rank, alpha = section.lora_rank, section.lora_alpha
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
        tokenizer = load_tokenizer(BASE)
        common = {"processing_class": tokenizer, "peft_config": lora}
        turns = [[message.model_dump() for message in row.prompt] for row in rows]
        answers = {side: [[{"role": "assistant", "content": getattr(row, side)}] for row in rows] for side in SIDES}
        if kind == "dpo":
            arguments |= {"beta": cfg.dpo.beta}
            data = Dataset.from_dict({"prompt": turns} | answers)
            self.trainer = DPOTrainer(model, args=DPOConfig(**arguments), train_dataset=data, **common)
            self.trainer.precompute_ref_logps = True
        else:
            arguments |= {"completion_only_loss": True}
            data = Dataset.from_dict({"prompt": turns, "completion": answers["chosen"]})
            self.trainer = SFTTrainer(model, args=SFTConfig(**arguments), train_dataset=data, **common)
        trainer = self.trainer
        if arguments["gradient_checkpointing"]:
            # transformers does this in train(), which is not called here.
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer.create_optimizer_and_scheduler(10_000)
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
        # Our tokens, which end with the turn: TRL predicts the newline that the template writes after it, too.
        for row, (prompt, completions, *_) in zip(self.rows, pair_examples(tokenizer, rows), strict=True):
            chosen, rejected = map(list, completions)
            if kind == "dpo":
                row |= {"prompt_ids": list(prompt), "chosen_ids": chosen, "rejected_ids": rejected}
            else:
                row |= {"input_ids": [*prompt, *chosen], "labels": [-100] * len(prompt) + chosen}
        if kind == "dpo":
            self.refer(np.full((len(rows), 2), -200.0))

    def refer(self, logps: Any) -> None:
        """Take these reference log-probs, [pairs, 2], nats."""
        names = ("ref_chosen_logps", "ref_rejected_logps")
        for row, values in zip(self.rows, logps.tolist(), strict=True):
            row |= dict(zip(names, values, strict=True))

    def backward(self, indices: list[int]) -> float:
        parts = [indices[first : first + self.micro] for first in range(0, len(indices), self.micro)]
        self.trainer.current_gradient_accumulation_steps = len(parts)
        batches = [self.trainer.data_collator([self.rows[index] for index in part]) for part in parts]
        count = None if self.kind == "dpo" else sum((batch["labels"] != -100).sum() for batch in batches)
        self.model.train()
        loss = 0.0
        for batch in batches:
            inputs = self.trainer._prepare_inputs(batch)
            loss += self.trainer.training_step(self.model, inputs, num_items_in_batch=count).item()
        return loss

    def step(self, indices: list[int]) -> float:
        loss = self.backward(indices)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def like(self, ours: Ours) -> None:
        """Take over our adapter's parameters and reference log-probs."""
        if self.kind == "dpo":
            self.refer(ours.reference)
        mine = {name.replace(f".{DPO_ADAPTER}.", ".default."): p for name, p in trainable_state(ours.model.lm).items()}
        with torch.no_grad():
            for name, parameter in self.trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(mine[name])

    def gradient(self, indices: list[int], names: list[str]) -> tuple[float, torch.Tensor]:
        loss = self.backward(indices)
        found = dict(self.trainer.model.named_parameters())
        gradient = flat([found[name].grad for name in names])
        self.optimizer.zero_grad()
        return loss, gradient


SIDES = ("chosen", "rejected")


def timed(step: Step) -> tuple[float, float]:
    """CPU seconds and wall seconds of one step."""
    cpu, wall = time.process_time(), time.monotonic()
    step()
    return time.process_time() - cpu, time.monotonic() - wall


def search(kind: str, cfg: Config, rows: list[Preference], candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CPU and wall time of TRL's settings: medians of steps in turn, after a warm one each."""
    indices = list(range(cfg.dpo.batch_size))
    AcceleratorState._reset_state()
    arms = [Trl(kind, cfg, rows[: len(indices)], **candidate) for candidate in candidates]
    times = [[timed(partial(trl.step, indices)) for trl in arms] for _ in range(1 + SEARCH_ROUNDS)][1:]
    found = []
    for candidate, measured in zip(candidates, zip(*times, strict=True), strict=True):
        cpu, wall = (statistics.median(values) for values in zip(*measured, strict=True))
        found.append({"settings": {key: str(value) for key, value in candidate.items()}, "cpu_s": cpu, "wall_s": wall})
        print(f"  TRL {kind} {cfg.model.precision} {found[-1]}", flush=True)
    return found


def compare(
    kind: str, cfg: Config, rows: list[Preference], options: dict[str, Any], rounds: int, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Paired steps, first ours then TRL's and the other way round.

    A counted step follows one of its own side that is not counted, so that it finds the memory as in a training alone:
    ours keeps what the step before has freed, TRL leaves it to the C library.
    """
    # accelerate has one state in a process, and TRL asks for another precision in it than ours.
    AcceleratorState._reset_state()
    ours = Ours(kind, cfg, rows, dtype)
    ours.step()
    AcceleratorState._reset_state()
    trl = Trl(kind, cfg, rows, **options)
    trl.like(ours)
    names = [name.replace(f".{DPO_ADAPTER}.", ".default.") for name in trainable_state(ours.model.lm)]
    rounds = min(rounds, (len(ours.batches) - 1) // 2)
    first = ours.batches[0]
    our_loss, our_gradient = ours.gradient(first)
    trl_loss, trl_gradient = trl.gradient(first, names)
    exact = exact_gradient(ours, cfg, first)
    scale = exact.norm()
    result: dict[str, Any] = {
        "conditions": {"trl": {key: str(value) for key, value in options.items()}, "ours": cfg.model.precision},
        "loss_difference": abs(our_loss - trl_loss) / max(abs(trl_loss), 1e-9),
        "gradient_difference": float((our_gradient - trl_gradient).norm() / trl_gradient.norm()),
        "gradient_error_ours": float((our_gradient - exact).norm() / scale),
        "gradient_error_trl": float((trl_gradient - exact).norm() / scale),
        "ratios": [],
        "wall_ratios": [],
    }
    for number in range(1, rounds + 1):
        measured = {}
        for side in ("trl", "ours") if number % 2 else ("ours", "trl"):
            configure_malloc(side == "ours")
            for batch in ours.batches[2 * number - 1 : 2 * number + 1]:  # the second is counted
                measured[side] = timed(ours.step if side == "ours" else partial(trl.step, batch))
        theirs, mine = measured["trl"], measured["ours"]
        ratios = f"CPU {theirs[0] / mine[0]:.2f} wall {theirs[1] / mine[1]:.2f}"
        seconds = f"TRL's CPU {theirs[0]:.0f} s, ours {mine[0]:.0f} s"
        print(f"  {kind} {cfg.model.precision} {ratios} ({seconds})", flush=True)
        result["ratios"].append(theirs[0] / mine[0])
        result["wall_ratios"].append(theirs[1] / mine[1])
    return result | {
        "median": statistics.median(result["ratios"]),
        "median_wall": statistics.median(result["wall_ratios"]),
    }


def peak(side: str, checkpointing: bool, precision: str = "fp32", length: int = LONG) -> dict[str, float]:
    """Peak memory and the seconds of the second step for one pair, in a process of its own."""
    words = [sys.executable, __file__, "--child", side, "--precision", precision]
    words += ["--length", str(length), *(["--checkpointing"] if checkpointing else [])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {side} {precision} checkpointing={checkpointing}: {found}", flush=True)
    return found


def child(side: str, checkpointing: bool, precision: str, length: int) -> None:
    """Two steps on the pair that comes closest to `length` tokens, prompt and longer answer."""
    rows = read_rows(ROOT / "data" / "preferences" / "train.jsonl", Preference)
    sizes = [len(pair.prompt) + max(map(len, pair.completions)) for pair in pair_examples(load_tokenizer(BASE), rows)]
    index = min(range(len(rows)), key=lambda at: abs(sizes[at] - length))
    rows = [rows[index]] * 2
    sets = [f"model.precision={precision}", f"model.gradient_checkpointing={str(checkpointing).lower()}"]
    cfg = config(*sets, "dpo.batch_size=1")
    step: Step
    if side == "ours":
        step = Ours("dpo", cfg, rows).step
    else:
        step = partial(Trl("dpo", cfg, rows, micro=1, gradient_checkpointing=checkpointing).step, [0])
    step()
    _, wall = timed(step)
    print(json.dumps({"tokens": sizes[index], "seconds": wall, "peak_mib": peak_memory_mib()}))


def overhead() -> float:
    """Share of a DPO stage's steps that data preparation and logging take: both stages' own code, real MLflow."""
    rows = sample(8)
    cfg = config("dpo.eval_every_steps=0")
    with tempfile.TemporaryDirectory() as home:
        os.environ["KUBEALIGN_HOME"] = home
        started = time.monotonic()
        pair_examples(load_tokenizer(BASE), rows)
        prepared = time.monotonic() - started
        ours = Ours("dpo", cfg, rows)
        with stage_run("bench", {}) as run:
            records = [record for record, _ in zip(ours.steps, range(2), strict=False)]
            started = time.monotonic()
            run.log_metrics([(record.step, step_metrics(record)) for record in records])
            logged = time.monotonic() - started
    return (prepared + logged) / sum(record.seconds for record in records)


def table(results: dict[str, Any]) -> str:
    """The rows of docs/performance.md."""
    trl = "at its best" if native_precision() == "bf16" else "in fp32, as the machine has no bf16 in hardware"
    names = {
        "dpo_fp32": "DPO, fp32, TRL at its best",
        "dpo_fp32_like_for_like": "DPO, fp32, neither with gradient checkpointing",
        "dpo_bf16": f"DPO, bf16, TRL {trl}",
        "dpo_bf16_like_for_like": "DPO, bf16, both with fp32 weights under autocast, no checkpointing",
        "sft_fp32_best": "SFT, fp32, TRL at its best",
        "sft_fp32_default": "SFT, fp32, TRL's default",
    }
    lines = [
        "| step, TRL 1.16 / ours | CPU time | wall time | gradient error, ours | TRL |",
        "|---|---|---|---|---|",
    ]
    for key, name in names.items():
        if "not_measured" in results.get(key, {}):
            lines.append(f"| {name} | not measured: {results[key]['not_measured']} | | | |")
        elif key in results:
            found = results[key]
            errors = f"{found['gradient_error_ours']:.1e} | {found['gradient_error_trl']:.1e}"
            lines.append(f"| {name} | {found['median']:.2f} | {found['median_wall']:.2f} | {errors} |")
    lines += ["", "| peak memory, one pair, fp32 | ours, MiB | TRL, MiB | ours / TRL |", "|---|---|---|---|"]
    for key, name in (("memory_fp32", "as shipped"), ("memory_fp32_checkpointing", "gradient checkpointing on both")):
        if key in results:
            found = results[key]
            lines.append(f"| {name} | {found['ours_mib']:.0f} | {found['trl_mib']:.0f} | {found['median']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted pairs of steps per arm")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "training.json")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=LONG, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.checkpointing, arguments.precision, arguments.length)
        return
    fp32, bf16, shipped = config("model.precision=fp32"), config("model.precision=bf16"), native_precision()
    rows = sample((2 * arguments.rounds + 1) * max(fp32.dpo.batch_size, fp32.sft.batch_size))
    parts = Parts(arguments.out.with_suffix(".partial.json"))
    threads = torch.get_num_threads()
    parts.measure("machine", lambda: {"cpu": platform.machine(), "threads": threads, "native_precision": shipped})
    micros: list[dict[str, Any]] = [{"micro": size} for size in (1, 2, 4)]
    recompute = {"micro": 1, "gradient_checkpointing": True}
    candidates = {
        "dpo_fp32": ("dpo", fp32, [*micros, recompute]),
        "dpo_bf16": (
            "dpo",
            bf16,
            [*micros[:2], recompute, *({**each, "dtype": torch.bfloat16} for each in (micros[0], recompute))],
        ),
        "sft_fp32": ("sft", fp32, [*micros, recompute]),
    }
    if shipped != "bf16":
        del candidates["dpo_bf16"]
    best: dict[str, dict[str, Any]] = {}
    for name, (kind, cfg, options) in candidates.items():
        tried = parts.measure(f"search_{name}", partial(search, kind, cfg, rows, options))
        best[name] = options[min(range(len(tried)), key=lambda index: tried[index]["cpu_s"])]
        gc.collect()
    # By software bf16 takes TRL many times as long as fp32, so there it is at its best in fp32.
    best.setdefault("dpo_bf16", {**best["dpo_fp32"], "bf16": False})
    # TRL's own defaults, but for the precision: 8 examples in a pass, with gradient checkpointing.
    default = {"micro": 8, "gradient_checkpointing": True}
    like = {"micro": 1, "dtype": torch.float32}
    arms = {
        "dpo_fp32": ("dpo", fp32, best["dpo_fp32"], None),
        "dpo_fp32_like_for_like": ("dpo", fp32, micros[0], None),
        "dpo_bf16": ("dpo", bf16, best["dpo_bf16"], None),
        "dpo_bf16_like_for_like": ("dpo", bf16, like, torch.float32),
        "sft_fp32_best": ("sft", fp32, best["sft_fp32"], None),
        "sft_fp32_default": ("sft", fp32, default, None),
    }
    measured: list[str] = []
    for name, (kind, cfg, settings, dtype) in arms.items():
        if settings is like and shipped != "bf16":
            parts.measure(name, lambda: {"not_measured": "this machine has no bf16 in hardware"})
            continue
        same = next((known for known in measured if arms[known] == arms[name]), None)
        if same:
            # TRL's best has no gradient checkpointing: that is like for like already.
            found = parts.measure(name, partial(parts.results.__getitem__, same))
        else:
            found = parts.measure(name, partial(compare, kind, cfg, rows, settings, arguments.rounds, dtype))
            measured.append(name)
        print(f"{name}: median CPU {found['median']:.2f}, wall {found['median_wall']:.2f}", flush=True)
        gc.collect()
    for name, checkpointing in (("memory_fp32", False), ("memory_fp32_checkpointing", True)):
        parts.measure(name, partial(memory, checkpointing))
    sizes = (256, 512, 1024, 2048)
    parts.measure(f"sizes_{shipped}", lambda: [peak("ours", False, shipped, length) for length in sizes])
    parts.measure("overhead", overhead)
    parts.finish(arguments.out)
    page = ROOT / "docs" / "performance.md"
    page.write_text(MARK.sub(lambda found: found[1] + table(parts.results) + found[2], page.read_text()))
    print(table(parts.results))
    print(f"data preparation and logging: {parts.results['overhead']:.1%} of the steps; written to {arguments.out}")


class Parts:
    """What has been measured so far, kept in a file, so that an interrupted benchmark goes on."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, Any] = read_json(file) if file.is_file() else {}

    def measure(self, name: str, part: Callable[[], Any]) -> Any:
        if name not in self.results:
            self.results[name] = part()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.results)
        return self.results[name]

    def finish(self, out: Path) -> None:
        write_json(out, self.results)
        self.file.unlink()


def memory(checkpointing: bool) -> dict[str, Any]:
    """Peak memory of one pair's step, ours and TRL's."""
    ours, trl = peak("ours", checkpointing), peak("trl", checkpointing)
    ratio = ours["peak_mib"] / trl["peak_mib"]
    return {
        "conditions": {"tokens": ours["tokens"], "gradient_checkpointing": checkpointing},
        "ours_mib": ours["peak_mib"],
        "trl_mib": trl["peak_mib"],
        "ratios": [ratio],
        "median": ratio,
    }


if __name__ == "__main__":
    main()
