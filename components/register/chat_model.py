"""The registered model's own code: answers chat messages with plain transformers. It is copied beside the weights, so
it must not import anything of the project that made it.
"""

from typing import Any

import mlflow


class ChatModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers conversations; weights in safetensors, prompt by the model's chat template."""

    def load_context(self, context: Any) -> None:
        """Load tokenizer and weights from the artifacts, never from a hub."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()

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
                    pad_token_id=self.tokenizer.eos_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                    **sampling,
                )
            new = output[0, inputs["input_ids"].shape[1] :]
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True).strip())
        return answers


mlflow.models.set_model(ChatModel())
