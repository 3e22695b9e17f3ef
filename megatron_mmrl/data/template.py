"""What is asked around a question: a system turn, and text before and after it, by name, file or key."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.types import Message, Prompt

SHIPPED = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Texts added to a prompt. A prompt that has them already stays as it is, so that adding twice adds once."""

    system: str | None = None
    """Turn before a conversation that has none of its own."""
    before: str = ""
    """Put before each user's turn, image tags included."""
    after: str = ""
    """Put after each user's turn."""
    marker: str = ""
    """A turn that holds this text is left alone; empty: ``before`` and ``after`` are looked for."""

    def apply(self, prompt: Prompt) -> Prompt:
        """``prompt`` with the texts."""
        messages = tuple(self._turn(message) for message in prompt.messages)
        if self.system is not None and all(message.role != "system" for message in messages):
            messages = (Message(role="system", text=self.system), *messages)
        return replace(prompt, messages=messages)

    def _turn(self, message: Message) -> Message:
        if message.role != "user" or (self.marker and self.marker in message.text):
            return message
        before = "" if self.before.strip() in message.text else self.before
        after = "" if self.after.strip() in message.text else self.after
        return replace(message, text=before + message.text + after)


def shipped_templates() -> list[str]:
    """Names of the templates in the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_template(name: str) -> Template:
    """A template of the package by name, or a YAML file with the same keys.

    Raises:
        ValueError: no such template, unknown keys, a value that is not text.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else SHIPPED / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"template {name!r} is neither a YAML file nor one of {', '.join(shipped_templates())}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"template {file} is not valid YAML: {error}") from error
    known = {field.name for field in fields(Template)}
    if not isinstance(values, dict) or not values or set(values) - known:
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"template {file} has {found}; its keys are {', '.join(sorted(known))}")
    if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
        raise ValueError(f"template {file}: {', '.join(wrong)} must be text")
    return Template(**values)


def template_of(config: DataConfig) -> Template:
    """The template that ``data.template``, ``data.system_prompt`` and ``data.instruction_suffix`` make together.

    The latter two take the place of the named template's ``system`` and ``after``. Raises ValueError as load_template.
    """
    template = load_template(config.template) if config.template is not None else Template()
    if config.system_prompt is not None:
        template = replace(template, system=config.system_prompt)
    if config.instruction_suffix is not None:
        template = replace(template, after=config.instruction_suffix, marker="")
    return template
