"""Write the reference pages that come from code: machine diagrams, error catalogue, message and document fields.

``python docs/generate.py`` writes; ``python docs/generate.py --check`` only says what would change (exit code 1).
A page may hold hand-written text around the generated parts, which stand between two marker comments.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from machine_walks import BAKE_MAX_S, BAKE_MIN_S, WAVES, DeviceEdge, walk_device, walk_rollout

from slmops.artifact import chunkmap, manifest
from slmops.core import errors
from slmops.core.device import machine as device
from slmops.core.device.fit import RUNTIME_MEMORY
from slmops.core.evidence.gates import Verdict
from slmops.core.rollout import machine as rollout
from slmops.protocol import messages
from slmops.protocol.documents.reader import KINDS, json_schema
from slmops.runtimes.external.llama_server import llama_server
from slmops.runtimes.matrix import matrix_table
from slmops.runtimes.registry import BUILT_IN, DECLARED_BY_OWNER, load_unchecked

ROOT = Path(__file__).resolve().parent
REFERENCE = ROOT / "reference"


# ---- diagrams --------------------------------------------------------------------------------------------


def diagram(edges: Iterable[tuple[str, str, str]], starts: Iterable[str], ends: Iterable[str]) -> str:
    """A Mermaid state diagram; all events on one arrow share its label."""
    labels: dict[tuple[str, str], set[str]] = defaultdict(set)
    for before, event, after in edges:
        labels[before, after].add(event)
    lines = ["```mermaid", "stateDiagram-v2", *(f"    [*] --> {start}" for start in starts)]
    lines += [f"    {a} --> {b}: {', '.join(sorted(events))}" for (a, b), events in sorted(labels.items())]
    lines += [f"    {end} --> [*]" for end in sorted(ends)]
    return "\n".join([*lines, "```"])


def device_diagram() -> str:
    """Every change of phase that the walk found; the ways back to the four resting phases are drawn as one."""
    edges = set()
    for edge in walk_device():
        before, after = edge.before.phase, edge.after.phase
        if before is not after:
            back = before in device.BEFORE_ACTIVATION and after in device.RESTING
            edges.add((before.value, device_event(edge), "as_before" if back else after.value))
    drawn = diagram(edges, [device.Phase.IDLE.value], ())
    return drawn.replace(
        "stateDiagram-v2\n", 'stateDiagram-v2\n    state "the phase it rested in" as as_before\n'
    )


def device_event(edge: DeviceEdge) -> str:
    """The event's name, or the limit that it ran into."""
    failure = edge.after.failure or (edge.after.outcome.failure if edge.after.outcome else None)
    if failure is not None and failure.code in ("device.loop", "device.crash_loop"):
        return "too many steps" if failure.code == "device.loop" else "too many starts"
    return type(edge.event).__name__


def device_table() -> str:
    """Which event means something in which phase."""
    rows = ["| event | what it says | phases |", "|---|---|---|"]
    for event, (phases, _) in device.TABLE.items():
        where = (
            "every phase" if phases == frozenset(device.Phase) else ", ".join(ordered(phases, device.Phase))
        )
        rows.append(f"| `{event.__name__}` | {first_line(event)} | {where} |")
    return "\n".join(rows)


def rollout_diagram() -> str:
    """Every change of phase that the walks of all policies found."""
    edges = set()
    for approvals in (0, 1):
        for on_abort in ("hold", "revert_all"):
            policy = rollout.Policy(WAVES, approvals, BAKE_MIN_S, BAKE_MAX_S, on_abort)  # type: ignore[arg-type]
            for edge in walk_rollout(policy):
                if edge.before.phase is not edge.after.phase:
                    edges.add((edge.before.phase.value, event_name(edge.event), edge.after.phase.value))
    final = rollout.ENDED - {rollout.Phase.COMPLETED, rollout.Phase.COMPLETED_PARTIAL, rollout.Phase.ABORTED}
    starts = [rollout.Phase.AWAITING_APPROVAL.value, rollout.Phase.SCHEDULED.value]
    return diagram(edges, starts, (phase.value for phase in final))


