"""Rows in the schemas of trainers and public data sets become ours; worked out by hand, in both languages."""

import bz2
import csv
import gzip
import json
import lzma
import time
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError, RowError
from components.dataset.language import guess_language
from components.dataset.records import read_lines
from components.dataset.rendered import has_markers, parse_rendered, strip_ending
from components.prepare.convert import RowDefaults, convert_files
from components.prepare.files import read_rows
from components.prepare.formats import FORMATS, convert, detect
from tests.conftest import ROOT
from tests.support.public_schemas import FILES, texts, write_files
from tests.tools.component_readmes import FORMATS_START, formats, renewed

Q, G, B = "What is the capital of France?", "It is Paris.", "Lyon, I think."
"""A question, a good and a bad answer."""


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 0.0}


def human(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def system(content: str) -> dict[str, str]:
    return said("system", content)


def user(content: str) -> dict[str, str]:
    return said("user", content)


def assistant(content: str) -> dict[str, str]:
    return said("assistant", content)


TURNS = [system("Be brief."), user("Hi"), assistant("Hello"), user(Q)]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant:"
HH_TURNS = [user("Hi"), assistant("Hello"), user("Who?")]
ANSWERS = {"chosen": G, "rejected": B}
PROMPT = [user(Q)]
BRIEF = [system("Be brief."), user(Q)]

SCHEMAS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "ours": (
        {"prompt": [user("法国的首都是哪里？")], "chosen": "巴黎。", "rejected": "里昂。"},
        [user("法国的首都是哪里？")],
    ),
    "trl: explicit prompt": ({"prompt": Q} | ANSWERS, PROMPT),
    "trl: conversational": ({"prompt": TURNS, "chosen": [assistant(G)], "rejected": [assistant(B)]}, TURNS),
    "trl: conversational, implicit": ({"chosen": [*TURNS, assistant(G)], "rejected": [*TURNS, assistant(B)]}, TURNS),
    "trl: prompt in both places": (
        {
            "prompt": PROMPT,
            "chosen": [*BRIEF, assistant(G)],
            "rejected": [system("Be brief."), user(Q + " "), assistant(B)],
        },
        BRIEF,
    ),
    "h4: text, dialogues, and the chosen one again": (
        {
            "prompt": Q,
            "prompt_id": "0a",
            "chosen": [user(Q), assistant(G)],
            "rejected": [user(Q), assistant(B)],
            "messages": [user(Q), assistant(G)],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
        PROMPT,
    ),
    "llama-factory: alpaca": (
        {"instruction": "Translate.", "input": "Rain", "system": "", "history": [["Hi", "Hello"]]} | ANSWERS,
        [user("Hi"), assistant("Hello"), user("Translate.\n\nRain")],
    ),
    "llama-factory: sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [human("human", "Hi"), human("gpt", "Hello"), human("human", Q)],
            "chosen": human("gpt", G),
            "rejected": human("gpt", B),
            "tools": "",
        },
        TURNS,
    ),
    "llama-factory: openai": ({"messages": BRIEF, "chosen": assistant(G), "rejected": assistant(B)}, BRIEF),
    "llama-factory: ranking list": ({"instruction": Q, "input": "", "output": [G, B]}, PROMPT),
    "axolotl: chatml.intel": ({"system": "Be brief.", "question": Q} | ANSWERS, BRIEF),
    "axolotl: chatml.icr": ({"system": "Be brief.", "input": Q} | ANSWERS, BRIEF),
    "axolotl: prompt_pairs": ({"system": "Be brief.", "prompt": Q} | ANSWERS, BRIEF),
    "axolotl: argilla": ({"instruction": Q, "chosen_response": G, "rejected_response": B}, PROMPT),
    "axolotl: ultra": (
        {"system": "Be brief.", "prompt": Q, "chosen": [user(Q), assistant(G)], "rejected": [user(Q), assistant(B)]},
        BRIEF,
    ),
    "axolotl: messages beside texts": ({"messages": BRIEF} | ANSWERS, BRIEF),
    "ms-swift: rejected_response": ({"messages": [*BRIEF, assistant(G)], "rejected_response": B}, BRIEF),
    "ms-swift: rejected_messages": (
        {"messages": [*BRIEF, assistant(G)], "rejected_messages": [*BRIEF, assistant(B)]},
        BRIEF,
    ),
    "ms-swift: query and response": (
        {"system": "Be brief.", "history": [["Hi", "Hello"]], "query": Q, "response": G, "rejected_response": B},
        TURNS,
    ),
    "openrlhf: an input template": ({"prompt": f"User: {Q}\nAssistant: "} | ANSWERS, PROMPT),
    "openrlhf": ({"context_messages": PROMPT, "chosen": [assistant(G)], "rejected": [assistant(B)]}, PROMPT),
    "nemo-rl: ranks from 0": (
        {
            "context": BRIEF,
            "completions": [
                {"rank": 1, "completion": [assistant(B)]},
                {"rank": 0, "completion": [assistant(G)]},
            ],
            "task_name": "x",
        },
        BRIEF,
    ),
    "helpsteer3": (
        {
            "domain": "general",
            "language": "english",
            "context": BRIEF,
            "response1": B,
            "response2": G,
            "overall_preference": 2,
            "individual_preference": [{"score": 2, "reasoning": "better"}],
        },
        BRIEF,
    ),
    "ultrafeedback": (
        {
            "source": "evol_instruct",
            "instruction": Q,
            "models": ["a", "b", "c"],
            "completions": [
                {"response": "Rome.", "overall_score": 3, "fine-grained_score": 2.5, "annotations": {}},
                {"response": G, "overall_score": 9.5, "fine-grained_score": 4.75, "custom_system_prompt": "x"},
                {"response": B, "overall_score": "2", "fine-grained_score": 1},
            ],
            "correct_answers": ["None"],
        },
        PROMPT,
    ),
    "nectar: ranks from 1": (
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [{"answer": B, "model": "a", "rank": 7.0}, {"answer": G, "model": "b", "rank": 1.0}],
            "turns": 1,
            "num_responses": 7,
            "source": ["lmsys"],
            "good_natured": True,
        },
        PROMPT,
    ),
    "hh": ({"chosen": f"{HH} {G}", "rejected": f"{HH} {B}"}, HH_TURNS),
    "hh with a prompt": ({"prompt": HH, "chosen": f" {G}", "rejected": f" {B}"}, HH_TURNS),
    "hh with a prompt and whole dialogues": ({"prompt": HH, "chosen": f"{HH} {G}", "rejected": f"{HH} {B}"}, HH_TURNS),
    "orca in Chinese": ({"系统": "Be brief.", "问题": Q, "好的回答": G, "差的回答": B}, BRIEF),
    "medicalgpt": (
        {"system": "", "history": [], "question": Q, "response_chosen": G, "response_rejected": B},
        PROMPT,
    ),
    "pku-saferlhf": (
        {"prompt": Q, "response_0": B, "response_1": G, "better_response_id": 1, "is_response_0_safe": True},
        PROMPT,
    ),
    "arena": (
        {"conversation_a": [user(Q), assistant(B)], "conversation_b": [user(Q), assistant(G)], "winner": "model_b"},
        PROMPT,
    ),
    "shp": ({"post_id": "x", "domain": "y", "history": Q, "human_ref_A": G, "human_ref_B": B, "labels": 1}, PROMPT),
    "stack exchange": ({"question": Q, "response_j": G, "response_k": B, "qid": 7}, PROMPT),
    "h4: answers of the judge beside them": (
        {"instruction": Q, "generations": [G, B], "rationales": ["x"], "ratings": [5, 1], "model_names": ["a", "b"]}
        | {"prompt": Q, "distilabel_metadata": {"raw": [user("x")]}, "chosen_rating": 5, "rejected_rating": 1}
        | {"chosen": [user(Q), assistant(G)], "rejected": [user(Q), assistant(B)]},
        PROMPT,
    ),
    "distilabel's orca pairs": (
        {"system": "Be brief.", "input": Q, "generations": [G, B], "order": ["chosen", "rejected"]}
        | {"labelling_prompt": [user("x")], "rating": [9.0, 3.0], "status": "unchanged", "original_chosen": G}
        | ANSWERS,
        BRIEF,
    ),
    "distilabel: generations and ratings": (
        {"instruction": Q, "generations": [B, "Rome.", G], "ratings": [1, 2, 5]},
        PROMPT,
    ),
    "answers and rewards": ({"prompt": Q, "responses": [B, G], "rewards": ["-1.5", "0.5"]}, PROMPT),
    "answers and ranks": ({"prompt": Q, "responses": [B, G], "ranks": [2, 1]}, PROMPT),
    "llama-factory: v1": (
        {
            "chosen_messages": [parts("system", "Be brief."), parts("user", Q), parts("assistant", G)],
            "rejected_messages": [parts("system", "Be brief."), parts("user", Q), parts("assistant", B)],
        },
        BRIEF,
    ),
    "llama-factory: history beside conversations": (
        {"system": "Be brief.", "history": '[["Hi", "Hello"]]', "conversations": [human("human", Q)], "tools": "[]"}
        | {"chosen": human("gpt", G), "rejected": human("gpt", B)},
        TURNS,
    ),
    "ms-swift: channel, margin and losses of turns": (
        {"messages": [*TURNS[:2], assistant("Hello") | {"loss": False, "loss_scale": 0.0}, user(Q), assistant(G)]}
        | {"rejected_response": [assistant(B)], "channel": "math", "margin": 0.5},
        TURNS,
    ),
    "ms-swift: exchanges": (
        {"system": "Be brief.", "rejected_response": B}
        | {"conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": Q, "assistant": G}]},
        TURNS,
    ),
    "helpsteer2: strength of the preference": (
        {"split": "train", "prompt": Q, "response_1": G, "response_2": B, "preference_strength": -2}
        | {"preference_statement": "1 is better", "all_preferences_unprocessed": [{"strength": -2, "statement": "x"}]},
        PROMPT,
    ),
    "alpaca-farm, rlcd": ({"instruction": Q, "input": None, "output_1": B, "output_2": G, "preference": 2.0}, PROMPT),
    "webgpt": ({"question": Q, "answer_0": G, "answer_1": B, "score_0": "0.5", "score_1": "-0.5"}, PROMPT),
    "lmsys: lists written as JSON": (
        {"id": 1, "model_a": "x", "model_b": "y", "prompt": json.dumps([Q]), "response_a": json.dumps([B])}
        | {"response_b": json.dumps([G]), "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        PROMPT,
    ),
    "two answers and the better model": (
        {
            "messages": BRIEF,
            "model_a": "gpt-4",
            "model_b": "llama",
            "response_a": B,
            "response_b": G,
            "winner": "Llama",
        },
        BRIEF,
    ),
    "two answers in Chinese": ({"问题": Q, "回答A": B, "回答B": G, "更好": "回答B"}, PROMPT),
    "arena, whole": (
        {
            "question_id": "x",
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "judge": "u",
            "turn": 1,
            "anony": True,
        }
        | {"language": "English", "tstamp": 1.5, "toxic_chat_tag": {"t5": {"flagged": False}}}
        | {"openai_moderation": {"categories": {"hate": False}}}
        | {
            "conversation_a": [user(Q) | {"num_tokens": "3"}, assistant(B)],
            "conversation_b": [user(Q) | {"num_tokens": "3"}, assistant(G)],
        },
        PROMPT,
    ),
    "pku-saferlhf, whole": (
        {"prompt": Q, "response_0": G, "response_1": B, "response_0_source": "x", "response_0_sha256": "0a"}
        | {"better_response_id": 0, "safer_response_id": 1, "response_0_harm_category": {"Violence": False}},
        PROMPT,
    ),
    "rm-static: the chosen answer again": (
        {"prompt": HH, "response": f" {G}", "chosen": f" {G}", "rejected": f" {B}"},
        HH_TURNS,
    ),
    "cvalues": ({"prompt": Q, "pos_resp": G, "neg_resp": B, "pos_type": "拒绝为主", "neg_type": "风险回复"}, PROMPT),
    "hh in Chinese": (
        {"context": [{"role": "human", "text": Q}]}
        | {"chosen": {"role": "assistant", "text": G}, "rejected": {"role": "assistant", "text": B}},
        PROMPT,
    ),
    "traditional characters": ({"系統": "Be brief.", "問題": Q, "選擇的回答": G, "拒絕的回答": B}, BRIEF),
    "other Chinese names": ({"编号": "七", "提问": Q, "优质回答": G, "劣质回答": B, "类别": "地理"}, PROMPT),
    "accepted and refused in Chinese": ({"用户问题": Q, "接受的回答": G, "未采纳的答案": B}, PROMPT),
    "better and worse": ({"problem": Q, "better_response": G, "worse_response": B}, PROMPT),
    "camel case": ({"systemPrompt": "Be brief.", "userPrompt": Q, "chosenResponse": G, "rejectedResponse": B}, BRIEF),
    "wide letters and a byte order mark": ({"\ufeffｐｒｏｍｐｔ": Q} | ANSWERS, PROMPT),
    "a number as text, as tables have it": (
        {"prompt": Q, "score_chosen": "7.5", "score_rejected": "3", "flag": "True"} | ANSWERS,
        PROMPT,
    ),
    "null and empty beside messages": (
        {"prompt": [user(Q) | {"tool_calls": None, "audio": None}], "chosen": [assistant(G) | {"tool_calls": []}]}
        | {"rejected": [assistant(B)], "tools": [None], "images": [], "chat_template_kwargs": None},
        PROMPT,
    ),
    "roles in capitals": (
        {"prompt": [said("Human", Q)], "chosen": [said("Assistant", G)], "rejected": [said("ASSISTANT", B)]},
        PROMPT,
    ),
    "developer and parts of text": (
        {"prompt": [said("developer", "Be brief."), said("user", [{"type": "text", "text": Q}])]} | ANSWERS,
        BRIEF,
    ),
    "an empty system message": ({"prompt": [system(""), user(Q)]} | ANSWERS, PROMPT),
    "an empty system column": ({"system": " ", "prompt": Q, "history": []} | ANSWERS, PROMPT),
    "columns that say nothing to the model": (
        {"prompt": Q, "id": 7, "category": "geo", "chosen_model": "a", "margin": 1.5, "tools": None, "meta": {"a": 1}}
        | ANSWERS,
        PROMPT,
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_recognised_and_read_whole(name: str) -> None:
    row, prompt = SCHEMAS[name]
    format_name = detect(row)
    assert format_name is not None and FORMATS[format_name].kind == "preferences"
    answers = ("巴黎。", "里昂。") if name == "ours" else (G, B)
    assert [(found.prompt, found.answers) for found in convert(row, format_name)] == [(prompt, answers)]


def test_several_answers_make_a_pair_each() -> None:
    row = {"instruction": Q, "chosen": [G], "rejected": [B, "Rome."]}
    assert [found.answers for found in convert(row, str(detect(row)))] == [(G, B), (G, "Rome.")]


IMPLICIT = "the prompt is what both answers begin with, up to a whole word"
RENDERED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "ChatML": (
        {
            "prompt": "<|im_start|>system\nBe brief.<|im_end|>\n"
            f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
            "chosen": f"{G}<|im_end|>",
            "rejected": f"{B}<|im_end|>\n",
        },
        BRIEF,
    ),
    "Llama 2": (
        {
            "prompt": f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{Q} [/INST]",
            "chosen": f" {G} </s>",
            "rejected": f"{B}</s>",
        },
        BRIEF,
    ),
    "Llama 2, two turns": (
        {"prompt": f"<s>[INST] Hi [/INST] Hello </s><s>[INST] {Q} [/INST]"} | ANSWERS,
        [user("Hi"), assistant("Hello"), user(Q)],
    ),
    "Llama 3": (
        {
            "prompt": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            f"<|start_header_id|>user<|end_header_id|>\n\n{Q}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "chosen": f"{G}<|eot_id|>",
            "rejected": B,
        },
        BRIEF,
    ),
    "Gemma": (
        {
            "prompt": f"<bos><start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n",
            "chosen": f"{G}<end_of_turn>",
            "rejected": B,
        },
        PROMPT,
    ),
    "Zephyr": ({"prompt": f"<|system|>\nBe brief.</s>\n<|user|>\n{Q}</s>\n<|assistant|>\n"} | ANSWERS, BRIEF),
    "DeepSeek": (
        {
            "prompt": f"<｜begin▁of▁sentence｜><｜User｜>{Q}<｜Assistant｜>",
            "chosen": f"{G}<｜end▁of▁sentence｜>",
            "rejected": B,
        },
        PROMPT,
    ),
    "Vicuna": (
        {"prompt": f"A chat between a curious user and an assistant. USER: Hi ASSISTANT: Hello</s>USER: {Q} ASSISTANT:"}
        | ANSWERS,
        [system("A chat between a curious user and an assistant."), user("Hi"), assistant("Hello"), user(Q)],
    ),
    "Alpaca": (
        {
            "prompt": "Below is an instruction that describes a task. Write a response.\n\n"
            "### Instruction:\nTranslate.\n\n### Input:\nRain\n\n### Response:\n"
        }
        | ANSWERS,
        [system("Below is an instruction that describes a task. Write a response."), user("Translate.\n\nRain")],
    ),
    "Guanaco": (
        {"chosen": f"### Human: {Q}### Assistant: {G}", "rejected": f"### Human: {Q}### Assistant: {B}"},
        PROMPT,
    ),
    "DeepSeek with a system message": (
        {"prompt": f"<｜begin▁of▁sentence｜>Be brief.<｜User｜>{Q}<｜Assistant｜>"} | ANSWERS,
        BRIEF,
    ),
    "plain names": (
        {"prompt": f"System: Be brief.\nUser: Hi\n\nAssistant: Hello\nUser: {Q}\nAssistant:"} | ANSWERS,
        TURNS,
    ),
    "plain names in both answers": (
        {"chosen": f"User: {Q}\nAssistant: {G}", "rejected": f"User: {Q}\nAssistant: {B}"},
        PROMPT,
    ),
    "plain names in Chinese": ({"prompt": f"用户：{Q}\n助手："} | ANSWERS, PROMPT),
    "ChatGLM": (
        {"prompt": f"[Round 1]\n\n问：Hi\n\n答：Hello\n\n[Round 2]\n\n问：{Q}\n\n答："} | ANSWERS,
        [user("Hi"), assistant("Hello"), user(Q)],
    ),
    "ChatML in both answers": (
        {
            name: f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            for name, answer in ANSWERS.items()
        },
        PROMPT,
    ),
    "JSON": ({"prompt": json.dumps(BRIEF)} | ANSWERS, BRIEF),
    "JSON as Python writes it": ({"prompt": str(BRIEF)} | ANSWERS, BRIEF),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_rendered_conversation_is_taken_apart(name: str) -> None:
    row, prompt = RENDERED[name]
    (found,) = convert(row, str(detect(row)))
    assert (found.prompt, found.answers, found.note) == (prompt, (G, B), "")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is", ("blue.", "green.")),
        ("Question 4: Q Answer: blue.", "Question 4: Q Answer: black.", "Question 4: Q Answer:", ("blue.", "black.")),
        ("问题：天空？答案：蓝色。", "问题：天空？答案：蓝绿色。", "问题：天空？答案：", ("蓝色。", "蓝绿色。")),
    ],
)
def test_a_prompt_that_both_answers_begin_with_ends_at_a_word_and_is_noted(
    chosen: str, rejected: str, prompt: str, answers: tuple[str, str]
) -> None:
    row = {"chosen": chosen, "rejected": rejected}
    (found,) = convert(row, str(detect(row)))
    assert (found.prompt, found.answers, found.note) == ([user(prompt)], answers, IMPLICIT)


