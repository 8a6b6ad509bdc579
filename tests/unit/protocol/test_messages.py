"""Messages between agent and control plane: newer peers are understood, damage is named, nothing odd gets in."""

from __future__ import annotations

import msgspec
import pytest
from golden_examples import ASSIGNMENT, CHECKIN, MESSAGES, fake
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.core.errors import UsageError, VersionMismatchError
from slmops.protocol import messages as p


def altered(message: msgspec.Struct, path: str, value: object) -> bytes:
    """A message's bytes with one value, deep inside, replaced or added."""
    content = msgspec.json.decode(msgspec.json.encode(message))
    at = content
    *way, last = path.split(".")
    for part in way:
        at = at[int(part)] if isinstance(at, list) else at[part]
    at[last] = value
    return msgspec.json.encode(content)


@pytest.mark.parametrize("name", MESSAGES)
def test_unknown_fields_are_ignored(name: str) -> None:
    message = MESSAGES[name]
    assert p.decode(altered(message, "from_the_future", {"x": [1]}), type(message)) == message  # type: ignore[type-var]


def test_unknown_fields_deep_inside_are_ignored() -> None:
    assert p.decode(altered(CHECKIN, "outcome.golden.new", 1), p.CheckinRequest) == CHECKIN
    assert p.decode(altered(ASSIGNMENT, "serving.new", "x"), p.Assignment) == ASSIGNMENT


@pytest.mark.parametrize("name", [name for name, message in MESSAGES.items() if hasattr(message, "schema")])
def test_a_newer_schema_is_refused_by_name(name: str) -> None:
    """Both sides are told which of the two to update."""
    message = MESSAGES[name]
    with pytest.raises(VersionMismatchError, match=r"has schema 2, 1 is understood here") as caught:
        p.decode(altered(message, "schema", 2), type(message))  # type: ignore[type-var]
    assert (caught.value.http_status, caught.value.hint) == (426, "update the older side of the two")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 0),
        ("schema", "1"),
        ("seq", -1),
        ("seq", 1 << 70),
        ("generation", 1.5),
        ("phase", None),
        ("running", "latest"),
        ("running", "A" * 64),
        ("candidate", "a" * 64 + "\n"),
        ("running_release", "../" + "a" * 61),
        ("fetched_bytes", -5),
        ("facts.ram_limit_bytes", -1),
        ("facts.runtimes", ["llama.cpp"]),
        ("facts.bench.decode_tps", -1.0),
        ("facts.bench.artifact_sha256", ""),
        ("outcome.status", "great"),
        ("outcome.assignment_digest", ""),
        ("outcome.golden.only_old", -3),
        ("outcome.ratios", {"decode_tps": "fast"}),
        ("outcome.golden.lost", "lights-on"),
    ],
)
def test_a_value_outside_its_set_is_named_with_its_place(path: str, value: object) -> None:
    with pytest.raises(UsageError, match="CheckinRequest is malformed") as caught:
        p.decode(altered(CHECKIN, path, value), p.CheckinRequest)
    assert path.rsplit(".", maxsplit=1)[-1] in caught.value.message
    assert caught.value.hint == "compare it with docs/reference/protocol.md"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("action", "explode"),
        ("assignment_digest", "x"),
        ("release_seq", -1),
        ("variant_sha256", "x"),
        ("prompts.0.sha256", ""),
        ("serving.context_tokens", -1),
        ("min_decode_tps", -1),
        ("probation_min_s", -0.5),
    ],
)
def test_a_device_refuses_an_odd_assignment(path: str, value: object) -> None:
    with pytest.raises(UsageError, match="Assignment is malformed"):
        p.decode(altered(ASSIGNMENT, path, value), p.Assignment)


def test_a_device_cannot_be_told_never_to_come_back() -> None:
    for poll_s in ("-1", "1e999", "NaN"):
        content = b'{"schema":1,"accepted_seq":1,"poll_s":' + poll_s.encode() + b"}"
        with pytest.raises(UsageError, match="CheckinResponse is malformed"):
            p.decode(content, p.CheckinResponse)


