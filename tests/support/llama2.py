"""A tiny model of Chinese LLaMA-2's kind, with a sentencepiece tokenizer that is trained here."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.dataset.chat import choose_template, load_tokenizer
from tests.conftest import ROOT

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model of Llama 2's settings."""
    lines = (ROOT / "data" / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [line for row in lines for line in json.loads(row)["chosen"].splitlines() if line.strip()]
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:120]),
        model_writer=proto,
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())


@pytest.fixture(scope="module")
def chinese_llama(pieces: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the tokenizer files of Chinese LLaMA-2, after fetch has put the template in."""
    folder = tmp_path_factory.mktemp("models") / "chinese-llama-2"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=pieces.get_piece_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 4096,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_fast": False,
    }
    settings |= {name: {"__type": "AddedToken", "content": text} | plain for name, text in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = {name: {"content": text} | plain for name, text in special.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(own))
    assert load_tokenizer(folder).chat_template is None
    (folder / "chat_template.jinja").write_text(choose_template("llama2", None), encoding="utf-8")
    return folder
