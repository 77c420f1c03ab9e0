"""Prompt files: `.txt` (one a line), `.jsonl` (one object a line) or `.parquet`. A bad line is an error.

In text files (negative prompts too) blank lines and lines that begin with "#" are skipped and counted; a
prompt that begins with "#" stands in JSON lines. JSON lines and Parquet have a `prompt` (or `caption`) and
may have `id`, `category` and `negative_prompt`, which takes the place of those of `explore.negatives`; every
other text field becomes an attribute of the prompt. `prompts:NAME` is a list that the package ships.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.bounded.texts import parse_json
from diffexpo.data.offline.cells import is_empty, text_of_id
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.types import Prompt

SHIPPED = ("first_tries", "occupations")
_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "prompts"
_CHUNK = 256
_EXAMPLE = '{"prompt": "a cat", "id": "cat", "category": "animals"}'
Located = Iterator[tuple[str, Prompt]]
"""(where, prompt) couples; `where` names file and line in messages."""


@dataclass(frozen=True)
class PromptReport:
    """What a prompt file held and what was dropped; `skipped` counts blank lines and comments."""

    read: int
    kept: int
    duplicates: int
    skipped: int = 0


def load_prompts(source_path: str | Path, key: str = "prompts.source") -> list[Prompt]:
    """The distinct prompts of a file, in its order. `read_prompts` also counts."""
    return read_prompts(source_path, key)[0]


def read_prompts(source_path: str | Path, key: str = "prompts.source") -> tuple[list[Prompt], PromptReport]:
    """The distinct prompts of a `.txt`, `.jsonl` or `.parquet` file, and a count of what was dropped; what
    cannot be read is an ImportFormatError with its place.

    A prompt without `id` gets one made from its text. `key` is the setting that names the file, for messages.
    """
    path = Path(source_path)
    require_file(path, key)
    if path.suffix.lower() not in READERS:
        raise ImportFormatError(f"{key}: {path} ends in {path.suffix!r}; expected {', '.join(READERS)}")
    found, report = distinct_prompts(READERS[path.suffix.lower()](path), f"{key}: {path}")
    return found, replace(report, skipped=skipped_lines(path))


def require_file(path: Path, key: str) -> None:
    """Raise a MissingError, which names the nearest file in its folder, for a file that is not there."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near and not path.is_dir() else ""
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        expected = f"expected one of {', '.join(READERS)}"
        raise MissingError(f"{key}: there is no file {path}{where}; {expected}.{hint}")


def distinct_prompts(located: Located, what: str) -> tuple[list[Prompt], PromptReport]:
    """The prompts without repetitions of a text, and a count of what was dropped; `what` is their source, for
    messages. An id of two prompts, or no prompt at all, is an ImportFormatError."""
    kept: dict[str, Prompt] = {}
    texts_by_id: dict[str, str] = {}
    count = 0
    for where, prompt in located:
        count += 1
        if prompt.text in kept:
            continue
        if texts_by_id.setdefault(prompt.id, prompt.text) != prompt.text:
            raise ImportFormatError(
                f"{where}: id {prompt.id!r} belongs to another prompt already ({texts_by_id[prompt.id]!r}); "
                "ids name random numbers and must be unique"
            )
        kept[prompt.text] = prompt
    if not kept:
        raise ImportFormatError(f"{what} holds no prompt; expected at least one")
    return list(kept.values()), PromptReport(read=count, kept=len(kept), duplicates=count - len(kept))


def shipped_prompts(name: str) -> Path:
    """Where a prompt list of the package is; `shipped_prompts("first_tries").name == "first_tries.jsonl"`."""
    if name not in SHIPPED:
        raise MissingError(f"there is no prompt list 'prompts:{name}'; there are {', '.join(SHIPPED)}")
    return _ASSETS / f"{name}.jsonl"


