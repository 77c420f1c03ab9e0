"""The rating page on a port of this machine."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from diffexpo.errors import ConfigError, MissingError
from diffexpo.labelling.app import make_app
from diffexpo.labelling.book import Book

_LOOK_S = 1.0


@dataclass(frozen=True)
class Site:
    """Where the page is served; `certificate` and `key` are PEM files for TLS."""

    host: str = "127.0.0.1"
    port: int = 8189
    certificate: Path | None = None
    key: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def warnings(self) -> list[str]:
        """What the owner should know, in words."""
        if self.is_local or self.certificate is not None:
            return []
        text = (
            f"the page is served on {self.host} without TLS: whoever can listen in on the network reads "
            "the links, images and answers, and can answer in a rater's name. Give --tls-cert and "
            "--tls-key, or keep the default host and let a web server with TLS, or an SSH tunnel, pass "
            "requests on"
        )
        return [text]


def bind(site: Site) -> socket.socket:
    """A listening socket; ConfigError where the address cannot be had."""
    if (site.certificate is None) != (site.key is None):
        raise ConfigError("--tls-cert and --tls-key go together; expected both or none")
    for path in (site.certificate, site.key):
        if path is not None and not path.is_file():
            raise MissingError(f"{path} does not exist; expected a PEM file for TLS")
    listening: socket.socket | None = None
    try:
        family = socket.getaddrinfo(site.host, site.port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((site.host, site.port))
        listening.listen(128)  # whoever opens a link before the server has started waits, and is not refused
    except OSError as error:
        if listening is not None:
            listening.close()
        advice = "choose another port (0 takes a free one), or stop what uses it"
        where = f"--host {site.host} --port {site.port}"
        raise ConfigError(f"{where}: {error.strerror or error}; {advice}") from None
    return listening


def address_of(site: Site, listening: socket.socket) -> str:
    """The site's address, as links begin."""
    scheme = "http" if site.certificate is None else "https"
    host = f"[{site.host}]" if ":" in site.host else site.host
    return f"{scheme}://{host}:{listening.getsockname()[1]}"


def serve(
    book: Book,
    site: Site,
    listening: socket.socket,
    owner_token: str,
    is_done: Callable[[], bool] | None = None,
) -> None:
    """Serve until interrupted (a KeyboardInterrupt), or until `is_done`, which is asked every second."""
    config = uvicorn.Config(
        make_app(book, owner_token),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        ssl_certfile=None if site.certificate is None else str(site.certificate),
        ssl_keyfile=None if site.key is None else str(site.key),
    )
    server = uvicorn.Server(config)
    with _watching(server, is_done):
        server.run(sockets=[listening])


@contextmanager
def _watching(server: uvicorn.Server, is_done: Callable[[], bool] | None) -> Iterator[None]:
    """Inside the block the server is told to stop once it is done."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_S):
            if is_done is not None and is_done():
                server.should_exit = True
                return

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