def event_name(event: rollout.Event) -> str:
    """A judgement's verdict decides where it leads, so the diagram names it."""
    if isinstance(event, rollout.Judged):
        settled = event.complete or event.verdict is not Verdict.PASS
        return f"Judged({event.verdict.value})" if settled else "Judged(pass, not settled)"
    return type(event).__name__


def rollout_table() -> str:
    """Legal, late and illegal phases of each event."""
    rows = ["| event | what it says | acts in | ignored in | refused in |", "|---|---|---|---|---|"]
    for event, (legal, late, _) in rollout.TABLE.items():
        refused = frozenset(rollout.Phase) - legal - late
        cells = (", ".join(ordered(phases, rollout.Phase)) or "–" for phases in (legal, late, refused))
        rows.append(f"| `{event.__name__}` | {first_line(event)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def ordered(phases: Iterable[Any], kind: Any) -> list[str]:
    """Phase names in the order of their enumeration."""
    return [phase.value for phase in kind if phase in set(phases)]


# ---- errors ----------------------------------------------------------------------------------------------


def error_classes() -> list[type[errors.SlmopsError]]:
    """The whole tree, parents before children."""

    def below(kind: type[errors.SlmopsError]) -> list[type[errors.SlmopsError]]:
        return [kind, *(child for direct in kind.__subclasses__() for child in below(direct))]

    return [kind for kind in below(errors.SlmopsError) if kind.__module__ == errors.__name__]


def error_table() -> str:
    """One row for each error class."""
    rows = ["| code | class | exit code | HTTP | retry | meaning |", "|---|---|---|---|---|---|"]
    for kind in error_classes():
        rows.append(
            f"| `{kind.code}` | `{kind.__name__}` | {kind.exit_code} | {kind.http_status} | {kind.retry} "
            f"| {first_line(kind)} |"
        )
    return "\n".join(rows)


# ---- runtimes --------------------------------------------------------------------------------------------


def runtime_table() -> str:
    """What each built-in runtime declares; tests/contract/test_capabilities.py proves every line."""
    declared = {name: load_unchecked(name).capabilities for name in set(BUILT_IN) - DECLARED_BY_OWNER}
    declared["external"] = llama_server().capabilities()
    return matrix_table(dict(sorted(declared.items())))


def runtime_memory_table() -> str:
    """The numbers of admission."""
    rows = [
        "| runtime | base, MiB | bytes resident for a byte of weights | KV cache | conversations at once |"
    ]
    rows.append("|---|---|---|---|---|")
    for name, how in sorted(RUNTIME_MEMORY.items()):
        kv = f"always `{how.kv_type}`" if how.kv_type else "as the serving settings say"
        most = how.max_parallel or "as the serving settings say"
        rows.append(f"| {name} | {how.base_bytes >> 20} | {how.weights_ratio} | {kv} | {most} |")
    return "\n".join(rows)


# ---- fields of messages, manifests and documents ------------------------------------------------------------


def struct_section(kind: type[msgspec.Struct]) -> str:
    """One struct: its docstring and a table of its fields."""
    schema = msgspec.json.schema_components([kind])[1][kind.__name__]
    required = set(schema.get("required", ()))
    rows = ["| field | type | required |", "|---|---|---|"]
    for name, shape in schema["properties"].items():
        rows.append(f"| `{name}` | {type_words(shape)} | {'yes' if name in required else 'no'} |")
    return f"### {kind.__name__}\n\n{prose(inspect.getdoc(kind))}\n\n" + "\n".join(rows)


def type_words(shape: dict[str, Any]) -> str:
    """A JSON Schema type in a few words."""
    if "$ref" in shape:
        name = shape["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in shape:
        return " or ".join(type_words(option) for option in shape["anyOf"])
    if "enum" in shape:
        return " · ".join(f"`{value}`" for value in shape["enum"])
    if shape.get("type") == "array":
        return f"list of {type_words(shape['items'])}"
    if shape.get("type") == "object":
        extra = shape.get("additionalProperties")
        return f"object of {type_words(extra)}" if isinstance(extra, dict) else "object"
    pattern = shape.get("pattern", "")
    if "[0-9a-f]{64}" in pattern:
        return "SHA-256, or empty" if "?" in pattern else "SHA-256"
    bounds = "".join(
        f"{sign} {shape[key]}"
        for key, sign in (("minimum", " ≥"),)
        if key in shape and shape["type"] != "string"
    )
    return f"{shape.get('type', 'any')}{bounds}"


def structs_of(module: Any) -> list[type[msgspec.Struct]]:
    """The structs that a module defines, in the order of its text."""
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
    ]
    return sorted(kinds, key=lambda kind: inspect.getsourcelines(kind)[1])


def sections(module: Any) -> str:
    """Every struct of a module."""
    return "\n\n".join(struct_section(kind) for kind in structs_of(module))


def document_fields(kind: str) -> str:
    """Every field of a YAML document, one table for each part."""
    schema = json_schema(kind)
    parts = {kind: schema, **schema.get("$defs", {})}
    text = []
    for name, part in parts.items():
        if "properties" not in part:
            continue
        required = set(part.get("required", ()))
        rows = ["| field | type | default |", "|---|---|---|"]
        for field, shape in part["properties"].items():
            default = (
                "**required**" if field in required else json.dumps(shape.get("default"), ensure_ascii=False)
            )
            rows.append(f"| `{field}` | {document_type(shape, kind)} | {short(default)} |")
        title = f"#### {kind}{'' if name == kind else ' · ' + name}"
        text.append(f"{title}\n\n{prose(part.get('description', ''))}\n\n" + "\n".join(rows))
    return "\n\n".join(text)


def document_type(shape: dict[str, Any], kind: str) -> str:
    """As :func:`type_words`, with links to the document's own parts."""
    if shape.get("description", "").startswith(("bytes:", "0..1,")):
        return str(shape["description"])
    if "$ref" in shape:
        return f"{shape['$ref'].rsplit('/', 1)[1]}"
    if "anyOf" in shape:
        return " or ".join(document_type(option, kind) for option in shape["anyOf"])
    if shape.get("type") == "array":
        items = shape.get("items", {})
        return f"list of {document_type(items, kind)}"
    if "const" in shape:
        return f"`{shape['const']}`"
    return type_words(shape)


def short(default: str) -> str:
    """A default that fits into a table."""
    return default if default.startswith("**") or len(default) <= 40 else "see below"


def first_line(kind: Any) -> str:
    """The summary of a docstring, as table text."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: single backticks, the attribute list as a list."""
    text = (docstring or "").replace("``", "`")
    text = re.sub(r":(?:class|data|func):`~?([^`]+)`", r"`\1`", text)
    head, _, attributes = text.partition("\nAttributes:\n")
    if not attributes:
        return head
    items = re.sub(r"\n {8}\s*", " ", "\n" + attributes.rstrip())
    return head.rstrip() + "\n" + re.sub(r"\n {4}(\w[\w, ]*):", r"\n* `\1`:", items)


# ---- writing ---------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "device-diagram": device_diagram,
    "device-table": device_table,
    "rollout-diagram": rollout_diagram,
    "rollout-table": rollout_table,
    "error-table": error_table,
    "runtime-table": runtime_table,
    "runtime-memory-table": runtime_memory_table,
    "message-fields": lambda: sections(messages),
    "manifest-fields": lambda: sections(manifest),
    "chunk-map-fields": lambda: sections(chunkmap),
    **{f"document-{kind}": (lambda kind=kind: document_fields(kind)) for kind in KINDS},  # type: ignore[misc]
}
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    wanted: dict[Path, str] = {}
    for path in sorted(REFERENCE.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        wanted[path] = _PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[3]}", text)
    for kind in KINDS:
        content = json.dumps(json_schema(kind), indent=2, ensure_ascii=False) + "\n"
        wanted[REFERENCE / "schemas" / f"{kind}.json"] = content
    return wanted


def main() -> int:
    """Write or check; 1 when a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a page is out of date")
    check = parser.parse_args().check
    stale = 0
    for path, content in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == content:
            continue
        stale += 1
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT.parent)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
