"""Verify and repair: the best few choices by their true divergence, and better ones near them.

Predicted losses add up only roughly. So the choices that several readings of the tables give are measured as they would ship
(every tensor quantised as the file has it, on calibration text beyond what the damage was measured on; never on the text that
judges), and the best is varied: prices of some tensors are shaken, and the knapsack is solved again. Such a neighbour keeps the
budget by itself: where one tensor goes up, others go down. Neighbours are halved: all on a quarter of the text, the better ones
on all of it. The winner's shaken prices are where the next round starts.

Source: EvoPress (Sieberling et al. 2024, arXiv:2410.14649) for level switches with successive halving.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from slmops.artifact.gguf_layout import Tensor
from slmops.build.gguf_file import GgufFile, open_gguf
from slmops.build.graph import StepContext
from slmops.build.speeds import budget_seconds, speed_table
from slmops.build.steps.choose import CORRECTIONS, Space, space_of
from slmops.build.steps.divergence import KeptText, log_softmax
from slmops.build.steps.quantise import quantiser_of
from slmops.build.steps.sensitivity import patch
from slmops.build.steps.tensors import TensorQuantiser
from slmops.core.search.knapsack import Option, solve_within_time
from slmops.runtimes.llama_cpp.logits import LogitModel
from slmops.runtimes.llama_cpp.quantise import dequantise_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

USES = (
    "slmops.artifact.gguf_layout",
    "slmops.build.feedback",
    "slmops.build.gguf_file",
    "slmops.build.speeds",
    "slmops.build.steps.calibrate",
    "slmops.build.steps.choose",
    "slmops.build.steps.divergence",
    "slmops.build.steps.quantise",
    "slmops.build.steps.sensitivity",
    "slmops.build.steps.tensors",
    "slmops.core.search.knapsack",
    "slmops.core.search.sensitivity",
    "slmops.runtimes.llama_cpp.blocks",
    "slmops.runtimes.llama_cpp.logits",
    "slmops.runtimes.llama_cpp.quantise",
)
#: neighbours of one round; the first halving keeps a quarter
ROUND = 8
#: share of the tensors whose price is shaken, and by how much (standard deviation of its logarithm)
SHAKEN_SHARE, SHAKEN_BY = 0.15, 0.7


class Trial:
    """Files that are tried: one scratch file in F16 into which dequantised tensors are written.

    Args:
        folder: for the scratch file.
        model: the F16 reference.
        quantiser: makes tensors as the shipped file has them.
        sequences: token ids of the text.
    """

    def __init__(
        self, folder: Path, model: GgufFile, quantiser: TensorQuantiser, sequences: Sequence[Sequence[int]]
    ) -> None:
        self._path = folder / ".trial.gguf"
        shutil.copyfile(model.path, self._path)
        self._path.chmod(0o600)
        self._sink: BinaryIO = self._path.open("r+b", buffering=0)
        self._model = model
        self._quantiser = quantiser
        self._tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in model.layout.tensors}
        self._now: dict[str, str] = {}
        self._sequences = sequences
        self._exact = KeptText(self._logprobs(model.path, sequences))
        self.measured = 0

    def divergence(self, types: Mapping[str, str], ratio: float = 1.0) -> float:
        """Mean divergence of a choice on the first part of the text.

        Args:
            types: of every quantised tensor.
            ratio: share of the text.
        """
        for name, kind in types.items():
            if self._now.get(name, "F16") != kind:
                tensor = self._tensors[name]
                blob: bytes | memoryview = self._model.blob(tensor)
                if kind != "F16":
                    values = dequantise_rows(kind, self._quantiser.make(tensor, kind), tensor.shape[0])
                    blob = values.astype("<f2").tobytes()
                patch(self._sink, tensor, blob)
                self._now[name] = kind
        self.measured += 1
        count = max(1, math.ceil(len(self._sequences) * ratio))
        return self._exact.mean_divergence(self._logprobs(self._path, self._sequences[:count]))

    @staticmethod
    def _logprobs(path: Path, sequences: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        longest = max(map(len, sequences))
        context = math.ceil(longest / 64) * 64
        with LogitModel(path, context_tokens=context, threads=1, batch_tokens=256) as model:
            for token_ids in sequences:
                yield log_softmax(model.logits(token_ids)[:-1])

    def close(self) -> None:
        """Remove the scratch file."""
        self._sink.close()
        self._path.unlink()


def repair(context: StepContext) -> dict[str, Any]:
    """Measure the best choices and look for better ones near them.

    Files in: ``model``, ``imatrix``, ``text``, maybe ``hessians`` (value ``inputs``) and ``scales``. Values in: ``choice``, and
    what it was made of. Params: those of the choice, ``tokens``, ``neighbours``, ``seed``. Value: as the choice's, with the
    better types, and ``verified``: what was measured.
    """
    params, choice = context.params, dict(context.values["choice"])
    sequences = _text(context.files["text"], int(params["tokens"]))
    rng = np.random.default_rng(int(params["seed"]))
    with open_gguf(context.files["model"]) as model:
        speeds = speed_table(context.files, context.values)
        limits = choice["budget_bytes"], budget_seconds(speeds, params)
        space = space_of(model, context.values, params, speeds=speeds)
        trial = Trial(context.out, model, quantiser_of(context, model), sequences)
        try:
            candidates = [dict(choice["types"])]
            tables = [space.table]
            for correction in CORRECTIONS:
                other = space_of(model, context.values, params, correction=correction, speeds=speeds)
                types = _solved(other, other.table, *limits)
                if types is not None and types not in candidates:
                    candidates.append(types)
                    tables.append(other.table)
            values = []
            for index, types in enumerate(candidates):
                values.append(trial.divergence(types))
                context.progress(None, f"choice {index + 1}: KL divergence {values[-1]:.4f}")
            best = int(np.argmin(values))
            types, value, table = candidates[best], values[best], tables[best]
            accepted = 0
            left = int(params["neighbours"])
            while left > 0:
                count = min(ROUND, left)
                left -= count
                shaken = [_shaken(table, rng) for _ in range(count)]
                near = [(_solved(space, one, *limits), one) for one in shaken]
                unlike = [(found, one) for found, one in near if found is not None and found != types]
                early = [(trial.divergence(found, 0.25), found, one) for found, one in unlike]
                early.sort(key=lambda entry: entry[0])
                for _, found, one in early[: max(1, count // 4)]:
                    measured = trial.divergence(found)
                    if measured < value:
                        types, value, table = found, measured, one
                        accepted += 1
                context.progress(None, f"{accepted} repairs: KL divergence {value:.4f}")
        finally:
            trial.close()
        size_bytes = space.fixed_bytes + sum(space.sizes[name][kind] for name, kind in types.items())
    return choice | {
        "types": types,
        "size_bytes": size_bytes,
        "verified": {
            "tokens": sum(map(len, sequences)),
            "choices": [round(one, 6) for one in values],
            "before": round(values[0], 6),
            "after": round(value, 6),
            "repairs": accepted,
            "measurements": trial.measured,
        },
    }


def _solved(
    space: Space, table: Sequence[Sequence[Option]], budget_bytes: int, budget_s: float
) -> dict[str, str] | None:
    solved = solve_within_time(table, budget_bytes - space.fixed_bytes, budget_s)
    if solved is None:
        return None
    found, _ = solved
    return {name: row[pick].name for name, row, pick in zip(space.names, table, found.picks, strict=True)}


def _shaken(table: Sequence[Sequence[Option]], rng: np.random.Generator) -> list[list[Option]]:
    """The table with some tensors' losses raised or lowered."""
    factors = np.where(
        rng.random(len(table)) < SHAKEN_SHARE, np.exp(rng.normal(0.0, SHAKEN_BY, len(table))), 1.0
    )
    return [
        [
            Option(option.name, option.size_bytes, option.loss * float(factor), option.seconds)
            for option in row
        ]
        for row, factor in zip(table, factors, strict=True)
    ]


def _text(path: Path, tokens: int) -> list[list[int]]:
    """Sequences from the end of the calibration text: damage is measured on those at its beginning."""
    sequences: list[list[int]] = []
    for token_ids in reversed(json.loads(path.read_text(encoding="utf-8"))):
        if sum(map(len, sequences)) >= tokens:
            break
        if len(token_ids) > 1:
            sequences.append(token_ids)
    return sequences
