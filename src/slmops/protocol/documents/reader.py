"""Reading YAML with a place for every error: ``file:line:column: what was found, what was expected``."""

from __future__ import annotations

from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from slmops.core.errors import DocumentError
from slmops.protocol.documents.blueprint import Blueprint
from slmops.protocol.documents.profile import Profile
from slmops.protocol.documents.recipe import Recipe

API_VERSION = "slmops/v1"
KINDS: dict[str, type[BaseModel]] = {"Recipe": Recipe, "DeviceProfile": Profile, "Blueprint": Blueprint}
DocumentT = TypeVar("DocumentT", bound=BaseModel)
MAX_BYTES = 4 << 20
_SCALARS = frozenset({"str", "int", "float", "bool", "null", "timestamp"})
_KEY_TAGS = frozenset({"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"})


def load_documents(text: str, source: str) -> list[BaseModel]:
    """Read all documents of a YAML text.

    Args:
        text: YAML, documents separated by ``---``.
        source: file name for error messages.

    Raises:
        DocumentError: malformed YAML or a value that the schema does not allow; one line for each error.
    """
    if len(text) > MAX_BYTES:
        raise DocumentError(
            f"{source}: {len(text)} bytes, {MAX_BYTES} are allowed", hint="this is no blueprint or recipe"
        )
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        raise DocumentError(
            f"{_mark(mark, source)}: not valid YAML: {error.problem}{context}",
            hint="check indentation, colons and quotes at this place",
        ) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{source}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise DocumentError(
            f"{where}: not valid YAML: character U+{ord(text[error.position]):04X} is not allowed",
            hint="save the file as UTF-8 text without control characters",
        ) from error
    except RecursionError as error:
        raise DocumentError(
            f"{source}:1:1: nested too deeply", hint="this is no blueprint or recipe"
        ) from error
    if not nodes:
        raise DocumentError(
            f"{source}:1:1: empty, expected a document",
            hint="start with apiVersion: slmops/v1 and kind: Recipe",
        )
    return [_read(node, source) for node in nodes]


def load_one(text: str, source: str, kind: type[DocumentT]) -> DocumentT:
    """Read the only document of this kind in a text.

    Raises:
        DocumentError: there is none, or more than one, or any document is not valid.
    """
    found = [document for document in load_documents(text, source) if isinstance(document, kind)]
    if len(found) != 1:
        raise DocumentError(
            f"{source}: has {len(found)} documents of kind {_kind_name(kind)}, expected one",
            hint=f"give a file with one kind: {_kind_name(kind)}",
        )
    return found[0]


def json_schema(kind: str) -> dict[str, Any]:
    """JSON Schema of a kind, for editors (published under docs/reference/schemas)."""
    schema = KINDS[kind].model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _kind_name(kind: type[BaseModel]) -> str:
    return next((name for name, known in KINDS.items() if known is kind), kind.__name__)


