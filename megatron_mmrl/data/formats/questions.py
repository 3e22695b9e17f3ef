"""Data sets of one question per row about one or several pictures, as Hugging Face serves them in parquet or arrow."""

from __future__ import annotations

import re
from functools import partial
from string import ascii_uppercase

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats.choices import option_list, options_in, with_options
from megatron_mmrl.data.formats.row import (
    Question,
    ReadImage,
    ReadRow,
    Row,
    answer_text,
    question_prompt,
    tagged_answer,
    text_of,
)
from megatron_mmrl.types import IMAGE_TAG, Prompt

_NUMBERED_TAG = re.compile(r"<image\s*(\d+)>")


def read_geometry3k(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """hiyouga/geometry3k: ``images, problem`` (with its tag), ``answer``."""
    found = Question(
        source="hiyouga/geometry3k",
        text=text_of(row, "problem"),
        answer=answer_text(row.get("answer"), "answer"),
        image=row.get("images"),
        meta={},
        used=("images", "problem", "answer"),
    )
    return question_prompt(row, prompt_id, read_image, found)


def _read_r1v(row: Row, prompt_id: str, read_image: ReadImage, *, source: str) -> Prompt:
    """R1-V's columns ``image, problem, solution``; the answer stands in the solution's last ``<answer>`` tags."""
    found = Question(
        source=source,
        text=text_of(row, "problem"),
        answer=tagged_answer(row.get("solution"), "solution"),
        image=row.get("image"),
        meta={"choices": options_in(text_of(row, "problem"))},
        used=("image", "problem"),
    )
    return question_prompt(row, prompt_id, read_image, found)


read_geoqa_r1v: ReadRow = partial(_read_r1v, source="GEOQA_R1V_Train_8K")
read_clevr_cogen: ReadRow = partial(_read_r1v, source="clevr_cogen_a_train")
read_open_r1: ReadRow = partial(_read_r1v, source="lmms-lab/multimodal-open-r1-8k-verified")


def read_mmk12(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """FanqingM/MMK12: ``id, question, answer, subject, image``; test questions have their options as lines in them."""
    question = text_of(row, "question")
    found = Question(
        source="FanqingM/MMK12",
        text=question,
        answer=answer_text(row.get("answer"), "answer"),
        image=row.get("image"),
        meta={
            "question_id": row.get("id"),
            "subject": row.get("subject"),
            "choices": options_in(question) if _is_letter(row.get("answer")) else None,
        },
        used=("image", "question", "answer", "id"),
    )
    return question_prompt(row, prompt_id, read_image, found)


def read_mathvista(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """AI4Math/MathVista: ``pid, question, decoded_image, choices, answer, unit, precision, metadata, ...``.

    The answer of a multiple-choice question is the text of its option. Where ``question`` asks with options, they are
    listed below it; the column ``query``, which has a hint of its own, is left in ``meta``.
    """
    choices = option_list(row.get("choices"))
    found = Question(
        source="AI4Math/MathVista",
        text=with_options(text_of(row, "question"), choices),
        answer=answer_text(row.get("answer"), "answer"),
        image=row.get("decoded_image"),
        meta={"question_id": row.get("pid"), "choices": choices},
        used=("decoded_image", "image", "question", "answer", "pid", "choices"),
    )
    return question_prompt(row, prompt_id, read_image, found)


def read_mathvision(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """MathLLMs/MathVision: ``id, question`` (with ``<image1>``), ``options, decoded_image, answer, level, subject``."""
    choices = option_list(row.get("options"))
    image = row.get("decoded_image") if row.get("decoded_image") is not None else row.get("image")
    found = Question(
        source="MathLLMs/MathVision",
        text=one_tag(with_options(text_of(row, "question"), choices)),
        answer=answer_text(row.get("answer"), "answer"),
        image=image,
        meta={
            "question_id": row.get("id"),
            "choices": [_NUMBERED_TAG.sub(r"image \1", choice) for choice in choices] if choices else None,
            "subject": row.get("subject"),
            "level": row.get("level"),
        },
        used=("decoded_image", "image", "question", "answer", "id", "options"),
    )
    return question_prompt(row, prompt_id, read_image, found)


def read_polymath(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """him1411/polymath: ``image`` (which holds the question), ``answer_option, final_answer, category, ...``."""
    choices = option_list(row.get("answer_option"))
    asked = row.get("question")
    question = asked if isinstance(asked, str) and asked.strip() else "Answer the question in the image."
    if choices:
        question = f"{question.rstrip()}\nOptions: {', '.join(choices)}"
    found = Question(
        source="him1411/polymath",
        text=question,
        answer=answer_text(row.get("final_answer"), "final_answer"),
        image=row.get("image"),
        meta={"question_id": row.get("id"), "choices": choices, "subject": row.get("category")},
        used=("image", "question", "final_answer", "id", "answer_option", "category"),
    )
    return question_prompt(row, prompt_id, read_image, found)


def read_scemqa(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """SceMQA: ``Question`` (options in it), ``Answer (final answer highlighted)``, ``ImagePath`` without an ending.

    Its files are objects ``{subject: [row, ...]}``; the subject arrives as the column ``Subject``.
    """
    question = text_of(row, "Question")
    answer = row.get("Answer (final answer highlighted)", row.get("Answer"))
    path = row.get("ImagePath")
    found = Question(
        source="SceMQA",
        text=question,
        answer=answer_text(answer, "Answer (final answer highlighted)"),
        image=path,
        meta={
            "question_id": path,
            "subject": row.get("Subject"),
            "choices": options_in(question) if _is_letter(answer) else None,
        },
        used=("Question", "Answer (final answer highlighted)", "Answer", "ImagePath", "Subject"),
    )
    return question_prompt(row, prompt_id, partial(_with_any_ending, read_image), found)


def read_wemath(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """We-Math: ``ID, question, option`` ("A. 1; B. 2; ..."), ``answer`` (a letter), ``image_path, key, ...``."""
    option = row.get("option")
    question = text_of(row, "question")
    if isinstance(option, str) and option.strip():
        question = f"{question.rstrip()}\n{option.strip()}"
    image = row.get("image") if row.get("image") is not None else row.get("image_path")
    found = Question(
        source="We-Math/We-Math",
        text=question,
        answer=answer_text(row.get("answer"), "answer"),
        image=image,
        meta={
            "question_id": row.get("ID"),
            "choices": option_list(option),
            "subject": row.get("knowledge concept"),
            "level": row.get("key"),
        },
        used=("image", "image_path", "question", "answer", "ID", "option"),
    )
    return question_prompt(row, prompt_id, read_image, found)


def one_tag(text: str) -> str:
    """``<image1>`` becomes the tag, further numbers and repetitions text: such rows have one picture of all parts."""
    first = _NUMBERED_TAG.search(text)
    if first is None or IMAGE_TAG in text:
        return _NUMBERED_TAG.sub(r"image \1", text)
    rest = _NUMBERED_TAG.sub(r"image \1", text[first.end() :])
    return text[: first.start()] + IMAGE_TAG + rest


def _is_letter(answer: object) -> bool:
    return isinstance(answer, str) and answer.strip() in set(ascii_uppercase)


def _with_any_ending(read_image: ReadImage, entry: object) -> bytes:
    """The file with the first usual ending that it exists with, or as named."""
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or "." in path.rpartition("/")[2]:
        return read_image(entry)
    for ending in (".png", ".jpg", ".jpeg"):
        try:
            return read_image({"path": path + ending})
        except BadRowError as error:
            reason = error
    raise BadRowError(f"none of {path}.png, .jpg, .jpeg can be used; the last: {reason}")