@pytest.mark.parametrize("path", [path for path in ("schema", "boot_id", "seq", "generation", "phase")])
def test_required_fields_are_required(path: str) -> None:
    content = msgspec.json.decode(msgspec.json.encode(CHECKIN))
    del content[path]
    with pytest.raises(UsageError, match=f"missing required field `{path}`"):
        p.decode(msgspec.json.encode(content), p.CheckinRequest)


def test_an_oversized_message_is_not_parsed() -> None:
    with pytest.raises(UsageError, match=r"CheckinRequest has 262145 bytes, 262144 are allowed"):
        p.decode(b" " * (p.MAX_MESSAGE_BYTES + 1), p.CheckinRequest)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"boot_id":"\xff"}', b'{"x":' + b"[" * 200_000],
    ids=lambda content: repr(content[:9]),
)
def test_wrong_shapes_are_usage_errors(content: bytes) -> None:
    with pytest.raises(UsageError, match="malformed"):
        p.decode(content, p.CheckinRequest)


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(MESSAGES)), data=st.data())
def test_mutations_are_read_or_refused_and_nothing_else(name: str, data: st.DataObject) -> None:
    content = bytearray(p.encode(MESSAGES[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        message = p.decode(bytes(content), type(MESSAGES[name]))  # type: ignore[type-var]
    except UsageError:
        return
    assert p.decode(p.encode(message), type(message)) == message


def test_no_message_can_carry_a_prompt_or_an_answer() -> None:
    """The closed list of text fields that go from a device to the control plane: a new one must be thought about.

    Nothing here is content: names, fixed words, versions, digests, times, and ``detail``, which is numbers in words.
    """
    texts: set[str] = set()

    def visit(kind: type[msgspec.Struct], path: str) -> None:
        schemas = msgspec.json.schema_components([kind])[1]
        for field, shape in schemas[kind.__name__]["properties"].items():
            if (
                shape.get("type") == "string"
                and "enum" not in shape
                and "[0-9a-f]{64}" not in shape.get("pattern", "")
            ):
                texts.add(f"{path}.{field}")
            elif (
                shape.get("type") == "object"
                and shape.get("additionalProperties", {}).get("type") == "string"
            ):
                texts.add(f"{path}.{field}.*")

    for kind in (p.CheckinRequest, p.OutcomeReport, p.GoldenReport, p.Facts, p.Bench):
        visit(kind, kind.__name__)
    assert texts == {
        "CheckinRequest.boot_id",
        "CheckinRequest.phase",
        "CheckinRequest.stale_since",
        "OutcomeReport.rollout_id",
        "OutcomeReport.cause",
        "OutcomeReport.code",
        "OutcomeReport.detail",
        "Facts.arch",
        "Facts.agent_version",
        "Facts.runtimes.*",
        "Facts.limits.*",
        "Bench.measured_at",
        "Bench.runtime",  # a runtime's name
    }


def test_serving_settings_have_no_defaults() -> None:
    """All of them are part of the assignment's identity: one that is left out must not be guessed."""
    assert p.ServingSettings.__struct_defaults__ == ()
    assert msgspec.json.decode(p.encode(p.ServingSettings(1, "f16", 1, 8, ""))) == {
        "context_tokens": 1,
        "kv_cache": "f16",
        "parallel": 1,
        "micro_batch_tokens": 8,
        "system_prompt": "",
    }


def test_digests_may_be_empty_only_where_nothing_runs() -> None:
    idle = p.decode(
        b'{"schema":1,"boot_id":"b","seq":1,"generation":0,"phase":"idle","running":""}', p.CheckinRequest
    )
    assert idle.running == ""
    whatever = p.decode(b'{"schema":1,"generation":3,"action":"revert","assignment_digest":""}', p.Assignment)
    assert whatever.assignment_digest == ""
    assert fake("6") == ASSIGNMENT.assignment_digest
