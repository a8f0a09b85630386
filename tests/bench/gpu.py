"""The engine on one GPU against TRL: LoRA DPO steps on random weights of real shapes and pairs of real lengths.

`make bench-gpu`, or on a machine with nothing but torch, transformers, peft, accelerate, trl and datasets:
`python tests/bench/gpu.py --work checks 1b 8b --out build/bench/gpu.json`. Random weights and tokens cost what real
ones cost. `gpu_lengths.json` holds the (prompt, chosen, rejected) token counts of the 600 embedded pairs; `1b-long` and
`8b-long` take prompts of 2,048 tokens with the same answers. TRL runs in each of the listed settings, its best counts.
A model-FLOPs utilisation counts each token of a shared prompt once, and is of the matrix product rate measured first.
`--device cpu --work checks tiny` is a dry run without a GPU.
"""

import argparse
import gc
import inspect
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from components.common.files import write_json
from components.engine import attention, loop, objectives
from components.engine.models import DPO_ADAPTER, PackedModel, add_lora, load_causal_lm, max_packing_error
from components.engine.packing import Example, pack, plan_steps

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary
    "tiny": (64, 2, 4, 2, 128, 512),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
REFERENCE_LOGP = -200.0
BETA = 0.001
OURS = {
    "tiny": [(4096, False)],
    "1b": [(16384, False), (32768, False)],
    "8b": [(8192, False), (12288, False), (16384, True)],
}
"""Tokens of a pass, and whether activations are made again."""
THEIRS = {
    "tiny": [(2, False, False)],
    "1b": [(4, False, False), (8, False, False), (16, True, False), (8, False, True)],
    "8b": [(1, False, False), (2, False, False), (8, True, False), (2, False, True)],
}
"""TRL's micro-batch, gradient checkpointing, and Liger's layers: last, as they took minutes to start once."""

SETTINGS = loop.LoopSettings(
    epochs=100.0,
    max_steps=0,
    batch_size=16,
    max_tokens_per_microbatch=8192,
    learning_rate=1e-5,
    warmup_ratio=0.0,
    lr_scheduler="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    seed=0,
    checkpoint_every_s=1e9,
    eval_every_steps=0,
    early_stopping_patience=0,
)
"""Steps without end, and no checkpoint among those that are measured."""

Row = tuple[list[int], list[int], list[int]]


def config(shape: str) -> LlamaConfig:
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )


def pairs(n: int, vocabulary: int, longest: int, long_prompts: bool, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    lengths = json.loads(Path(__file__).with_name("gpu_lengths.json").read_text())
    if long_prompts:
        lengths = [[2048, c, r] for _, c, r in lengths if max(c, r) <= 1024]
    else:
        lengths = [each for each in lengths if each[0] + max(each[1:]) <= longest]
    rng.shuffle(lengths)

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    return [(draw(p), draw(c), draw(r)) for p, c, r in (lengths * 20)[:n]]


def adapt_attention() -> None:
    """Torch before 2.13 has no grouped heads in its variable-length attention: repeat the keys there."""
    own = attention.varlen_attn
    known = inspect.signature(own).parameters

    def grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        options.pop("enable_gqa")
        if "window_size" not in known:
            options.pop("window_size")
            options["is_causal"] = True
        repeats = query.shape[1] // key.shape[1]
        return own(query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), *args, **options)

    if "enable_gqa" not in known:
        print(f"torch {torch.__version__}: varlen_attn{tuple(known)}", flush=True)
        attention.varlen_attn = grouped


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def our_model(folder: Path, precision: str, checkpointing: bool = False, dropout: float = 0.0) -> PackedModel:
    lm = load_causal_lm(folder, precision)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PackedModel(lm, precision)
    model.lm = add_lora(model.lm, DPO_ADAPTER, 16, 32.0, dropout, "all-linear", 1)
    return model


def dpo_loss(token_logps_N: torch.Tensor, sequence_N: torch.Tensor, n_sequences: int) -> torch.Tensor:
    policy_S = objectives.sequence_logps(token_logps_N, sequence_N, n_sequences)
    reference_S, options = torch.full_like(policy_S, REFERENCE_LOGP), objectives.LossOptions(BETA)
    return objectives.preference_loss("sigmoid", policy_S, reference_S, policy_S, options)[0].sum()