QUOTED = {
    "a chat that is quoted": "Summarize this.\nUser: hi\nAssistant: hello",
    "one name alone": "User: who are you?",
    "a question in Chinese": "问：为什么？",
    "a list": "[1, 2] is a list?",
    "a player of HTML": "<video>\n<source src=a></video> does not play",
}


@pytest.mark.parametrize("name", QUOTED)
def test_what_only_looks_rendered_stays_as_it_is(name: str) -> None:
    (found,) = convert({"prompt": QUOTED[name]} | ANSWERS, "trl")
    assert (found.prompt, found.answers) == ([user(QUOTED[name])], (G, B))


FOREIGN_TEMPLATES = {
    "GLM": "[gMASK]<sop><|user|>\nQ<|assistant|>\n",
    "Phi 4": "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>",
    "gpt-oss": "<|start|>user<|message|>Q<|end|><|start|>assistant",
    "Cohere": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>",
    "InternLM": "<|User|>:Q<eoh>\n<|Bot|>:",
    "Baichuan": "<reserved_106>Q<reserved_107>",
    "MiniCPM": "<用户>Q<AI>",
    "a turn of a tool": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>tool\nx<|im_end|>\n<|im_start|>assistant\n",
    "JSON with a turn of a tool": json.dumps([user("Q"), said("tool", "x")]),
    "Qwen's pictures": "<|vision_start|><|image_pad|><|vision_end|>What is it?",
}


