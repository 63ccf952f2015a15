"""The text of a chat template, and what of it would be no function of the message."""

from __future__ import annotations

import contextlib
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

# In the place of transformers' own, which reads the clock.  What a template is given is plain data:
# the moment is in the texts of all codes.  "+" keeps the line break behind it.
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{%- set made = namespace(text=format) -%}"
    "{%- for code, text in moment_texts.items() -%}"
    "{%- set made.text = made.text.replace(code, text) -%}{%- endfor -%}"
    "{{- made.text -}}{%- endmacro +%}"
)
_CODES = "aAbBcdDeFGgHhIjklmMnpPrRsStTuUVwWxXyYzZfC"
_CODE = ("name", "operator")  # of what jinja's lexer finds


def template_text(template: Any) -> str:
    """A tokenizer's ``chat_template``: a text, or named ones; empty where there is none.

    Of named ones transformers takes "default", and refuses to choose among others.
    """
    if isinstance(template, dict):
        template = template.get("default", "none" if template else "")
    return str(template or "").strip()


def check_chance(template: str, source: str) -> None:
    """Raise ValueError where a chat template draws random numbers."""
    with contextlib.suppress(TemplateSyntaxError):  # which rendering says
        code = [text for _, kind, text in Environment().lex(template) if kind in _CODE]
        if "lipsum" in code or ("|", "random") in pairwise(code):
            raise ValueError(
                f"{source}: its chat template draws random numbers (random, lipsum), so that a "
                "problem's prompt is another one each time; correct chat_template.jinja"
            )


def dated(template: str, moment: datetime) -> dict[str, Any]:
    """Arguments of ``apply_chat_template`` with which ``template`` reads ``moment`` as now."""
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in _CODES]
    texts = {code: moment.strftime(code) for code in codes}
    return {"chat_template": _STRFTIME + template, "moment_texts": texts}