class Ours:
    """Our loop, a step at a time."""

    def __init__(
        self, folder: Path, rows: list[Row], batch: int, device: str, tokens: int, checkpointing: bool
    ) -> None:
        model = our_model(folder, "bf16", checkpointing)
        examples = [Example(p, [c, r]) for p, c, r in rows]

        def objective(logps_N: torch.Tensor, packed: Any, indices: list[int], normaliser: float) -> Any:
            return dpo_loss(logps_N, packed.sequence_N, packed.n_sequences) / normaliser, {}

        data = loop.TrainingSet(examples, [str(i) for i in range(len(rows))], [1.0] * len(rows))
        settings = replace(SETTINGS, batch_size=batch, max_tokens_per_microbatch=tokens)
        self.model = model
        self.steps = loop.train(model, data, objective, settings, Path(tempfile.mkdtemp()), print)

    def step(self) -> float:
        return next(self.steps).loss


class Trl:
    """TRL's trainer, an optimiser step at a time."""

    def __init__(
        self, folder: Path, rows: list[Row], batch: int, device: str, micro: int, checkpointing: bool, liger: bool
    ) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
        if liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
        words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, **{"unk_token": "a"}))
        special = {"pad_token": "<pad>", "eos_token": "<eos>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        arguments = DPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro, bf16=True, use_cpu=device == "cpu",
            max_length=None, optim="adamw_torch_fused", learning_rate=1e-5, report_to=[], disable_tqdm=True,
            gradient_checkpointing=checkpointing, beta=BETA,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": ["a"] * batch, "chosen": ["a"] * batch, "rejected": ["a a"] * batch})
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.trainer = DPOTrainer(
            model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
        self.trainer.precompute_ref_logps = True
        if checkpointing:
            self.trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trainer.create_optimizer_and_scheduler(10_000)
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.rows = [
            {
                "prompt_ids": p,
                "chosen_ids": c,
                "rejected_ids": r,
                "ref_chosen_logps": REFERENCE_LOGP,
                "ref_rejected_logps": REFERENCE_LOGP,
            }
            for p, c, r in rows
        ]
        self.plan = plan_steps(len(rows), 100.0, batch, 0)  # as ours
        self.micro, self.at = micro, 0

    def backward(self, rows: list[dict[str, Any]]) -> float:
        rows = sorted(rows, key=lambda r: len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])))
        parts = [rows[i : i + self.micro] for i in range(0, len(rows), self.micro)]
        self.trainer.current_gradient_accumulation_steps = len(parts)
        self.model.train()
        loss = 0.0
        for part in parts:
            inputs = self.trainer._prepare_inputs(self.trainer.data_collator(part))
            loss += self.trainer.training_step(self.model, inputs).item()
        return loss

    def step(self) -> float:
        rows = [self.rows[index] for index in self.plan[self.at]]
        self.at += 1
        loss = self.backward(rows)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def measure(make: Callable[[], Any], steps: int, device: str, batch: int) -> dict[str, Any]:
    gc.collect()
    AcceleratorState._reset_state(True)  # ours and TRL's trainer set it up differently
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    arm = None
    try:
        arm = make()
        arm.step()
        sync(device)
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            arm.step()
            sync(device)
            times.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
        found: dict[str, Any] = {
            "s_per_step": statistics.median(times),
            "pairs_per_s": batch / statistics.median(times),
            "peak_mib": peak,
            "all": times,
        }
    except Exception as error:  # one setting that does not fit must not end the script
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    arm = None
    gc.collect()
    return found


def matmul_rate(device: str) -> float:
    """bf16 FLOP/s of a large product on random data."""
    n = 8192 if device == "cuda" else 512
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    sync(device)
    started = time.perf_counter()
    for _ in range(10):
        left @ right
    sync(device)
    return 10 * 2 * n**3 / (time.perf_counter() - started)


