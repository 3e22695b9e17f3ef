"""Texts around a question: those of the recipes to the letter, added once, by name, file or key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.dataset import PromptDataset
from megatron_mmrl.data.template import Template, load_template, shipped_templates, template_of
from megatron_mmrl.types import Message, Prompt
from tests.unit.data_rows import row, write


def ask(text: str = "<image>Find x.", *more: Message) -> Prompt:
    messages = (Message(role="user", text=text), *more)
    return Prompt(id="f:0", source="s", messages=messages, images=(b"",), answer="1")


def texts(template: Template, prompt: Prompt | None = None) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in template.apply(prompt or ask()).messages]


def test_siirl_puts_its_instruction_first_unless_it_is_there() -> None:
    ((role, text),) = texts(load_template("siirl"))
    assert role == "user"
    assert text.startswith("You should first thinks about the reasoning process in the mind and then provides the user")
    assert text.endswith(
        "wrapped in $...$.The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. </think><answer> $2$ </answer>, which "
        "means your output should start with <think> and end with </answer>. <image>Find x."
    )
    own = (
        "You should first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "Short: <image>Find x."
    )
    assert texts(load_template("siirl"), ask(own)) == [("user", own)]


def test_the_other_recipes() -> None:
    assert texts(load_template("verl_boxed")) == [
        ("user", "<image>Find x. Let's think step by step and output the final answer within \\boxed{}.")
    ]
    (system, question) = texts(load_template("clevr_count"))
    assert question[1] == (
        "<image>Find x. Output the thinking process in <think> </think> and\n final answer (number) in "
        "<answer> </answer> tags."
    )
    assert system == texts(load_template("swift_r1v"))[0]
    assert system[1].startswith("A conversation between User and Assistant.")
    assert texts(load_template("swift_r1v"))[1] == ("user", "<image>Find x.")
    assert texts(load_template("gemma_math"))[0][1].endswith(
        "x. Provide reasoning between <REASONING> and </REASONING> and solution between <SOLUTION> and </SOLUTION>"
    )
    assert "using the \\boxed{} command" in texts(load_template("mm_eureka"))[0][1]


@pytest.mark.parametrize("name", shipped_templates())
def test_adding_twice_adds_once(name: str) -> None:
    template = load_template(name)
    once = template.apply(ask())
    assert once.messages != ask().messages
    assert template.apply(once) == once


def test_a_system_turn_of_the_rows_own_stays() -> None:
    prompt = Prompt(id="f:0", source="s", messages=(Message(role="system", text="Mine."),), images=(), answer="1")
    assert texts(load_template("swift_r1v"), prompt) == [("system", "Mine.")]


def test_keys_take_the_place_of_the_templates_texts(tmp_path: Path) -> None:
    config = DataConfig(template="clevr_count", system_prompt="Be short.", instruction_suffix=" Now!")
    assert texts(template_of(config)) == [("system", "Be short."), ("user", "<image>Find x. Now!")]
    assert texts(template_of(DataConfig())) == [("user", "<image>Find x.")]
    file = tmp_path / "mine.yaml"
    file.write_text("before: 'Q: '\nafter: ' A:'\n")
    assert texts(load_template(str(file)), ask("Find x.")) == [("user", "Q: Find x. A:")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("before: [1", "not valid YAML"), ("befor: x", "befor.*its keys are after, before"), ("after: 3", "must be text"),
     ("- x", "has list"), ("", "has NoneType")],
)  # fmt: skip
def test_what_is_no_template_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_template(str(file))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"template 'sirl' is neither a YAML file nor one of .*siirl"):
        load_template("sirl")


def test_a_dataset_applies_the_template_and_stops_at_max_samples(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.parquet", [row(answer=str(i)) for i in range(6)])]
    dataset = PromptDataset(files, DataConfig(template="verl_boxed", max_samples=4))
    assert len(dataset) == 4
    assert dataset.prompt(3).messages[0].text.endswith("\\boxed{}.")
    assert len(PromptDataset(files, DataConfig(max_samples=100))) == 6
    with pytest.raises(ValueError, match="template 'none'"):
        PromptDataset(files, DataConfig(template="none"))
