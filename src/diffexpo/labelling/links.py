"""Personal links: who answers is known by a secret in the address, of which the book keeps a hash only."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from diffexpo.errors import ConfigError, MissingError
from diffexpo.labelling.book import Book, Rater

_DAY_S = 86400.0


@dataclass(frozen=True)
class Link:
    """A rater's name and the secret of the link, which can be shown this once."""

    name: str
    token: str

    def address(self, site: str) -> str:
        """The whole address, below the site's (`http://127.0.0.1:8189`)."""
        return f"{site.rstrip('/')}/r/{self.token}"


def hash_of(token: str) -> str:
    """What is kept of a secret of 256 random bits; a plain hash is enough for one that cannot be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_links(book: Book, names: list[str], days: float | None = None) -> list[Link]:
    """New raters with a link each.

    Args:
        names: Who they are, for the owner alone; new to the book.
        days: Links end after this long; None: never.
    Raises:
        ConfigError: a name is empty, given twice, or has a link already.
    """
    known = {rater.name for rater in book.raters()}
    for position, name in enumerate(names):
        if not name.strip() or name in known or name in names[:position]:
            reason = "has a link already" if name in known else "is empty or given twice"
            raise ConfigError(
                f"rater {name!r} {reason}; expected new names (a lost link: revoke it and make another)"
            )
    links = [Link(name, secrets.token_urlsafe(32)) for name in names]
    now = time.time()
    with book.change() as connection:
        for link in links:
            connection.execute(
                "INSERT INTO raters (name, token_hash, created, expires) VALUES (?, ?, ?, ?)",
                (link.name, hash_of(link.token), now, None if days is None else now + days * _DAY_S),
            )
    return links


def free_names(book: Book, count: int) -> list[str]:
    """Names for raters whom nobody has named: rater-1 and so on."""
    known = {rater.name for rater in book.raters()}
    names: list[str] = []
    number = 1
    while len(names) < count:
        if f"rater-{number}" not in known:
            names.append(f"rater-{number}")
        number += 1
    return names


def revoke(book: Book, name: str) -> None:
    """End a link; answers that were given stay."""
    if name not in {rater.name for rater in book.raters()}:
        known = ", ".join(rater.name for rater in book.raters()) or "nobody"
        raise MissingError(f"no rater {name!r}; there are: {known}")
    with book.change() as connection:
        connection.execute("UPDATE raters SET revoked = ? WHERE name = ?", (time.time(), name))


def rater_of(book: Book, token: str) -> Rater | None:
    """Whose link it is; None for one that is wrong, of another study, ended or revoked."""
    columns = ", ".join(Rater.__slots__)
    found = book.rows(f"SELECT {columns} FROM raters WHERE token_hash = ?", hash_of(token))
    rater = Rater(*found[0]) if found else None
    if rater is None or rater.revoked is not None:
        return None
    return None if rater.expires is not None and rater.expires < time.time() else rater
