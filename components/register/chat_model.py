"""The registered model's own code: answers chat messages with plain transformers. It is copied beside the weights, so
it must not import anything of the project that made it.

The artifacts hold either `model`, whole weights, or `adapter` and `tokenizer` with `base.json`, which names the base
model's version in the registry and the sha256 of its files. KUBEALIGN_BASE may name a folder with that base model for
places that see no registry.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import mlflow


class ChatModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers conversations; weights in safetensors, prompt by the model's chat template."""

    def load_context(self, context: Any) -> None:
        """Load tokenizer and weights from the artifacts, never from a hub."""
        from transformers import AutoTokenizer

        found = {name: Path(path) for name, path in context.artifacts.items()}
        folder = found["tokenizer"] if "tokenizer" in found else found["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.ends = {name: generation[name] for name in ("eos_token_id", "pad_token_id")}
        if "base" not in found:
            self.model = _load(found["model"])
            return
        from peft import PeftModel

        wanted = json.loads(found["base"].read_text(encoding="utf-8"))
        base = _load(_base(wanted))
        if wanted.get("precision") == "bf16":
            base = base.bfloat16().float()  # as the adapter was trained on it
        self.model = PeftModel.from_pretrained(base, found["adapter"], local_files_only=True).eval()

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One answer per conversation.

        Args:
            context: unused here, as the model is loaded already.
            model_input: a table with a column `messages`, each a list of {role, content}.
            params: max_new_tokens; temperature, 0 for greedy; seed, for a temperature above 0.
        """
        import torch

        settings = {"max_new_tokens": 256, "temperature": 0.0, "seed": 0} | (params or {})
        sampling: dict[str, Any] = {"do_sample": False}
        if settings["temperature"] > 0:
            torch.manual_seed(settings["seed"])
            sampling = {"do_sample": True, "temperature": settings["temperature"]}
        answers = []
        for messages in model_input["messages"]:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            inputs = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=settings["max_new_tokens"],
                    **self.ends,
                    **sampling,
                )
            new = output[0, inputs["input_ids"].shape[1] :]
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True).strip())
        return answers


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def _base(wanted: dict[str, Any]) -> Path:
    """The folder of the base model, every file of it checked before it is loaded."""
    named = os.environ.get("KUBEALIGN_BASE")
    folder = Path(named or mlflow.artifacts.download_artifacts(artifact_uri=wanted["reference"]))
    for name, expected in wanted["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder}: {name} is missing; expected the base model {wanted['reference']}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{path}: not the file of the base model {wanted['reference']} that was trained on")
    return folder


mlflow.models.set_model(ChatModel())