def flops(shape: str, rows: list[Row]) -> float:
    """Model FLOPs of a LoRA DPO step over these rows: no weight gradients, each prompt once."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    width = hidden // heads
    per_token = layers * (2 * hidden * hidden + 2 * hidden * kv_heads * width + 3 * hidden * intermediate)
    tokens = sum(len(p) + len(c) + len(r) for p, c, r in rows)
    predicted = sum(len(c) + len(r) for _, c, r in rows)
    attention = 0.0
    for p, c, r in rows:
        seen = (len(p) + len(c)) ** 2 / 2 + len(r) * len(p) + len(r) ** 2 / 2
        attention += layers * 4 * hidden * seen * 3.5
    return 4.0 * per_token * tokens + 4.0 * hidden * vocabulary * predicted + attention


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 3) -> None:
    """LoRA's B is zero at the start; here it is not, so that every gradient is."""
    for name, parameter in sorted((_plain(n), p) for n, p in model.named_parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _plain(name: str) -> str:
    name = name.replace(f".{DPO_ADAPTER}.", ".").replace(".default.", ".")
    return name[name.index("layers.") :]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        _plain(name): parameter.grad.detach().double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys(), (sorted(found)[:2], sorted(exact)[:2])
    error = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return (error / sum(float(each.square().sum()) for each in exact.values())) ** 0.5


def exact_gradients(folder: Path, rows: list[Row], device: str) -> dict[str, torch.Tensor]:
    """By transformers' and peft's own code in fp64, sequence by sequence."""
    from peft import LoraConfig, get_peft_model

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").to(device)
    model = get_peft_model(lm, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train().double()
    randomize(model)
    for prompt, chosen, rejected in rows:
        logps, sequence = [], []
        for number, answer in enumerate((chosen, rejected)):
            logits = model(input_ids=torch.tensor([[*prompt, *answer]], device=device), use_cache=False).logits[0]
            target = torch.tensor(answer, device=device)[:, None]
            logps.append(logits[len(prompt) - 1 : -1].log_softmax(1).gather(1, target)[:, 0])
            sequence += [number] * len(answer)
        (dpo_loss(torch.cat(logps), torch.tensor(sequence, device=device), 2) / len(rows)).backward()
    return gradients(model)


def our_gradients(folder: Path, rows: list[Row], precision: str, device: str, checkpointing: bool = False) -> Any:
    model = our_model(folder, precision, checkpointing)
    randomize(model)
    model.train()
    packed = pack([Example(p, [c, r]) for p, c, r in rows]).to(model.device)
    logps_N = model(packed)
    (dpo_loss(logps_N, packed.sequence_N, packed.n_sequences) / len(rows)).backward()
    return gradients(model), logps_N.detach().cpu()


def checks(device: str, shape: str) -> dict[str, Any]:
    """Exactness on the device."""
    results: dict[str, Any] = {}
    folder = write_model(shape, device, torch.float32)
    rows = pairs(4, SHAPES[shape][5], 700, False, seed=1)
    model = our_model(folder, "fp32")
    randomize(model)
    packed = pack([Example(p, [c, r]) for p, c, r in rows])
    results["packed against plain, fp32, nats a token"] = max_packing_error(model)
    with torch.no_grad():
        here = model(packed.to(model.device)).cpu()
        on_cpu = model.to("cpu")(packed)
    results["log-probs GPU against CPU, fp32, nats a token"] = float((here - on_cpu).abs().max())
    del model
    exact = exact_gradients(folder, rows, device)
    for precision in ("fp32", "bf16"):
        for checkpointing in (False, True):
            found, _ = our_gradients(folder, rows, precision, device, checkpointing)
            results[f"gradient error, {precision}, checkpointing {checkpointing}, ours"] = relative(found, exact)
    trl = Trl(folder, rows, 4, device, 1, False, False)
    randomize(trl.model)
    trl.backward(trl.rows)
    results["gradient error, bf16, TRL (bf16 weights)"] = relative(gradients(trl.model), exact)
    del trl
    bf16 = our_model(folder, "bf16")
    randomize(bf16)
    results["packed against plain, bf16, nats a token"] = max_packing_error(bf16)
    del bf16
    first, again = (our_gradients(folder, rows, "bf16", device)[0] for _ in range(2))
    results["gradient twice, bf16, relative difference"] = relative(first, again)
    return results


def resume(device: str) -> dict[str, Any]:
    """Losses of a run with dropout that was stopped after step 2 against one that was not."""
    folder = write_model("tiny", device, torch.float32)
    rows = pairs(16, 512, 700, False, seed=2)

    def run(store: Path, steps: int) -> list[float]:
        model = our_model(folder, "bf16", dropout=0.1)
        examples = [Example(p, [c, r]) for p, c, r in rows]
        data = loop.TrainingSet(examples, [str(i) for i in range(16)], [1.0] * 16)
        settings = replace(
            SETTINGS,
            max_steps=6,
            batch_size=4,
            max_tokens_per_microbatch=4096,
            learning_rate=1e-3,
            checkpoint_every_s=0.0,
        )

        def objective(logps_N: torch.Tensor, packed: Any, indices: list[int], normaliser: float) -> Any:
            return dpo_loss(logps_N, packed.sequence_N, packed.n_sequences) / normaliser, {}

        found = []
        for record in loop.train(model, data, objective, settings, store, lambda sentence: None):
            found.append(record.loss)
            if len(found) == steps:
                break
        return found

    whole = run(Path(tempfile.mkdtemp()), 6)
    store = Path(tempfile.mkdtemp())
    run(store, 3)
    torch.manual_seed(99)
    return {"whole": whole, "resumed": run(store, 6)}


def write_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(shape), dtype=dtype)
    model.save_pretrained(folder)
    return folder


def speed(name: str, options: argparse.Namespace, ceiling: float, results: dict[str, Any], started: float) -> None:
    shape, _, long_prompts = name.partition("-")
    device, batch = options.device, options.batch
    folder = write_model(shape, device)
    rows = pairs(batch * (options.steps + 2), SHAPES[shape][5], 2048, bool(long_prompts))
    counted = rows[: batch * 4]
    work = flops(shape, counted) / len(counted) * batch
    found: dict[str, Any] = {"mean_tokens": statistics.mean(len(p) + len(c) + len(r) for p, c, r in rows), "arms": {}}
    results[name] = found
    arms: dict[str, Callable[[], Any]] = {}
    for tokens, checkpointing in OURS.get(shape, OURS["1b"]):
        arms[f"ours, {tokens} tokens, checkpointing {checkpointing}"] = (
            lambda tokens=tokens, checkpointing=checkpointing: Ours(folder, rows, batch, device, tokens, checkpointing)
        )
    for micro, checkpointing, liger in THEIRS.get(shape, THEIRS["1b"]):
        arms[f"TRL, {micro} pairs, checkpointing {checkpointing}, Liger {liger}"] = (
            lambda micro=micro, checkpointing=checkpointing, liger=liger: Trl(
                folder, rows, batch, device, micro, checkpointing, liger
            )
        )
    for arm, make in arms.items():
        if options.only and not arm.startswith(options.only):
            continue
        if time.monotonic() - started > options.budget_s:
            print("time is up", flush=True)
            break
        result = measure(make, options.steps, device, batch)
        if "s_per_step" in result:
            result["mfu"] = work / result["s_per_step"] / ceiling
        found["arms"][arm] = result
        write_json(options.out, results)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items() if k != "all"}
        print(f"{name}: {arm}: {shown} [{time.monotonic() - started:.0f} s]", flush=True)
    if not options.only:
        measure_ours_alone(folder, shape, device, found)
    best = {
        who: max(
            (v["pairs_per_s"] for k, v in found["arms"].items() if k.startswith(who) and "pairs_per_s" in v),
            default=0.0,
        )
        for who in ("ours", "TRL")
    }
    found["best"] = best
    print(f"{name}: best pairs/s {best}, ratio {best['ours'] / (best['TRL'] or float('nan')):.2f}", flush=True)


