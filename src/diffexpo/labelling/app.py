"""The rating page as a web application.

    GET  /r/TOKEN            the rater's page          POST /r/TOKEN/consent|vote|undo
    GET  /r/TOKEN/image/NAME an image of the book      GET  /static/NAME
    GET  /o/TOKEN            the owner's page          POST /o/TOKEN/state|more   GET /o/TOKEN/votes.csv

The secret in the address is the only key there is: no cookie, nothing that another site could make a browser
send along. Forms from another origin are refused all the same. Every page works without scripts; with them an
answer replaces the task in place.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qs, urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse

from diffexpo.errors import ConfigError, DiffexpoError, StoreError
from diffexpo.labelling import asking, pages
from diffexpo.labelling.book import Book, Rater
from diffexpo.labelling.export import anonymous_rows, as_csv
from diffexpo.labelling.limits import Limit
from diffexpo.labelling.links import rater_of

STATIC = Path(__file__).parent / "static"
SHIPPED = {"style.css": "text/css", "rating.js": "text/javascript", "htmx.min.js": "text/javascript"}
MAX_FORM = 4096
_log = logging.getLogger("diffexpo")
_IMAGE = re.compile(r"[0-9a-f]{32}")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Under "no-referrer" browsers send forms with the origin "null", as other sites' frames do.
    "Referrer-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NO_LINK = "This page opens by a personal link. The one that you used is wrong, has ended or was taken back."
Form = dict[str, str]


async def read_form(request: Request) -> Form:
    """The fields of a posted form that comes from this site."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "This form was sent by another site.")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "This form was sent by another site.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM:
            raise HTTPException(413, "This form is too large.")
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=8)
    except ValueError:
        raise HTTPException(400, "This form cannot be read.") from None
    return {name: values[-1] for name, values in fields.items()}


Posted = Depends(read_form)