def _read(node: yaml.Node, source: str) -> BaseModel:
    if not isinstance(node, yaml.MappingNode):
        raise DocumentError(
            f"{_at(node, source)}: expected a mapping with apiVersion and kind",
            hint="start with apiVersion: slmops/v1",
        )
    _refuse_odd_nodes(node, source)
    try:
        value: dict[str, Any] = yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise DocumentError(
            f"{_mark(error.problem_mark, source)}: {error.problem}", hint="use plain YAML values"
        ) from error
    kind, version = value.get("kind"), value.get("apiVersion")
    if version != API_VERSION:
        raise DocumentError(
            f"{_at(_child(node, 'apiVersion') or node, source)}: "
            f"apiVersion is {version!r}, expected {API_VERSION!r}",
            hint=f"write apiVersion: {API_VERSION}",
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise DocumentError(
            f"{_at(_child(node, 'kind') or node, source)}: "
            f"kind is {kind!r}, expected one of {', '.join(KINDS)}",
            hint="write kind: Recipe",
        )
    try:
        return KINDS[kind].model_validate(value)
    except ValidationError as error:
        places = sorted((_explain(node, item) for item in error.errors()), key=lambda place: place[:2])
        raise DocumentError(
            "\n".join(f"{source}:{line}:{column}: {words}" for line, column, words in places),
            hint=f"docs/reference/documents.md has every field of {kind}",
        ) from error


def _explain(node: yaml.Node, item: Any) -> tuple[int, int, str]:
    """One pydantic error with its place in the file: line and column, from 1."""
    at, path = node, []
    for part in item["loc"]:
        child = _child(at, part)
        if child is None:
            if not _is_schema_tag(at, part):
                path.append(str(part))
            continue
        at = child
        path.append(str(part))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        message = "is required"
    elif item["type"] == "extra_forbidden":
        message = "is not a known field here"
        at = _key(node, item["loc"]) or at
    found = item.get("input")
    shown = (
        f" (found {found!r})"
        if isinstance(found, (str, int, float, bool)) and item["type"] != "extra_forbidden"
        else ""
    )
    mark = at.start_mark
    return mark.line + 1, mark.column + 1, f"{'.'.join(path) or 'document'}: {message}{shown}"


def _is_schema_tag(at: yaml.Node, part: int | str) -> bool:
    """Pydantic puts the name of a union's member into the path; it is nothing that the user wrote."""
    return not isinstance(at, yaml.MappingNode) or (isinstance(part, str) and not part.islower())


def _child(node: yaml.Node, part: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return value  # type: ignore[no-any-return]
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part]  # type: ignore[no-any-return]
    return None


def _key(node: yaml.Node, loc: tuple[int | str, ...]) -> yaml.Node | None:
    """The key node of the last part of a path, so that an unknown field is pointed at by its name."""
    at: yaml.Node = node
    for part in loc[:-1]:
        at = _child(at, part) or at
    keys = [key for key, _ in at.value] if isinstance(at, yaml.MappingNode) else []
    return next((key for key in keys if key.value == str(loc[-1])), None)


def _refuse_odd_nodes(root: yaml.Node, source: str) -> None:
    """Refuse what YAML would take silently or fail on without a place.

    A key given twice (the last one would win), a key that is no text, a value that cannot be made
    (``2026-13-45`` reads as a date), an alias that contains itself.
    """
    seen: set[int] = set()
    waiting: list[tuple[yaml.Node, frozenset[int]]] = [(root, frozenset())]
    while waiting:
        node, above = waiting.pop()
        if id(node) in above:
            raise DocumentError(
                f"{_at(node, source)}: contains itself", hint="write the value out instead of an alias"
            )
        if id(node) in seen:  # an alias: looked at once is enough
            continue
        seen.add(id(node))
        inside = above | {id(node)}
        if isinstance(node, yaml.MappingNode):
            _refuse_odd_keys(node, source)
            waiting.extend((value, inside) for _, value in reversed(node.value))
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend((item, inside) for item in reversed(node.value))
        else:
            _refuse_odd_scalar(node, source)


def _refuse_odd_scalar(node: yaml.Node, source: str) -> None:
    if node.tag.rpartition(":")[2] not in _SCALARS:
        raise DocumentError(
            f"{_at(node, source)}: tag {node.tag} is not allowed", hint="use plain YAML values"
        )
    try:
        yaml.SafeLoader("").construct_object(node)
    except ValueError as error:
        raise DocumentError(
            f"{_at(node, source)}: {node.value!r} reads as a {node.tag.rpartition(':')[2]}, but is not a valid one",
            hint="put it in quotes",
        ) from error


def _refuse_odd_keys(node: yaml.MappingNode, source: str) -> None:
    keys: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
            raise DocumentError(f"{_at(key, source)}: a key must be text", hint="put the key in quotes")
        if key.value in keys:
            raise DocumentError(f"{_at(key, source)}: {key.value}: given twice", hint="keep one of the two")
        keys.add(key.value)


def _mark(mark: yaml.Mark | None, source: str) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source


def _at(node: yaml.Node, source: str) -> str:
    return _mark(node.start_mark, source)