@pytest.mark.parametrize("name", FOREIGN_TEMPLATES)
def test_a_template_that_cannot_be_taken_apart_stays_text_with_markers_for_validate(name: str) -> None:
    (found,) = convert({"prompt": FOREIGN_TEMPLATES[name]} | ANSWERS, "trl")
    assert found.prompt == [user(FOREIGN_TEMPLATES[name].strip())]
    assert has_markers(found.prompt[0]["content"])


HOSTILE = {
    "spaces": "Human: " + " " * 1_000_000 + "x",
    "line ends": "User: " + "\n" * 1_000_000 + "x",
    "openings": "[INST]" * 170_000,
    "systems": "[INST]<<SYS>>a[/INST]" * 50_000,
    "turns": "问：\n" * 300_000,
    "endings": "a" + "</s> " * 200_000,
    "hashes": "### Instruction:\n" + "\n ###" * 200_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_text_of_markers_takes_no_quadratic_time(name: str) -> None:
    """A million characters took minutes with patterns that begin anywhere in white space; here a second or two."""
    began = time.process_time()
    parse_rendered(HOSTILE[name])
    strip_ending(HOSTILE[name])
    assert time.process_time() - began < 5


DIALOGUES = {"chosen": [user(Q), assistant(G)], "rejected": [user(Q), assistant(B)]}
TOOL = {"role": "assistant", "content": G, "tool_calls": [{"id": 1}]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"prompt": Q, "chosen": G}, "no 'rejected'"),
    "a number": ({"prompt": Q, "chosen": 7, "rejected": B}, "'chosen' is a number; expected text"),
    "an object": ({"prompt": {"a": 1}} | ANSWERS, "'prompt' holds a message with no role"),
    "no common beginning": ({"chosen": "yes", "rejected": "no"}, "do not begin with the same whole words"),
    "a half word": ({"chosen": "天空是蓝色的", "rejected": "天空是绿色的"}, "do not begin with the same whole words"),
    "a beginning": ({"chosen": "The sky", "rejected": "The sky is blue"}, "one answer is the beginning of the other"),
    "two turns": (
        {"chosen": [user(Q), assistant(G), user("a"), assistant("b")], "rejected": [user(Q), assistant(B)]},
        "more than one",
    ),
    "images": ({"prompt": Q, "images": ["0.png"]} | ANSWERS, "'images' is not read .*--ignore images"),
    "tools": ({"prompt": Q, "tools": "[{}]"} | ANSWERS, "'tools' is not read"),
    "documents": ({"prompt": Q, "documents": ["x"]} | ANSWERS, "'documents' is not read"),
    "a context of text": ({"question": Q, "context": "Paris is …"} | ANSWERS, "'context' is not read"),
    "a persona": ({"prompt": Q, "Persona": "a pirate"} | ANSWERS, "'Persona' is not read"),
    "two prompts": ({"prompt": Q, "question": "Who?"} | ANSWERS, "'question' holds another prompt besides"),
    "two systems": ({"system": "Be long.", "prompt": BRIEF} | ANSWERS, "two different system messages"),
    "another prompt in the dialogues": ({"prompt": "Who?"} | DIALOGUES, "hold different prompts"),
    "a tool call": (
        {"prompt": PROMPT, "chosen": [TOOL], "rejected": [assistant(B)]},
        "'tool_calls', which is not supported",
    ),
    "a function's turn": (
        {"conversations": [human("human", Q), human("function_call", "x")], "chosen": human("gpt", G), "rejected": B},
        "a message with the role 'function_call'",
    ),
    "the user's answer": (
        {"conversations": [human("human", Q)], "chosen": human("human", G), "rejected": human("gpt", B)},
        "differ in more than one final message",
    ),
    "a picture": ({"prompt": [said("user", [{"type": "image_url"}])]} | ANSWERS, "a part of type image_url"),
    "a history of texts": ({"instruction": Q, "history": ["x"]} | ANSWERS, "'history' is expected to be a list"),
    "a tie": (DIALOGUES | {"score_chosen": 7.5, "score_rejected": 7.5}, "a tie: 'score_chosen' and 'score_rejected'"),
    "inverted scores": (DIALOGUES | {"chosen-rating": 3, "rejected-rating": 4}, "rejected answer has the better score"),
    "a tie in HelpSteer": ({"context": PROMPT, "response1": G, "response2": B, "overall_preference": 0}, "a tie"),
    "a tie in the arena": (
        {"conversation_a": [user(Q), assistant(G)], "conversation_b": [user(Q), assistant(B)], "winner": "tie"},
        "a tie",
    ),
    "completions that are none": ({"instruction": Q, "completions": [3]}, "'completions' holds a number|hold a number"),
    "equal scores": (
        {"instruction": Q, "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 1}]},
        "need at least two different scores",
    ),
    "no score": ({"instruction": Q, "completions": [{"response": "a"}, {"response": "b"}]}, "has no score"),
    "a score of N/A": ({"instruction": Q, "completions": [{"response": "a", "score": "N/A"}]}, "not a finite number"),
    "a score of nan": ({"instruction": Q, "completions": [{"response": "a", "score": "nan"}]}, "not a finite number"),
    "contradicting scores": (
        {
            "instruction": Q,
            "completions": [
                {"response": G, "overall_score": 10, "fine-grained_score": 1.5},
                {"response": B, "overall_score": 6, "fine-grained_score": 4.0},
            ],
        },
        "contradict each other",
    ),
    "another template's settings": (
        {"prompt": Q, "chat_template_kwargs": {"enable_thinking": False}} | ANSWERS,
        "'chat_template_kwargs' is not read",
    ),
    "several columns": (
        {"prompt": Q, "title": "x", "user": "y", "参考资料": ["z"]} | ANSWERS,
        "'title' and 'user' and '参考资料' are not read .*--ignore title --ignore user --ignore 参考资料",
    ),
    "a column that may be the prompt": (
        {"ask": Q, "chosen": "It is so.", "rejected": "It is not."},
        "'ask' is not read",
    ),
    "an answer that is known": ({"question": Q, "answer": "Paris"} | ANSWERS, "'answer' is not read"),
    "a picture in the text": ({"prompt": f"{Q}\n<image>"} | ANSWERS, "has a <image>"),
    "thoughts beside the text": (
        {"prompt": PROMPT, "chosen": [assistant(G) | {"reasoning_content": "x"}], "rejected": [assistant(B)]},
        "'reasoning_content', which is not supported",
    ),
    "a part of reasoning": (
        {
            "prompt": PROMPT,
            "chosen": [said("assistant", [{"type": "reasoning", "value": "x"}])],
            "rejected": [assistant(B)],
        },
        "a part of type reasoning",
    ),
    "an answer without its role": ({"prompt": Q, "chosen": {"content": G}, "rejected": {"content": B}}, "no role"),
    "a status of tie": ({"prompt": Q, "status": "tie"} | ANSWERS, "a tie: 'status' says 'tie'"),
    "a winner in Chinese": ({"prompt": Q, "胜者": "平局"} | ANSWERS, "a tie: '胜者' says '平局'"),
    "two equal ratings": ({"prompt": Q, "rating": [4, 4.0]} | ANSWERS, "a tie: the two numbers of 'rating'"),
    "a flag of a tie": ({"prompt": Q, "is_tie": True} | ANSWERS, "a tie"),
    "no margin": ({"prompt": Q, "margin": "0.0"} | ANSWERS, "'margin' is 0"),
    "no preference": ({"prompt": Q, "overall_preference": 0} | ANSWERS, "a tie: 'overall_preference' is 0"),
    "a tie in numbers as text": ({"prompt": Q, "score_chosen": "3", "score_rejected": "3.0"} | ANSWERS, "a tie"),
    "a tie of generations": ({"prompt": Q, "generations": [G, B], "ratings": [4, 4]}, "a tie"),
    "a rating too few": (
        {"prompt": Q, "generations": [G, B], "ratings": [4, None]},
        "'ratings' is expected to be 2 numbers",
    ),
    "steps with labels": (
        {"prompt": Q, "completions": ["a", "b"], "labels": [True, False]},
        "the answers have no scores",
    ),
    "pictures of a completion": (
        {"prompt": Q, "completions": [{"response": G, "score": 2, "images": ["0.png"]}, {"response": B, "score": 1}]},
        "a completion has 'images'",
    ),
    "a context that is no conversation": (
        {
            "context": Q,
            "completions": [{"rank": 0, "completion": [assistant(G)]}, {"rank": 1, "completion": [assistant(B)]}],
        },
        "'context' is not read",
    ),
    "two verdicts": (
        {"prompt": Q, "response_a": G, "response_b": B, "winner": "a", "preference": "b"},
        "contradict each other",
    ),
    "a verdict that names neither": (
        {"prompt": Q, "response_a": G, "response_b": B, "winner": 0},
        "'winner' says '0'; expected a, b or tie",
    ),
    "both bad": ({"prompt": Q, "response_a": G, "response_b": B, "winner": "both_bad"}, "a tie: 'winner'"),
    "equal scores of two answers": ({"prompt": Q, "answer_0": G, "answer_1": B, "score_0": 0, "score_1": 0.0}, "a tie"),
    "quotes of two answers": (
        {"question": Q, "answer_0": G, "answer_1": B, "score_0": 1, "score_1": 0, "quotes_0": {"extract": ["x"]}},
        "'quotes_0' is not read",
    ),
    "several turns of each model": (
        {"prompt": '["Hi", "Q"]', "response_a": '["Yo", "G"]', "response_b": '["Hello", "B"]', "winner": "a"},
        "differ in more than one final message",
    ),
    "unpaired": ({"prompt": Q, "completion": G, "label": False}, "unpaired feedback"),
    "unpaired messages": ({"messages": [user(Q), assistant(G)], "label": True}, "unpaired feedback"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_a_pair_says_why(name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises(RowError, match=reason):
        convert(row, detect(row) or "trl")


INSTRUCTIONS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "alpaca": ({"instruction": "Translate.", "input": "Rain", "output": G}, [user("Translate.\n\nRain")]),
    "sharegpt": ({"conversations": [human("human", Q), human("gpt", G)], "system": "Be brief."}, BRIEF),
    "messages": ({"messages": [*TURNS, assistant(G)]}, TURNS),
    "trl: prompt and completion": ({"prompt": Q, "completion": G}, PROMPT),
    "trl: conversational": ({"prompt": PROMPT, "completion": [assistant(G)]}, PROMPT),
    "openorca": ({"id": "niv.1", "system_prompt": "Be brief.", "question": Q, "response": G}, BRIEF),
    "swift": ({"query": Q, "response": G, "history": []}, PROMPT),
    "a rendered text": ({"text": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{G}<|im_end|>\n"}, PROMPT),
    "guanaco": ({"text": f"### Human: {Q}### Assistant: {G}"}, PROMPT),
    "exchanges": ({"conversations": [{"user": "Hi", "assistant": "Hello"}, {"user": Q, "assistant": G}]}, TURNS[1:]),
    "llama-factory: v1": ({"messages": [parts("user", Q), parts("assistant", G)]}, PROMPT),
    "in Chinese": ({"指令": Q, "输入": "", "输出": G}, PROMPT),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_is_recognised_and_read_whole(name: str) -> None:
    row, prompt = INSTRUCTIONS[name]
    format_name = detect(row, "instructions")
    assert format_name is not None
    assert [(found.prompt, found.answers) for found in convert(row, format_name)] == [(prompt, (G,))]


def test_the_readme_shows_every_format() -> None:
    text = (ROOT / "components" / "prepare" / "README.md").read_text(encoding="utf-8")
    assert text == renewed(text, formats(), FORMATS_START), "run `make readmes`"


def test_every_format_reads_its_own_example() -> None:
    for name, entry in FORMATS.items():
        assert detect(entry.example) == name
        if entry.kind != "unpaired":
            assert convert(entry.example, name)


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("法国的首都是哪里？巴黎。", "zh"),
        ("What is 巴黎?", "en"),
        ("用 Python 写一个函数，打印列表", "zh"),
        ("", "en"),
        ("法國的首都是哪裡？", "zh"),
        ("日语的「の」是什么意思？", "zh"),
        ("Let α, β and γ be angles; what is α + β + γ?", "en"),
        ("フランスの首都はどこですか？パリです。", None),
        ("令和元年度の経済産業省の報告書について", None),
        ("프랑스의 수도는 어디입니까?", None),
        ("Какой город столица Франции?", None),
    ],
)
def test_the_script_tells_the_language(text: str, lang: str | None) -> None:
    assert guess_language([text]) == lang


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def facts(**changes: Any) -> RowDefaults:
    return RowDefaults(**{"format": "", "language": "auto", "licence": "MIT", "source": "team"} | changes)


def converted(tmp_path: Path, *files: Path, **changes: Any) -> Any:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return convert_files(list(files), facts(**changes), out, print)


GOOD = {"prompt": "Who?", "chosen": "A model.", "rejected": "Nobody."}


def test_every_row_is_either_a_pair_or_set_aside_with_where_and_why(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"chosen": " "}, {"prompt": "x"}, GOOD | {"lang": "fr"}, GOOD | {"lang": "Chinese"}]
    file = write(tmp_path / "team.jsonl", *rows)
    done, added = converted(tmp_path, file)
    pairs = read_lines(tmp_path / "out" / "pairs.jsonl")
    aside = read_lines(tmp_path / "out" / "quarantine.jsonl")
    assert (done.rows, done.quarantined) == (len(pairs), len(aside)) == (2, 3) and added.rows == 2
    assert [entry["where"].rpartition(":")[2] for entry in aside] == ["2", "3", "4"]
    assert (
        "no 'chosen'" in aside[1]["reason"] and "its column 'lang' says 'fr'; expected en or zh" in aside[2]["reason"]
    )
    assert [entry["row"] for entry in aside] == rows[1:4]
    assert [pair["lang"] for pair in pairs] == ["en", "zh"]
    assert {(pair["source"], pair["license"]) for pair in pairs} == {("team", "MIT")}


def test_what_a_row_says_of_itself_is_kept(tmp_path: Path) -> None:
    own = {"lang": "zh", "source": "web", "license": "CC0-1.0", "id": "x", "group": "y"}
    converted(tmp_path, write(tmp_path / "a.jsonl", GOOD | own))
    (pair,) = read_lines(tmp_path / "out" / "pairs.jsonl")
    assert pair == {"prompt": [said("user", "Who?")], "chosen": "A model.", "rejected": "Nobody."} | {
        "lang": "zh",
        "source": "web",
        "license": "CC0-1.0",
    }


def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    rows = [GOOD, GOOD | {"chosen": '我，"模型"。\n第二行'}, GOOD | {"prompt": [user("Who?")]}]
    lines = write(tmp_path / "a.jsonl", *rows[:2])
    content = lines.read_bytes()
    table = pa.table({name: [row[name] for row in rows[:2]] for name in GOOD})
    for name, data in {
        "array.json": json.dumps(rows[:2], indent=1).encode(),
        "mark.jsonl": b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"),
        "a.jsonl.gz": gzip.compress(content),
        "a.jsonl.bz2": bz2.compress(content),
        "a.jsonl.xz": lzma.compress(content),
        "array.json.gz": gzip.compress(json.dumps(rows[:2]).encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(content)
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("semicolons.csv", ";"), ("tabs.csv", "\t"), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(GOOD), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows[:2])
    files = [path for path in sorted(tmp_path.iterdir()) if path.is_file()]
    assert len(files) == 13
    assert len({converted(tmp_path, file)[1].sha256 for file in files}) == 1


def test_a_list_of_messages_in_a_table_is_read_as_messages(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    dialogue = [user("Who?"), assistant("A model.")]
    other = [user("Who?"), assistant("Nobody.")]
    pa.parquet.write_table(pa.Table.from_pylist([{"chosen": dialogue, "rejected": other}]), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["chosen", "rejected"], [json.dumps(dialogue), str(other)]])
    for name in ("a.parquet", "a.csv"):
        converted(tmp_path, tmp_path / name)
        (pair,) = read_lines(tmp_path / "out" / "pairs.jsonl")
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([user("Who?")], "A model.", "Nobody.")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BOMB = json.dumps({"prompt": "Who?", "chosen": "0" * 1024, "rejected": "1"}).encode() + b"\n"
FOREIGN = {
    "a.jsonl": (LFS, "a Git LFS pointer, not the data itself: `git lfs pull`"),
    "b.jsonl": (b"PK\x03\x04" + b"\0" * 30, "a zip archive"),
    "c.jsonl": (b"<!DOCTYPE html>\n<html></html>", "an HTML page"),
    "d.jsonl": (b"\x80\x04\x95", "a Python pickle, which is never loaded"),
    "e.jsonl": (json.dumps(GOOD).encode("utf-16"), "text in UTF-16: save it as UTF-8"),
    "f.json": (
        json.dumps({"version": "1", "data": [GOOD, GOOD]}).encode(),
        r"list 'data' holds the rows; `jq -c '.data\[\]'`",
    ),
    "g.json": (json.dumps(GOOD, indent=2).encode() + b"\n" + json.dumps(GOOD, indent=2).encode(), "over several lines"),
    "h.parquet": (b"PAR1" + b"\0" * 40, "the Parquet file is damaged or truncated"),
    "i.csv": (b"prompt,chosen,rejected\na,b\n", "another number of fields than the header has"),
    "j.jsonl.gz": (gzip.compress(BOMB * (80 << 10)), "more than 250 times as large unpacked as packed"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_holds_something_else_is_named(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        converted(tmp_path, tmp_path / name)


def test_a_number_that_json_cannot_hold_is_nothing_and_a_long_one_is_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", GOOD)
    with file.open("a") as lines:
        lines.write('{"prompt": "Who?", "chosen": "A.", "rejected": "B.", "score": NaN}\n')
        lines.write('{"prompt": "Who?", "id": 123456789012345678901234567890}\n')
    done, _ = converted(tmp_path, file)
    assert (done.rows, done.quarantined) == (2, 1)
    assert '"id": 123456789012345678901234567890' in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_a_language_of_something_else_is_named_and_can_be_given(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", GOOD, GOOD | {"language": "python"})
    done, _ = converted(tmp_path, file)
    assert (
        next(iter(done.reasons))
        == "its column 'language' says 'python'; expected en or zh, or --language for such rows"
    )
    done, _ = converted(tmp_path, file, language="en")
    assert done.rows == 2


def test_the_language_is_that_of_question_and_answer(tmp_path: Path) -> None:
    long = "You are the assistant of a company that sells umbrellas, and you answer every question with patience. " * 4
    row = {"system": long, "prompt": "下雨天怎么办？", "chosen": "带伞。", "rejected": "不知道。"}
    converted(tmp_path, write(tmp_path / "a.jsonl", row))
    assert read_lines(tmp_path / "out" / "pairs.jsonl")[0]["lang"] == "zh"


def test_a_column_can_be_ignored_or_name_the_group(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", GOOD | {"persona": "x", "thread": 7}, GOOD | {"persona": "y", "thread": None})
    done, _ = converted(tmp_path, file, ignored=("persona", "thread"), group="thread")
    assert (done.rows, list(done.reasons)) == (1, ["no value in the column 'thread' that names its group"])
    assert read_lines(tmp_path / "out" / "pairs.jsonl")[0]["together"] == "team/7"


def test_the_first_rows_are_kept_as_they_will_be_trained_and_assumptions_are_counted(tmp_path: Path) -> None:
    rows = [{"chosen": f"Item {n} is good.", "rejected": f"Item {n} is bad."} for n in range(5)]
    done, _ = converted(tmp_path, write(tmp_path / "a.jsonl", *rows))
    assert done.notes == {IMPLICIT: 5} and done.first[IMPLICIT].endswith("a.jsonl:1")
    assert done.samples == read_lines(tmp_path / "out" / "pairs.jsonl")[:3]


def test_files_in_the_schemas_of_public_data_sets_are_read_whole(tmp_path: Path) -> None:
    for file in write_files(tmp_path):
        done, _ = converted(tmp_path, file)
        pairs = read_lines(tmp_path / "out" / "pairs.jsonl")
        assert (done.rows, done.quarantined, done.notes) == (200, 0, {}), file.name
        _, subjects, kinds = FILES[file.name]
        expected = sorted((good, bad) for _, good, bad in texts(subjects, kinds))
        assert sorted((pair["chosen"], pair["rejected"]) for pair in pairs) == expected
        asked = sorted(pair["prompt"][-1]["content"] for pair in pairs)
        assert asked == sorted(question for question, _, _ in texts(subjects, kinds))


def test_instructions_are_a_kind_of_their_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"instruction": "Who?", "input": "", "output": "A model."})
    with pytest.raises(InputError, match="instructions rather than pairs; add them for SFT: --instructions"):
        converted(tmp_path, file)
    done, added = converted(tmp_path, file, kind="instructions")
    assert (done.rows, added.kind) == (1, "instructions")
    assert read_lines(tmp_path / "out" / "instructions.jsonl")[0]["response"] == "A model."
    with pytest.raises(InputError, match="its rows are preference pairs"):
        converted(tmp_path, write(tmp_path / "b.jsonl", GOOD), kind="instructions")


@pytest.mark.parametrize("kind", ["preferences", "instructions"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "completion": B, "label": False},
        {"messages": [user(Q), assistant(B)], "label": "false"},
        {"conversations": [human("human", Q), human("gpt", B)], "kto_tag": 0},
        {"prompt": Q, "response": B, "category": {"Violence": True}, "is_safe": False},
    ],
)
def test_an_answer_with_a_label_is_neither_a_pair_nor_an_instruction(tmp_path: Path, row: Any, kind: str) -> None:
    with pytest.raises(InputError, match="unpaired feedback"):
        converted(tmp_path, write(tmp_path / "a.jsonl", row), kind=kind)


@pytest.mark.parametrize(
    "question", ["フランスの首都はどこですか？", "프랑스의 수도는 어디입니까?", "Какой город столица?"]
)
def test_a_row_in_another_script_is_set_aside_unless_its_language_is_given(tmp_path: Path, question: str) -> None:
    row = {"prompt": question, "chosen": question[:4], "rejected": question[-4:]}
    file = write(tmp_path / "a.jsonl", GOOD, row)
    done, _ = converted(tmp_path, file)
    assert (done.rows, done.quarantined) == (1, 1) and "another language" in next(iter(done.reasons))
    assert converted(tmp_path, file, language="zh")[0].rows == 2


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"left": "x", "right": "y"}], {}, r"a.jsonl:1: unknown format \(columns: left, right\)"),
        (
            [GOOD, {"instruction": "x", "chosen": "a", "rejected": "b"}],
            {},
            r"more than one format: alpaca \(.*a.jsonl:2\) and trl \(.*a.jsonl:1\); split the file",
        ),
        ([GOOD], {"licence": ""}, r"a.jsonl:1: the row names no licence; state the terms"),
        ([GOOD | {"chosen": 1}], {}, r"contains no preference pair; the first row is not usable: 'chosen' is a number"),
        ([], {}, r"a.jsonl: no rows; expected at least one"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_clear_error(
    tmp_path: Path, rows: list[Any], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        converted(tmp_path, write(tmp_path / "a.jsonl", *rows), **changes)


def read_array(tmp_path: Path, content: bytes) -> list[Any]:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    return [row for _, row, _ in read_rows(path)]


def test_an_array_is_read_entry_by_entry_whatever_its_blocks_cut(tmp_path: Path) -> None:
    """Texts of two and three bytes, escapes and brackets, over several blocks; the file is never whole in memory."""
    import tracemalloc

    rows = [{"text": f'é中"\\[{{{i}' * 3000, "number": -1.5e-3, "nested": {"a": [None, True]}} for i in range(400)]
    for indent in (None, 1):
        assert read_array(tmp_path, json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8-sig")) == rows
    path = tmp_path / "rows.json"
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a":]', r"rows\.json:2: not valid JSON .*column 7"),
        (b'[{"a": 1},\n {"b": 2} {"c": 3}]', r"rows\.json:2: not valid JSON .*column 11"),
        (b'[{"a": 1}', r"rows\.json:1: not valid JSON"),
        (b'[{"a": 1},]', r"rows\.json:1: not valid JSON"),
        (b'[{"a": 1}] [', r"rows\.json:1: not valid JSON"),
        (b'[{"a": 1}, 7]', "entry 2: expected a flat JSON object, found int"),
        (b'[{"a": ' + b"[" * 5000, "entry 1: nested too deep"),
        (b'[{"a": "' + b"x" * (17 << 20) + b'"}]', "entry 1: longer than 16 MiB"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
    ],
)
def test_a_broken_array_is_named_with_line_or_entry(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_array(tmp_path, content)
