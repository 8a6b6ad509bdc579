"""`external.json`: how this device starts its own server, and what that server honours. Declared here, proved at load.

The file belongs to the device's owner. Nothing in it comes from a release, and nothing of a release can add to it: a
release fills placeholders with values, each inside the one argument where the owner put it, and no shell reads them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from slmops.core.errors import NotFoundError, RuntimeLoadError, UsageError
from slmops.runtimes.ports import Capabilities, EngineSpec

#: Names the file; the agent sets it when its folder holds an `external.json`.
ENVIRONMENT_VARIABLE = "SLMOPS_EXTERNAL_RUNTIME"
SCHEMA = 1

#: What may stand in `command` and `when`; `{api_key}` may stand in `env` only, because others can read arguments.
PLACEHOLDERS = (
    "model",
    "model_name",
    "context_tokens",
    "total_context_tokens",
    "slots",
    "max_requests",
    "threads",
    "kv_cache",
    "batch_tokens",
    "ubatch_tokens",
    "port",
    "socket",
    "chat_template_file",
)
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")

_SAMPLING = frozenset(
    {
        "max_tokens",
        "messages",
        "model",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "user",
    }
)
_LLAMA_SAMPLING = frozenset(
    {"frequency_penalty", "grammar", "ignore_eos", "json_schema", "logit_bias", "max_tokens", "min_p", "model", "n",
     "presence_penalty", "repeat_penalty", "seed", "stop", "stream", "stream_options", "temperature", "top_k", "top_p",
     "user"}
)  # fmt: skip
_LLAMA_CHAT = frozenset(
    {"chat_template_kwargs", "logprobs", "max_completion_tokens", "messages", "parallel_tool_calls",
     "response_format", "tool_choice", "tools", "top_logprobs"}
)  # fmt: skip
_LLAMA_KV = frozenset({"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"})


class OptionalArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments that are appended when an engine is asked for something; absent ones say that it cannot be had.

    Attributes:
        embeddings: when embeddings are wanted.
        chat_template: when the release brings a template of its own; `{chat_template_file}` is its file.
        no_repack: when there is no memory for weights rearranged in private memory; may be left out.
    """

    embeddings: tuple[str, ...] = ()
    chat_template: tuple[str, ...] = ()
    no_repack: tuple[str, ...] = ()


class ExternalConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See `docs/howto/bring-your-own-server.md`.

    Attributes:
        command: arguments, the program first; not a shell line. `{name}` is one of `PLACEHOLDERS`.
        like: what the server's API is like: "llama-server" has llama.cpp's routes besides OpenAI's (tokens, templates,
            log-probabilities), "openai" has chat and completions only: then nothing can be scored.
        when: arguments for what is asked for now and then.
        env: variables to set; `{api_key}` is a key made for each start, `LLAMA_API_KEY` for llama-server.
        health_path: answers 200 when the server is ready, also during a long prefill.
        chat_fields, completion_fields: request fields that are honoured, in place of those that `like` stands for.
        kv_cache_types: what may stand for `{kv_cache}`; only the server's default ("f16") without that placeholder.
        start_timeout_s: longest from start to ready.
        hang_timeout_s: the server is killed when its health path is silent for so long; 0 never kills.
        keep_log: keep what the server writes after it is ready. Off, because it may write prompts.
    """

    command: tuple[str, ...]
    schema: int = SCHEMA
    like: Literal["llama-server", "openai"] = "openai"
    when: OptionalArguments = OptionalArguments()
    env: dict[str, str] = {}
    health_path: str = "/health"
    chat_fields: frozenset[str] | None = None
    completion_fields: frozenset[str] | None = None
    kv_cache_types: frozenset[str] | None = None
    start_timeout_s: float = 120.0
    hang_timeout_s: float = 120.0
    keep_log: bool = False

    @property
    def uses_socket(self) -> bool:
        """The server listens on a Unix socket: nobody but this user can reach it."""
        return any("{socket}" in argument for argument in self.command)

    def capabilities(self) -> Capabilities:
        """What the owner declares. Scores, tokens and embeddings are proved when an engine is loaded."""
        llama = self.like == "llama-server"
        chat = (_LLAMA_SAMPLING | _LLAMA_CHAT) if llama else _SAMPLING
        completion = (
            (_LLAMA_SAMPLING | {"logprobs", "prompt"}) if llama else (_SAMPLING - {"messages"}) | {"prompt"}
        )
        kv_types = self.kv_cache_types or (_LLAMA_KV if llama else frozenset({"f16"}))
        has_kv = any("{kv_cache}" in argument for argument in self.command)
        return Capabilities(
            chat_fields=chat if self.chat_fields is None else self.chat_fields,
            completion_fields=completion if self.completion_fields is None else self.completion_fields,
            kv_cache_types=kv_types if has_kv else frozenset({"f16"}),
            adapters=False,
            adapter_scale_per_request=False,
            score=llama,
            embeddings=llama and bool(self.when.embeddings),
            embeddings_with_chat=llama and bool(self.when.embeddings),
        )

    def program(self) -> Path:
        """Where the program is.

        Raises:
            RuntimeLoadError: it is not there, or may not be run.
        """
        found = shutil.which(self.command[0])
        if found is None:
            raise RuntimeLoadError(
                f"external server {self.command[0]!r} is not there, or is no program that may be run",
                hint="install it, or mend `command` in external.json (a full path is safest)",
                path=self.command[0],
            )
        return Path(found).absolute()

    def version(self) -> str:
        """The program's name and the start of its SHA-256: what runs, whatever it calls itself."""
        path = self.program()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return f"{path.name}+{digest.hexdigest()[:12]}"

    def arguments(self, spec: EngineSpec, values: Mapping[str, str]) -> list[str]:
        """The command for one engine.

        Args:
            spec: decides which arguments of `when` are appended.
            values: placeholder to value.

        Raises:
            UsageError: a value would be read as an option.
        """
        given = [str(self.program()), *self.command[1:]]
        if spec.embeddings:
            given += self.when.embeddings
        if spec.chat_template is not None:
            given += self.when.chat_template
        if not spec.repack:
            given += self.when.no_repack
        return [given[0], *(_fill(argument, values) for argument in given[1:])]


