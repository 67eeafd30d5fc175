"""The trained heads and plans of a server: which setting of which strategy each file is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.decode.strategy import all_strategies


class Heads:
    """Files by the names that requests give; each must be one that some strategy reads.

    A request opens no file by its path, and none of another kind than its strategy needs, so that no
    error tells a client where this machine keeps its files.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = dict(files)
        self._fitting: dict[tuple[str, str], list[str]] = {}
        used: set[str] = set()
        refusals: dict[str, str] = {}
        for strategy, settings in all_strategies().items():
            for key, read in settings.files.items():
                fitting = self._fitting.setdefault((strategy, key), [])
                for name, file in self._files.items():
                    try:
                        read(file)
                    except PunaError as error:
                        refusals.setdefault(name, error.message)
                    else:
                        fitting.append(name)
                        used.add(name)
        for name in self._files.keys() - used:
            raise PunaError(
                "no strategy can use this file",
                where=f"--head {name}={self._files[name]}",
                found=refusals[name],
                expected="a head of the stage acceptance_head or judge_head, or a plan of feed_forward_skip",
            )

    def fitting(self, strategy: str, key: str) -> Sequence[str]:
        """The names that the setting ``key`` of ``strategy`` may be given."""
        return self._fitting[strategy, key]

    def opened(self, strategy: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with files for their names; a name that does not fit is an error."""
        found = dict(settings)
        for (owner, key), fitting in self._fitting.items():
            name = settings.get(key)
            if owner != strategy or name is None:
                continue
            if not isinstance(name, str) or name not in fitting:
                kind = key if name not in self._files else f"{key} of {strategy}"
                raise unknown_name(kind, str(name), fitting, where="strategy")
            found[key] = self._files[name]
        return found