def filter_long(
    prompts: Sequence[Prompt], count_tokens: Callable[[Sequence[str]], Sequence[int]], max_tokens: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (kept, dropped), both in order: dropped ones have more than `max_tokens` tokens, as the
    policy counts them, and would be cut silently by the encoder."""
    kept: list[Prompt] = []
    dropped: list[Prompt] = []
    for start in range(0, len(prompts), _CHUNK):
        part = prompts[start : start + _CHUNK]
        for prompt, count in zip(part, count_tokens([p.text for p in part]), strict=True):
            (kept if count <= max_tokens else dropped).append(prompt)
    return kept, dropped


def prompt_id(text: str) -> str:
    """Id of a prompt that has none: a hash of its text; `prompt_id("a cat") == "p-8178a3117428"`."""
    return f"p-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def read_txt(path: Path) -> Located:
    """(where, prompt) of every line."""
    return ((where, Prompt(prompt_id(line), line)) for where, line in prompt_lines(path))


def read_jsonl(path: Path) -> Located:
    """(where, prompt) of every JSON line."""
    records = json_records(path, f"such as {_EXAMPLE}")
    return ((where, _from_record(where, record)) for where, record in records)


def json_records(path: Path, expected: str) -> Iterator[tuple[str, dict[str, object]]]:
    """(where, object) of every JSON line; `expected` says for messages what the objects should be."""
    for where, line in prompt_lines(path):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ImportFormatError(
                f"{where} is not JSON ({error}); expected an object {expected}"
            ) from error
        if not isinstance(record, dict):
            raise ImportFormatError(f"{where} is {line[:60]!r}; expected an object {expected}")
        yield where, record


def read_parquet(path: Path, only: Sequence[str] = ()) -> Located:
    """(where, prompt) of every row; of all text columns or some."""
    try:
        with pq.ParquetFile(path) as file:
            texts = [field.name for field in file.schema_arrow if _is_read(field)]
            batches = file.iter_batches(columns=list(only) or texts)
            for number, record in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield (where := f"{path}, row {number}"), _from_record(where, record)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ImportFormatError(f"{path} is not readable Parquet ({error}); get it again") from error


def _is_read(field: pa.Field) -> bool:
    """Whether a column is text, of pandas categories too, or an id or category, which may be numbers."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or (field.name in ("id", "category") and is_number)


def make_prompt(text: str, category: str, id: str | None, attributes: Mapping[str, str]) -> Prompt:
    """The prompt; one without an id gets that of its text."""
    return Prompt(id or prompt_id(text.strip()), text.strip(), category, attributes)


def _from_record(where: str, record: Mapping[str, object]) -> Prompt:
    name = "prompt" if "prompt" in record else "caption"
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        missing = f"there is no 'prompt', only {', '.join(map(repr, record)) or 'nothing'}"
        has = f"{name!r} is {text!r}" if name in record else missing
        raise ImportFormatError(f"{where}: {has}; expected text, as in {_EXAMPLE}")
    named = {key: text_of_id(record.get(key)) for key in ("id", "category")}
    for key, value in named.items():
        if value is None and not is_empty(record.get(key)):
            raise ImportFormatError(f"{where}: {key!r} is {record[key]!r}; expected text or a whole number")
    texts = {key: value for key, value in record.items() if key != name and isinstance(value, str)}
    texts |= {key: value for key, value in named.items() if value is not None}
    return make_prompt(text, texts.pop("category", ""), texts.pop("id", None), texts)


def prompt_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of every line that is neither blank nor a comment; only LF and CRLF end lines, because
    prompts may hold other separators."""
    return ((where, text) for where, text in _all_lines(path) if not _is_skipped(text))


def skipped_lines(path: Path) -> int:
    """How many blank lines and comments a text file has; 0 for Parquet."""
    if path.suffix.lower() == ".parquet":
        return 0
    return sum(_is_skipped(text) for _, text in _all_lines(path))


def _is_skipped(line: str) -> bool:
    return not line or line.startswith("#")


def _all_lines(path: Path) -> Iterator[tuple[str, str]]:
    data = path.read_bytes()
    if b"\0" in data:
        raise ImportFormatError(
            f"{path} is not a text file (it holds zero bytes); expected one prompt a line in UTF-8"
        )
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ImportFormatError(
                f"{where} is not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}); save the "
                "file as UTF-8"
            ) from error
        yield where, text


READERS: dict[str, Callable[[Path], Located]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""Readers of prompt files by ending."""
