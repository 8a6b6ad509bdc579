"""The comparisons: ids, template bytes, special tokens, stop tokens, greedy answers, divergences. Pure arithmetic.

Every comparison tells the first difference, and its cause where that is known: a prompt begun twice, a space that one side
adds, control tokens read as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHOWN = 60


@dataclass(frozen=True)
class Check:
    """What one comparison found.

    Attributes:
        name: ``token ids``, ``chat template``, ...
        passed: None where the engine cannot be asked: then the file beside it was compared, or nothing; ``note`` says.
        compared: how many things; ``differing``: how many of them differ.
        first: the first difference, for people; ``cause``: why, where known.
        figures: measured values by name.
    """

    name: str
    passed: bool
    compared: int
    differing: int = 0
    first: str = ""
    cause: str = ""
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"figures": dict(self.figures)}

    def line(self) -> str:
        """One line for people."""
        said = f"{self.name}: {self.differing} of {self.compared} differ" if self.differing else self.name
        parts = [said, self.first, f"cause: {self.cause}" if self.cause else ""]
        return "; ".join(part for part in parts if part)


def same_ids(
    texts: Sequence[str],
    source: Sequence[Sequence[int]],
    export: Sequence[Sequence[int]],
    *,
    bos: int | None,
    special: Mapping[int, str],
    allowed_prefix: Sequence[int] = (),
) -> Check:
    """Token ids of every text.

    Args:
        texts: what was tokenised.
        source: ids by the source's tokenizer.
        export: ids by the export's.
        bos: the model's first token, to name a prompt that is begun twice.
        special: texts of special tokens by id.
        allowed_prefix: ids that the engine puts before every text by itself and that its adapter takes away.
    """
    prefix = list(allowed_prefix)
    differing = [
        at
        for at, (ours, theirs) in enumerate(zip(source, export, strict=True))
        if [*prefix, *ours] != list(theirs)
    ]
    if not differing:
        return Check("token ids", True, len(texts))
    at = differing[0]
    ours, theirs = [*prefix, *source[at]], list(export[at])
    where = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    first = f"{texts[at][:_SHOWN]!r}: at token {where} source has {ours[where : where + 4]}, export {theirs[where : where + 4]}"
    cause = cause_of_ids(ours, theirs, bos=bos, special=special, text=texts[at])
    return Check("token ids", False, len(texts), len(differing), first, cause)


def cause_of_ids(
    source: Sequence[int],
    export: Sequence[int],
    *,
    bos: int | None,
    special: Mapping[int, str],
    text: str,
) -> str:
    """Why two tokenisations differ, where that is known; empty where it is not."""
    ours, theirs = list(source), list(export)
    if bos is not None and theirs == [bos, *ours]:
        if ours[:1] == [bos]:
            return "the prompt is begun twice: the engine adds BOS to a text that has it (double BOS)"
        return "the export adds BOS where the source adds none"
    if bos is not None and ours == [bos, *theirs]:
        return "the export leaves out BOS, which the source adds"
    here, there = (any(token in special for token in ids) for ids in (ours, theirs))
    if here != there:
        read = ("control tokens in the text", "plain text") if here else ("plain text", "control tokens")
        return f"{read[0]} is read as {read[1]} by the export"
    if theirs[1:] == ours[1:] and len(theirs) == len(ours) and text[:1] not in (" ", ""):
        return "the export puts a space before the text"
    if not theirs and ours:
        return "the export drops the text"
    if any(character.isdigit() for character in text) and len(theirs) != len(ours):
        return "digits may be split otherwise (the pre-tokenizer's digit rule)"
    return ""


def same_template(
    conversations: Sequence[Any], source: Sequence[str], export: Sequence[str], *, bos_text: str
) -> Check:
    """The bytes of rendered conversations."""
    differing = [at for at, (a, b) in enumerate(zip(source, export, strict=True)) if a.encode() != b.encode()]
    if not differing:
        return Check("chat template", True, len(conversations))
    ours, theirs = source[differing[0]], export[differing[0]]
    where = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    first = (
        f"conversation {differing[0]}: at character {where} source has {ours[where : where + _SHOWN]!r}, "
        f"export {theirs[where : where + _SHOWN]!r}"
    )
    cause = ""
    if bos_text and theirs == bos_text + ours:
        cause = "the export renders BOS at the beginning: tokenised with BOS added, the prompt is begun twice"
    elif theirs.strip() == ours.strip():
        cause = "only white space at an end differs (a template's trimming)"
    return Check("chat template", False, len(conversations), len(differing), first, cause)


def same_special(source: Mapping[str, Any], export: Mapping[str, Any]) -> Check:
    """Special tokens: BOS, whether it is added, and what ends an answer."""
    names = [name for name in ("bos_token", "eos_tokens", "add_bos") if name in export]
    differing = [name for name in names if _ids(source[name]) != _ids(export[name])]
    if not differing:
        return Check("special tokens", True, len(names))
    name = differing[0]
    first = f"{name}: source has {source[name]!r}, export {export[name]!r}"
    cause = ""
    if name == "eos_tokens":
        cause = "the export would not stop where the source does, or earlier"
    return Check("special tokens", False, len(names), len(differing), first, cause)


def _ids(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple)) else value


def same_answers(
    source: Sequence[Sequence[int]],
    export: Sequence[Sequence[int]],
    *,
    first_tokens: int,
    margins: Sequence[float],
    even_nats: float,
) -> Check:
    """Greedy answers: the first tokens of each, as many as the precision's threshold asks for.

    An answer that parts from the source's where the two likeliest tokens were nearly even (within ``even_nats``) is no
    difference: what the precision may change turns it.

    Args:
        source: ids of each answer; ``export``: the same.
        export: see above.
        first_tokens: how many must be the source's; 0: nothing is asked, the share is reported.
        margins: of each answer's first parting, log-probability of the source's token minus the export's, under the source.
        even_nats: margins up to this are no difference.
    """
    agreed = [_common(a, b) for a, b in zip(source, export, strict=True)]
    needed = [min(first_tokens, len(answer)) for answer in source]
    differing = [
        at
        for at, (have, need) in enumerate(zip(agreed, needed, strict=True))
        if have < need and margins[at] > even_nats
    ]
    lengths = sum(len(answer) for answer in source)
    figures = {
        "same_prefix_ratio": sum(agreed) / lengths if lengths else 1.0,
        "identical_ratio": sum(list(a) == list(b) for a, b in zip(source, export, strict=True))
        / max(len(source), 1),
    }
    if not differing:
        return Check("greedy text", True, len(source), figures=figures)
    at = differing[0]
    first = (
        f"answer {at}: parts after {agreed[at]} tokens (source {list(source[at])[agreed[at] : agreed[at] + 3]}, "
        f"export {list(export[at])[agreed[at] : agreed[at] + 3]}), where the source is {margins[at]:.2f} nats surer of its own"
    )
    return Check("greedy text", False, len(source), len(differing), first, figures=figures)


_EVEN_NATS = 0.05


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def divergences(
    source: NDArray[np.float32], export: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL divergence of each position over the whole vocabulary, nats; and whether the likeliest token is the same.

    Args:
        source: logits, shape (n, vocabulary); ``export``: the same.
        export: see above; a padded vocabulary is cut to the source's.
    """
    p, q = _log_softmax(source), _log_softmax(export[:, : source.shape[1]])
    kld: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return kld, p.argmax(axis=1) == q.argmax(axis=1)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def close_enough(
    kld: NDArray[np.float64],
    same_top: NDArray[np.bool_],
    *,
    kld_mean: float,
    kld_p99: float,
    same_top_ratio: float,
) -> Check:
    """Mean and 99 % divergence and same-top against a precision's thresholds; not a number is a difference."""
    figures = {
        "kld_mean": float(kld.mean()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_max": float(kld.max()),
        "same_top_ratio": float(same_top.mean()),
    }
    finite = bool(np.isfinite(kld).all())
    over = [
        f"{name} {figures[name]:.4g}, at most {most:g}"
        for name, most in (("kld_mean", kld_mean), ("kld_p99", kld_p99))
        if not figures[name] <= most
    ]
    if not figures["same_top_ratio"] >= same_top_ratio:
        over.append(f"same_top_ratio {figures['same_top_ratio']:.4g}, at least {same_top_ratio:g}")
    if finite and not over:
        return Check("divergence", True, len(kld), figures=figures)
    worst = int(np.argmax(np.where(np.isfinite(kld), kld, np.inf)))
    cause = "" if finite else "the export gives logits that are no numbers"
    if finite and worst == 0 and kld[0] > 10 * max(float(np.median(kld)), 1e-9):
        cause = "the first position is the worst one: the export may see another beginning (BOS)"
    first = f"{', '.join(over) or 'not finite'}; worst at position {worst}: {kld[worst]:.4g} nats"
    shown = {name: value for name, value in figures.items() if np.isfinite(value)}
    return Check("divergence", False, len(kld), len(over) or 1, first, cause, figures=shown)


def same_in_steps(whole: NDArray[np.float32], last: Sequence[int], made: Sequence[int]) -> Check:
    """The first greedy token by decoding is the likeliest one of a whole pass: the KV cache keeps what the prompt said.

    Args:
        whole: logits at the last position of each prompt, shape (n, vocabulary).
        last: first token that decoding made of each prompt.
        made: the likeliest token of ``whole``, for each prompt.
    """
    differing = [at for at, (a, b) in enumerate(zip(made, last, strict=True)) if a != b]
    even = [at for at in differing if _margin(whole[at], made[at], last[at]) <= _EVEN_NATS]
    left = [at for at in differing if at not in even]
    if not left:
        return Check("decoding", True, len(made))
    first = f"prompt {left[0]}: a whole pass says {made[left[0]]}, decoding says {last[left[0]]}"
    return Check(
        "decoding", False, len(made), len(left), first, "the export's KV cache is not filled as it is read"
    )


def _margin(logits: NDArray[np.float32], one: int, other: int) -> float:
    return float(logits[one] - logits[other])