def measure_ours_alone(folder: Path, shape: str, device: str, found: dict[str, Any]) -> None:
    """SFT on rows of 1,024 tokens, every token but the first predicted; and scoring of held-out pairs."""
    vocabulary = SHAPES[shape][5]
    rng = random.Random(5)
    examples = [
        Example([1], [[rng.randrange(vocabulary) for _ in range(1023)]]) for _ in range(8 if device == "cuda" else 1)
    ]

    def objective(logps_N: torch.Tensor, packed: Any, indices: list[int], normaliser: float) -> Any:
        return -logps_N.sum() / normaliser, {}

    AcceleratorState._reset_state(True)
    model = our_model(folder, "bf16")
    data = loop.TrainingSet(examples, [str(i) for i in range(len(examples))], [1023.0] * len(examples))
    settings = replace(SETTINGS, batch_size=len(examples))
    steps = loop.train(model, data, objective, settings, Path(tempfile.mkdtemp()), print)
    next(steps)
    sync(device)
    started = time.perf_counter()
    for _ in range(4):
        next(steps)
    sync(device)
    found["SFT, tokens a second"] = 4 * 1024 * len(examples) / (time.perf_counter() - started)
    held_out = [Example(p, [c, r]) for p, c, r in pairs(32, vocabulary, 2048, False, seed=9)]
    loop.completion_logps(model, held_out[:2])
    sync(device)
    started = time.perf_counter()
    loop.completion_logps(model, held_out)
    seconds = time.perf_counter() - started
    found["scoring, tokens a second"] = sum(example.n_tokens for example in held_out) / seconds
    print({name: value for name, value in found.items() if name != "arms"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", nargs="+", default=["checks", "1b", "8b", "1b-long", "8b-long"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget-s", type=float, default=420)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("build/bench/gpu.json"))
    options = parser.parse_args()
    started = time.monotonic()
    adapt_attention()
    ceiling = matmul_rate(options.device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "matmul_tflops": ceiling / 1e12,
    }
    print(results, flush=True)
    for name in options.work:
        try:
            if name == "checks":
                results["checks"] = checks(options.device, "tiny" if options.device == "cpu" else "135m")
                print(json.dumps(results["checks"], indent=1), flush=True)
            elif name == "resume":
                results["resume"] = resume(options.device)
                print(json.dumps(results["resume"]), flush=True)
            else:
                speed(name, options, ceiling, results, started)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}"[:500], flush=True)
        write_json(options.out, results)


if __name__ == "__main__":
    main()
