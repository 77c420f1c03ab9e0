"""A loss of one's own: settings and facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from diffexpo.config.methods.bases import PairsConfig, ReferencedConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.own_code import digest_of, split_function
from diffexpo.errors import DiffexpoError


class _FunctionsName:
    """The title of a run's card is the name of its function; the class has a general one."""

    def __get__(self, card: PythonConfig | None, owner: type) -> str:
        name = "" if card is None else card.path.rpartition(":")[2]
        return f"{name} (own loss)" if name else "own loss"


class PythonConfig(PairsConfig, ReferencedConfig):
    """A loss of one's own on the errors of pairs, from a Python file."""

    type: Literal["python"] = "python"
    """The training method."""
    path: str = ""
    """`file.py:function`: called as function(winner, loser, winner_ref, loser_ref), the mean squared
    prediction errors (B,) of policy and reference on winners and losers; returns the loss (B,) of each
    pair."""
    learns_from: Literal["pairs"] = "pairs"
    """What the function is given: the errors of pairs."""
    sha256: str | None = None
    """Hash of the file and of those beside it that it imports, filled in when a run starts. A run goes on
    with the loss that it began with."""

    title: ClassVar[str] = _FunctionsName()  # type: ignore[assignment]  # a name that depends on the path
    restraint = "scale the loss down, or lower training.learning_rate"

    @model_validator(mode="before")
    @classmethod
    def _fill_hash(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("sha256") or not isinstance(values.get("path"), str):
            return values
        try:
            file, _ = split_function(values["path"], "algorithm.path")
            return {**values, "path": f"{file.resolve()}:{values['path'].rpartition(':')[2]}"} | {
                "sha256": digest_of(file)
            }
        except DiffexpoError:  # said where the run is checked
            return values

    @property
    def named_files(self) -> tuple[str, ...]:
        return (self.path.rpartition(":")[0],)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        file, colon, name = self.path.rpartition(":")
        if not colon or not file.endswith(".py") or not name.isidentifier():
            yield f"algorithm.path = {self.path!r} with algorithm.type = python: expected file.py:function"
        elif not self.sha256 and not Path(file).expanduser().is_file():
            yield f"algorithm.path = {self.path!r}: there is no file {file}; expected file.py:function"
