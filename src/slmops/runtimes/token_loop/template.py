"""Chat messages to prompt text: the model's own Jinja template in a sandbox, with what Hugging Face gives a template.

Source: transformers ``utils/chat_template_utils.py`` (trim_blocks, lstrip_blocks, ``tojson`` without escapes,
``raise_exception``, ``strftime_now``, loop controls).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slmops.core.errors import UsageError


class ChatTemplate:
    """One model's template.

    Args:
        source: Jinja text.
        bos_text, eos_text: what ``bos_token`` and ``eos_token`` are in the template.

    Raises:
        ValueError: the template is no Jinja.
    """

    def __init__(self, source: str, *, bos_text: str, eos_text: str) -> None:
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        # the one clock of a template: models are trained with today's date in the prompt
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"failed to read the chat template: {error}") from error
        self._fixed = {"bos_token": bos_text, "eos_token": eos_text}

    def render(self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] | None = None) -> str:
        """Prompt text of a chat, generation prompt included.

        Args:
            messages: in OpenAI's shape; text parts are joined.
            extra: more variables (``chat_template_kwargs``).

        Raises:
            UsageError: the template refuses these messages.
        """
        flat = [dict(message) | {"content": _text(message.get("content"))} for message in messages]
        variables = {"add_generation_prompt": True, **self._fixed, **(extra or {}), "messages": flat}
        try:
            return self._template.render(variables)
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(
                f"the model's chat template refuses these messages: {error}",
                hint="see its chat_template.jinja",
            ) from error


def _text(content: Any) -> Any:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return "" if content is None else content


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)