def _fill(argument: str, values: Mapping[str, str]) -> str:
    """One pass: a value that looks like a placeholder stays as it is."""
    filled = _PLACEHOLDER.sub(lambda found: values[found[1]], argument)
    if "\0" in filled or (filled.startswith("-") and not argument.startswith("-")):
        raise UsageError(
            f"external: {argument!r} would become {filled!r}, which the server reads as an option",
            hint="give the model a name that begins with a letter",
        )
    return filled


def read_config(path: Path) -> ExternalConfig:
    """Read and check a configuration.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is not one; names the place.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"{path}: {error.strerror}", hint="give the file that describes your server: see docs/howto"
        ) from error
    try:
        config = msgspec.json.decode(content, type=ExternalConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", hint="see docs/howto/bring-your-own-server.md") from error
    if problem := _problem(config):
        raise UsageError(f"{path}: {problem}", hint="see docs/howto/bring-your-own-server.md")
    return config


def configured() -> ExternalConfig:
    """The configuration that the environment names.

    Raises:
        RuntimeLoadError: it names none.
        NotFoundError, UsageError: see `read_config`.
    """
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        raise RuntimeLoadError(
            "this device declares no external server",
            hint=f"slmops agent enroll --external FILE, or set {ENVIRONMENT_VARIABLE} to the file",
        )
    return read_config(Path(path))


def _problem(config: ExternalConfig) -> str:  # noqa: PLR0911 - one line a rule
    """What is wrong; empty when nothing is."""
    if config.schema > SCHEMA:
        return f"schema {config.schema} is newer than ours ({SCHEMA})"
    if not config.command or not config.command[0]:
        return "command is empty"
    if _PLACEHOLDER.search(config.command[0]):
        return "the program itself must not be a placeholder"
    every = (*config.command, *config.when.embeddings, *config.when.chat_template, *config.when.no_repack)
    used = {name for argument in every for name in _PLACEHOLDER.findall(argument)}
    if "api_key" in used:
        return "{api_key} stands in command, where everybody on the machine can read it: put it into env"
    if unknown := sorted(used - set(PLACEHOLDERS)):
        return f"unknown placeholder {{{unknown[0]}}}: known are {', '.join(PLACEHOLDERS)}"
    if "model" not in used:
        return "command has no {model}: the server would not know what to serve"
    if ("port" in used) == ("socket" in used):
        return "command needs either {port} or {socket}: where the server listens is chosen at each start"
    if config.when.chat_template and not any(
        "{chat_template_file}" in one for one in config.when.chat_template
    ):
        return "when.chat_template has no {chat_template_file}"
    if (
        not config.health_path.startswith("/")
        or not config.health_path.isascii()
        or " " in config.health_path
    ):
        return f"health_path must be a path such as /health, not {config.health_path!r}"
    if not (0 < config.start_timeout_s <= 3600 and 0 <= config.hang_timeout_s <= 3600):
        return "start_timeout_s and hang_timeout_s must be seconds, at most 3600"
    return ""
