"""A client that asks every device all the time, and counts what fails."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from slmops.cli.local_fleet.asking import ask

_PAUSE_S = 0.25
_TIMEOUT_S = 180.0


@dataclass
class Tally:
    """What the client saw.

    Attributes:
        served: answers that arrived whole; ``failed``: anything else.
        releases: releases that answered, from the response header.
        problems: the first failures, in words.
    """

    served: int = 0
    failed: int = 0
    releases: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class LoadClient:
    """One thread per device, one request after the other, every second one streamed."""

    def __init__(self, urls: dict[str, str], model: str, commands: Sequence[str]) -> None:
        """Prepare.

        Args:
            urls: device to its ``/v1`` URL.
            model: name to ask for.
            commands: user messages, asked in turn.
        """
        self._urls, self._model, self._commands = urls, model, commands
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.tally = Tally()

    def start(self) -> None:
        """Begin to ask."""
        for index, (device, url) in enumerate(self._urls.items()):
            thread = threading.Thread(
                target=self._ask_for_ever, args=(device, url, index), daemon=True, name=f"load-{device}"
            )
            thread.start()
            self._threads.append(thread)

    def stop(self) -> Tally:
        """Let the requests under way finish, and return the counts."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_TIMEOUT_S)
        return self.tally

    def _ask_for_ever(self, device: str, url: str, turn: int) -> None:
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            while not self._stop.is_set():
                command = self._commands[turn % len(self._commands)]
                try:
                    release = ask(client, self._model, command, stream=turn % 2 == 0)[1]
                    problem = ""
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    release, problem = "", f"{device}: {type(error).__name__}: {error}"
                with self._lock:
                    if problem:
                        self.tally.failed += 1
                        self.tally.problems = [*self.tally.problems, problem][:10]
                    else:
                        self.tally.served += 1
                        self.tally.releases[release] += 1
                turn += 1
                self._stop.wait(_PAUSE_S)


def eval_commands(path: Path, limit: int = 64) -> list[tuple[str, str]]:
    """(command, gold answer) pairs of the evaluation set."""
    pairs: list[tuple[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            pairs.append((str(item["messages"][-1]["content"]), str(item["answer"])))
            if len(pairs) == limit:
                break
    return pairs
