"""Rows of the data sets that the recipes use, in their original columns, become prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.formats.choices import options_in, with_options
from megatron_mmrl.data.formats.questions import one_tag
from megatron_mmrl.types import Message, Prompt

PNG = {"bytes": b"png", "path": "a.png"}


def read(name: str, row: dict[str, Any]) -> Prompt:
    """Images read as their bytes, or as their path."""
    return FORMATS[name](row, "f:0", lambda entry: entry.get("bytes") or entry["path"].encode())


# MM-Eureka.

CONVERSATIONS = {
    "id": "0",
    "conversations": [
        {"role": "user", "content": "<image>How many edges?"},
        {"role": "assistant", "content": "<think>..</think><answer>3</answer>"},
    ],
    "answer": "3",
    "image_urls": ["images/cube.jpg"],
}


def test_mm_eureka_conversations() -> None:
    prompt = read("mm_eureka", CONVERSATIONS)
    assert prompt.messages == (Message(role="user", text="<image>How many edges?"),)
    assert (prompt.images, prompt.answer, prompt.source) == ((b"images/cube.jpg",), "3", "mm_eureka")
    assert prompt.meta == {"question_id": "0", "solution": "<think>..</think><answer>3</answer>"}
    untagged = {**CONVERSATIONS, "conversations": [{"role": "user", "content": "How many?"}], "image_urls": ["a", "b"]}
    assert read("mm_eureka", untagged).messages[0].text == "<image><image>How many?"


def test_mm_eureka_message() -> None:
    chat = [
        {"role": "system", "content": "Think."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "file:///data/cats.jpg"},
                {"type": "text", "text": "How many cats? And here: "},
                {"type": "image", "image": "file:///data/dogs.jpg"},
            ],
        },
    ]
    prompt = read("mm_eureka", {"id": "7", "message": json.dumps(chat), "answer": 2, "subject": "pets"})
    assert [message.text for message in prompt.messages] == ["Think.", "<image>How many cats? And here: <image>"]
    assert prompt.images == (b"file:///data/cats.jpg", b"file:///data/dogs.jpg")
    assert (prompt.answer, prompt.meta) == ("2", {"question_id": "7", "subject": "pets"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "0", "answer": "3"}, "neither 'conversations' nor 'message'"),
        ({**CONVERSATIONS, "answer": None}, "no answer"),
        ({**CONVERSATIONS, "image_urls": ["a", "b"]}, "1 <image> tags but the row has 2 images"),
        ({**CONVERSATIONS, "conversations": [{"role": "assistant", "content": "3"}]}, "nothing but an assistant"),
        ({"message": "[{]", "answer": "3"}, "'message' is not JSON"),
        ({"message": '{"role": "user"}', "answer": "3"}, "'message' holds dict"),
        ({"message": '[{"role": "user", "content": [{"type": "video"}]}]', "answer": "3"}, "type 'video'"),
    ],
)
def test_bad_mm_eureka_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read("mm_eureka", row)


# ms-swift.


def test_swift_rows_keep_their_columns_for_the_rewards() -> None:
    question = "How many items are there in the image?"
    row = {
        "images": [{"bytes": b"png", "path": "CLEVR_trainA_000000.png"}],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "<answer> 3 </answer>"}],
        "solution": "<answer> 3 </answer>",
        "difficulty": 0.5,
        "nothing": None,
    }
    prompt = read("swift", row)
    assert prompt.messages == (Message(role="user", text=f"<image>{question}"),)
    assert (prompt.answer, prompt.images) == ("3", (b"png",))
    assert prompt.meta == {"solution": "<answer> 3 </answer>", "difficulty": 0.5}
    del row["solution"]
    assert read("swift", row).answer == "3"  # the reply stands in
    row["messages"] = row["messages"][:1]
    with pytest.raises(BadRowError, match="no answer: solution"):
        read("swift", row)


# One question about pictures.


def test_geometry3k() -> None:
    prompt = read("geometry3k", {"images": [PNG], "problem": "<image>Find x.", "answer": "11"})
    assert (prompt.messages[0].text, prompt.answer, prompt.images) == ("<image>Find x.", "11", (b"png",))
    assert prompt.source == "hiyouga/geometry3k"


@pytest.mark.parametrize("name", ["geoqa_r1v", "clevr_cogen", "open_r1"])
def test_r1v_rows(name: str) -> None:
    solution = "<think>It is 9.</think><answer> 145° </answer>"
    prompt = read(name, {"image": PNG, "problem": "Which angle?", "solution": solution, "original_answer": "145"})
    assert (prompt.messages[0].text, prompt.answer) == ("<image>Which angle?", "145°")
    assert prompt.meta == {"solution": solution, "original_answer": "145"}


def test_mmk12_options_stand_in_the_question() -> None:
    question = "As shown, A. Smith pulls with\nA. $10$ N\nB.$2.5$ N\nC. none\nD. all"
    prompt = read("mmk12", {"id": "t1", "question": question, "answer": "B", "subject": "physics", "image": PNG})
    assert prompt.messages[0].text == f"<image>{question}"
    assert prompt.meta == {"question_id": "t1", "subject": "physics", "choices": ["$10$ N", "$2.5$ N", "none", "all"]}
    train = read("mmk12", {"id": "1", "question": "Find $x$.", "answer": "$2$", "subject": "math", "image": PNG})
    assert (train.answer, train.meta) == ("$2$", {"question_id": "1", "subject": "math"})


def test_mathvista_lists_the_options() -> None:
    row = {
        "pid": "1",
        "question": "Which is larger?",
        "image": "images/1.jpg",
        "decoded_image": PNG,
        "choices": ["red", "blue"],
        "answer": "blue",
        "precision": 1.0,
        "unit": None,
        "metadata": {"skills": ["arithmetic"], "img_width": 20},
    }
    prompt = read("mathvista", row)
    assert prompt.messages[0].text == "<image>Which is larger?\nChoices:\n(A) red\n(B) blue"
    assert prompt.answer == "blue"
    assert prompt.meta == {
        "question_id": "1",
        "choices": ["red", "blue"],
        "precision": 1.0,
        "metadata": {"skills": ["arithmetic"], "img_width": 20},
    }
    free = read("mathvista", {**row, "choices": None, "answer": "1.2"})
    assert (free.messages[0].text, free.answer) == ("<image>Which is larger?", "1.2")


def test_mathvision_has_numbered_tags() -> None:
    row = {
        "id": "4",
        "question": "Which of the pieces fits?\n<image1>",
        "options": ["A", "B", "C"],
        "image": "images/4.jpg",
        "decoded_image": PNG,
        "answer": "C",
        "solution": None,
        "level": 2,
        "subject": "transformation geometry",
    }
    prompt = read("mathvision", row)
    assert prompt.messages[0].text == "Which of the pieces fits?\n<image>"
    assert (prompt.answer, prompt.meta["level"], prompt.meta["choices"]) == ("C", 2, ["A", "B", "C"])
    assert one_tag("<image1> or <image2>?\n(A) <image1>") == "<image> or image 2?\n(A) image 1"
    assert one_tag("no picture") == "no picture"


def test_polymath_asks_in_the_picture() -> None:
    row = {"image": PNG, "answer_option": "['1', '2', '3']", "final_answer": "2", "category": "odd_one_out"}
    prompt = read("polymath", row)
    assert prompt.messages[0].text == "<image>Answer the question in the image.\nOptions: 1, 2, 3"
    assert (prompt.answer, prompt.meta) == ("2", {"choices": ["1", "2", "3"], "subject": "odd_one_out"})


def test_scemqa_paths_have_no_ending() -> None:
    row = {
        "Question": "Where is f continuous?\n\nA. a\nB. b",
        "Answer (final answer highlighted)": "B",
        "ImagePath": "Math/1",
        "Subject": "Math",
    }

    def read_image(entry: Any) -> bytes:
        if entry["path"] != "Math/1.jpg":
            raise BadRowError("no such file")
        return b"jpg"

    prompt = FORMATS["scemqa"](row, "f:0", read_image)
    assert (prompt.images, prompt.answer) == ((b"jpg",), "B")
    assert prompt.meta == {"question_id": "Math/1", "subject": "Math", "choices": ["a", "b"]}
    with pytest.raises(BadRowError, match="no such file"):
        FORMATS["scemqa"]({**row, "ImagePath": "Math/2"}, "f:0", read_image)


def test_wemath_options_follow_the_question() -> None:
    row = {
        "ID": "3steps_1",
        "question": "What is the area?",
        "option": "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer",
        "answer": "B",
        "image_path": "3steps/image/165-3.png",
        "key": "3steps_3",
        "knowledge concept": "Area of circles",
        "question number": 1575,
    }
    prompt = read("wemath", row)
    assert prompt.messages[0].text.endswith(f"What is the area?\n{row['option']}")
    assert prompt.images == (b"3steps/image/165-3.png",)
    assert prompt.meta["choices"] == ["200.96", "3215.36", "6280", "32", "No correct answer"]
    assert (prompt.meta["subject"], prompt.meta["level"]) == ("Area of circles", "3steps_3")
    assert prompt.meta["question number"] == 1575


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"verl", "mm_eureka", "swift"}))
def test_rows_of_other_columns_are_refused_and_say_so(name: str) -> None:
    with pytest.raises(BadRowError):
        read(name, {"text": "2 + 2?"})


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Which?\n(A) 1\n(B) 2", ["1", "2"]),
        ("A) x and\nmore\nB) y", ["x and\nmore", "y"]),
        ("Which?\uff21", None),
        ("Only\nA. one", None),
        ("Skips\nA. 1\nC. 3", None),
        ("A. Smith and B. Jones walk.", None),
        ("Plain question", None),
    ],
)
def test_options_in_text(text: str, options: list[str] | None) -> None:
    assert options_in(text) == options


def test_letters_alone_are_no_list_to_print() -> None:
    assert with_options("Which?", ["A", "B"]) == "Which?"
    assert with_options("Which?", None) == "Which?"