def make_app(book: Book, owner_token: str, *, votes_per_second: float = 3.0, burst: int = 30) -> FastAPI:
    """The application of one book.

    Args:
        owner_token: Secret of the owner's page.
        votes_per_second: Answers that one rater may give in the long run; `burst` may come at once.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pace, wrong = Limit(votes_per_second, burst), Limit(1.0, 30)

    def rater(request: Request, token: str) -> Rater:
        """Whose link it is; a page that says no for all others."""
        found = rater_of(book, token)
        if found is None:
            _refuse(request, wrong)
        return found

    def owner(request: Request, token: str) -> None:
        if not secrets.compare_digest(token.encode(), owner_token.encode()):
            _refuse(request, wrong)

    _add_errors(app)
    _add_rater_pages(app, book, rater, pace)
    _add_owner_pages(app, book, owner)

    @app.get("/")
    def root() -> HTMLResponse:
        return HTMLResponse(pages.message("Rating images", "This page opens by a personal link."))

    @app.get("/static/{name}")
    def static(name: str) -> FileResponse:
        if name not in SHIPPED:
            raise HTTPException(404, "There is no such file.")
        headers = {"Cache-Control": "public, max-age=3600"}
        return FileResponse(STATIC / name, media_type=SHIPPED[name], headers=headers)

    return app


def _refuse(request: Request, wrong: Limit) -> NoReturn:
    """A wrong secret; after many from one address they are not even looked at."""
    address = request.client.host if request.client else "unknown"
    if not wrong.allows(address):
        raise HTTPException(429, "Too many wrong links came from your address; wait a minute.")
    raise HTTPException(404, NO_LINK)


def _add_rater_pages(app: FastAPI, book: Book, rater: Callable[[Request, str], Rater], pace: Limit) -> None:
    admitted = Depends(rater)

    @app.get("/r/{token}")
    def show(token: str, who: Rater = admitted) -> HTMLResponse:
        return HTMLResponse(rater_page(book, who, token, whole=True))

    @app.post("/r/{token}/consent")
    def consent(token: str, who: Rater = admitted, form: Form = Posted) -> Response:
        book.consent(who.rater)
        return RedirectResponse(f"/r/{token}", 303)

    @app.post("/r/{token}/vote")
    def vote(request: Request, token: str, who: Rater = admitted, form: Form = Posted) -> Response:
        if who.consented is None:
            raise HTTPException(403, "Agree to the conditions first.")
        if not pace.allows(str(who.rater)):
            raise HTTPException(429, "That was too fast: your last answer was not kept. Wait a moment.")
        given = read_answers(form)
        new = [asking.answer(book, who.rater, task, answer) for task, answer in given.items()]
        note = "" if all(new) else "That question had your answer already; the first one stands."
        return _turn(request, book, who, token, note)

    @app.post("/r/{token}/undo")
    def undo(request: Request, token: str, who: Rater = admitted, form: Form = Posted) -> Response:
        is_undone = asking.undo(book, who.rater)
        note = "Your last answer is taken back." if is_undone else "There is no answer to take back."
        return _turn(request, book, who, token, note)

    @app.get("/r/{token}/image/{name}")
    def image(token: str, name: str, who: Rater = admitted) -> FileResponse:
        if not _IMAGE.fullmatch(name) or not book.has_image(name) or not book.image_path(name).is_file():
            raise HTTPException(404, "There is no such image.")
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(book.image_path(name), media_type="image/png", headers=headers)


def read_answers(form: Form) -> dict[int, str]:
    """The answers of a form by task: of one question, or of all on a page."""
    several = {
        name.removeprefix("answer-"): answer for name, answer in form.items() if name.startswith("answer-")
    }
    # A button that answers all questions alike, such as "skip", comes before what was chosen for each.
    found = (
        several if "all" not in form else dict.fromkeys(form["all"].split("-")[1:], form["all"].split("-")[0])
    )
    if not found:
        found = {form.get("task", ""): form.get("answer", "")}
    if not all(re.fullmatch(r"\d{1,15}", task) for task in found):
        raise HTTPException(400, "This form cannot be read.")
    return {int(task): answer for task, answer in found.items()}


def _turn(request: Request, book: Book, who: Rater, token: str, note: str) -> Response:
    """The next task: in place where a script asks, else by way of the rater's address, so that going back or
    reloading sends nothing twice."""
    if request.headers.get("hx-request") != "true":
        return RedirectResponse(f"/r/{token}", 303)
    return HTMLResponse(rater_page(book, who, token, whole=False, note=note))


def rater_page(book: Book, who: Rater, token: str, *, whole: bool, note: str = "") -> str:
    """What a rater sees now: the conditions, a task, or thanks; the whole page or what changes in it."""
    name = str(book.fact("name"))
    if who.consented is None:
        return pages.consent(name, token, book.fact("rating")["consent"])
    at_once = bool(book.fact("rating").get("at_once"))
    tasks = asking.open_tasks(book, who.rater)
    while tasks and not _has_images(book, tasks[0]):
        _log.warning("an image of task %d is missing in %s; it was skipped", tasks[0].task, book.folder)
        asking.answer(book, who.rater, tasks[0].task, "skip")
        tasks = asking.open_tasks(book, who.rater)
    shown = asking.pages_of(tasks, at_once)
    far = asking.progress(book, who.rater)
    state = str(book.fact("state"))
    return pages.rating(name, token, shown, far, is_open=state == "open", whole=whole, note=note)


def _has_images(book: Book, task: asking.Task) -> bool:
    return all(book.image_path(name).is_file() for name in (task.left, task.right))


def _add_owner_pages(app: FastAPI, book: Book, owner: Callable[[Request, str], None]) -> None:
    allowed = [Depends(owner)]

    @app.get("/o/{token}", dependencies=allowed)
    def show(token: str) -> HTMLResponse:
        return HTMLResponse(pages.owner(book, token))

    @app.post("/o/{token}/state", dependencies=allowed)
    def state(token: str, form: Form = Posted) -> Response:
        wanted = form.get("state", "")
        if wanted not in ("open", "stopped"):
            raise ConfigError(f"state {wanted!r:.40}: expected open or stopped")
        book.set_facts({"state": wanted})
        return RedirectResponse(f"/o/{token}", 303)

    @app.post("/o/{token}/more", dependencies=allowed)
    def more(token: str, form: Form = Posted) -> Response:
        book.more_votes(1)
        return RedirectResponse(f"/o/{token}", 303)

    @app.get("/o/{token}/votes.csv", dependencies=allowed)
    def votes(token: str) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="votes.csv"'}
        return PlainTextResponse(as_csv(anonymous_rows(book)), media_type="text/csv", headers=headers)


def _add_errors(app: FastAPI) -> None:
    """Errors as pages in words, and the headers of every answer."""

    def told(request: Request, code: int, text: str) -> Response:
        if request.headers.get("hx-request") == "true":
            return PlainTextResponse(text, code)
        return HTMLResponse(pages.message("This did not work", text), code)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return told(request, error.status_code, str(error.detail))

    @app.exception_handler(404)
    async def unknown(request: Request, error: HTTPException) -> Response:
        detail = getattr(error, "detail", "")
        return told(request, 404, NO_LINK if detail in ("", "Not Found") else str(detail))

    @app.exception_handler(DiffexpoError)
    async def failed(request: Request, error: DiffexpoError) -> Response:
        if not isinstance(error, StoreError):
            return told(request, 400, str(error))
        _log.warning("%s", error)
        return told(
            request, 503, "Your answer was not kept: the server cannot write now. Try again in a minute."
        )

    @app.middleware("http")
    async def with_headers(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call(request)
        for name, value in _HEADERS.items():
            response.headers[name] = value
        response.headers.setdefault("Cache-Control", "no-store")
        return response
