"""Published prompt lists, as tiny look-alikes of the files their authors give out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diffexpo.assembly.aliases import named_prompts, resolve
from diffexpo.data.prompt_lists import (
    PROMPT_LISTS,
    choose_categories,
    read_prompt_list,
    split_prompts,
    write_prompts,
)
from diffexpo.data.prompts import load_prompts
from diffexpo.errors import ConfigError, ImportFormatError, MissingError
from diffexpo.types import Prompt

from .conftest import vote

FILES = {
    "text": ("list.txt", "a cat\na dog\n"),
    "jsonl": ("list.jsonl", '{"prompt": "a cat"}\n{"caption": "a dog"}\n'),
    "hpdv2": ("paintings.json", '["a cat", "a dog"]'),
    "pickapic": ("prompts.json", '[{"caption": "a cat"}, "a dog"]'),
    "partiprompts": ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na dog\tAnimals\tStyle\tsee\n"),
    "drawbench": ("drawbench.csv", 'Prompts,Category\na cat,Colors\n"a dog",DALL-E\na cat,Colors\n'),
    "t2i_compbench": ("color_val.txt", "a cat\na dog\n"),
    "geneval": ("geneval.jsonl", '{"tag": "two", "include": [{"class": "cat", "count": 2}], "prompt": "a cat"}\n{"tag": "one", "include": [], "prompt": "a dog"}\n'),
    "imagereward": ("benchmark.json", '[{"id": "1-2", "prompt": "a cat"}, {"id": "3-4", "prompt": "a dog"}]'),
    "ddpo_animals": ("simple_animals.txt", "cat\ndog\n"),
}  # fmt: skip


def put(tmp_path: Path, form: str) -> Path:
    name, text = FILES[form]
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize("form", FILES)
def test_every_list_is_read(tmp_path: Path, form: str) -> None:
    prompts, report = read_prompt_list(put(tmp_path, form), form)
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog"]
    assert report.kept == 2 and report.duplicates == (form == "drawbench")


def test_only_parquet_is_missing_above() -> None:
    assert set(PROMPT_LISTS) - set(FILES) == {"parquet"}


def test_categories_and_attributes_come_along(tmp_path: Path) -> None:
    def first(form: str) -> Prompt:
        return read_prompt_list(put(tmp_path, form), form)[0][0]

    assert (first("partiprompts").category, first("partiprompts").attributes) == (
        "Animals",
        {"challenge": "Basic"},
    )
    assert first("drawbench").category == "Colors" and first("hpdv2").category == "paintings"
    assert (first("t2i_compbench").category, first("t2i_compbench").attributes) == ("color", {"split": "val"})
    assert first("geneval").category == "two"
    assert json.loads(first("geneval").attributes["include"]) == [{"class": "cat", "count": 2}]
    assert first("imagereward").id == "1-2"


def test_quotation_marks_belong_to_parti_prompts(tmp_path: Path) -> None:
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text('Prompt\tCategory\tChallenge\tNote\n"a sign" that says "x\tArts\tBasic\t"\n')
    assert read_prompt_list(path, "partiprompts")[0][0].text == '"a sign" that says "x'


def test_a_folder_is_a_benchmark_of_many_files(tmp_path: Path) -> None:
    for name in ("3d_spatial_val", "color_train", "complex_val"):
        (tmp_path / f"{name}.txt").write_text(f"prompt of {name}\n")
    prompts, _ = read_prompt_list(tmp_path, "t2i_compbench")
    assert [(p.category, p.attributes["split"]) for p in prompts] == [
        ("3d_spatial", "val"),
        ("color", "train"),
        ("complex", "val"),
    ]
    with pytest.raises(MissingError, match=r"holds no \*.json"):
        read_prompt_list(tmp_path, "hpdv2")


def test_ddpo_animals_do_something(tmp_path: Path) -> None:
    (tmp_path / "simple_animals.txt").write_text("ant\ncat\n")
    (tmp_path / "activities.txt").write_text("riding a bike\nplaying chess\n")
    texts = [prompt.text for prompt in read_prompt_list(tmp_path, "ddpo_animals")[0]]
    assert texts == [
        "an ant riding a bike",
        "an ant playing chess",
        "a cat riding a bike",
        "a cat playing chess",
    ]
    classes = tmp_path / "imagenet_classes.txt"
    classes.write_text("".join(f"class {n}, Latin {n}\n" for n in range(1000)))
    assert len(read_prompt_list(classes, "ddpo_animals")[0]) == 398


@pytest.mark.parametrize(
    ("name", "form", "content", "message"),
    [
        ("p.tsv", "partiprompts", b"Prompt\tCategory\n", "column 'Challenge' is missing"),
        ("p.tsv", "partiprompts", b"Prompt\tCategory\tChallenge\tNote\n\tA\tB\tC\n", "line 2: the prompt is ''"),
        ("p.tsv", "partiprompts", b"Prompt\tCategory\tChallenge\tNote\na\tb\n", "line 2 has 2 cells; expected 4"),
        ("p.csv", "drawbench", b"Prompts,Category\ncaf\xe9,x\n", "line 2 is not UTF-8"),
        ("p.csv", "drawbench", b'Prompts,Category\n"a"b,x\n', "line 2 is no table row"),
        ("p.json", "hpdv2", b'{"a": 1}', "is a JSON dict; expected a list"),
        ("p.json", "hpdv2", b'["a", 3]', "element 1: the prompt is '3'"),
        ("p.json", "hpdv2", b'["a", "\\ud800"]', "half a surrogate pair"),
        ("p.json", "hpdv2", b"[" * 100_000, "is not JSON"),
        ("p.json", "imagereward", b'[{"id": 3.5, "prompt": "a"}]', "'id' is 3.5"),
        ("p.jsonl", "geneval", b'{"prompt": "a"}\n', "expected an object with tag"),
        ("p.jsonl", "jsonl", b'{"prompt": "\\ud800"}\n', "half a surrogate pair"),
        ("p.jsonl", "jsonl", b"[" * 100_000 + b"\n", "is not JSON"),
    ],
)  # fmt: skip
def test_bad_lists_are_refused_by_place(
    tmp_path: Path, name: str, form: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImportFormatError, match=message):
        read_prompt_list(tmp_path / name, form)


def test_the_format_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its ending does not tell the format"):
        read_prompt_list(tmp_path / "list.tsv")
    with pytest.raises(ConfigError, match="'parti' is unknown; expected one of text"):
        read_prompt_list(tmp_path / "list.tsv", "parti")
    with pytest.raises(MissingError, match="there is no file"):
        read_prompt_list(tmp_path / "list.tsv", "partiprompts")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_written_reads_back(tmp_path: Path, suffix: str) -> None:
    prompts = [Prompt("x", "a cat", "animals", {"style": "ink"}), Prompt("y", 'caf\u00e9\u2028"x"', "", {})]
    write_prompts(prompts, tmp_path / f"out{suffix}")
    assert load_prompts(tmp_path / f"out{suffix}") == prompts
    write_prompts(prompts, tmp_path / "out.txt")
    assert [p.text for p in load_prompts(tmp_path / "out.txt")] == [p.text for p in prompts]
    with pytest.raises(ConfigError, match=r"ends in '.csv'"):
        write_prompts(prompts, tmp_path / "out.csv")


def test_a_prompt_stays_in_its_part_when_others_come() -> None:
    prompts = [Prompt(str(n), f"prompt {n}") for n in range(2000)]
    few = split_prompts(prompts[:500], {"train": 0.7, "test": 0.2}, seed=3)
    many = split_prompts(prompts[::-1], {"train": 0.7, "test": 0.2}, seed=3)
    texts = {name: {prompt.text for prompt in part} for name, part in many.items()}
    early = {prompt.text for prompt in prompts[:500]}
    assert {name: {prompt.text for prompt in part} for name, part in few.items()} == {
        name: part & early for name, part in texts.items()
    }
    assert not texts["train"] & texts["test"]
    # four standard deviations of a binomial of 2,000
    assert abs(len(many["train"]) - 1400) < 82 and abs(len(many["test"]) - 400) < 72
    assert split_prompts(prompts, {"a": 1.0}, seed=1)["a"] == prompts
    for shares in ({"a": 0.7, "b": 0.4}, {"a": 0.0}, {}):
        with pytest.raises(ConfigError, match="sum to at most 1"):
            split_prompts(prompts, shares)


def test_categories_are_chosen_by_name() -> None:
    prompts = [Prompt("1", "a", "x"), Prompt("2", "b", "y"), Prompt("3", "c", "x")]
    assert choose_categories(prompts, ["x"]) == [prompts[0], prompts[2]]
    with pytest.raises(ConfigError, match="no prompt has the category 'z'; there are 'x', 'y'"):
        choose_categories(prompts, ["z"])


def test_the_shipped_list_is_sixty_varied_prompts() -> None:
    prompts = named_prompts("prompts:first_tries", "prompts.source")
    assert len(prompts) == 60 and len({prompt.id for prompt in prompts}) == 60
    assert len({prompt.category for prompt in prompts}) >= 10
    assert max(len(prompt.text.split()) for prompt in prompts) < 45  # well below the 77 tokens of CLIP
    assert Path(resolve("prompts:first_tries")).stat().st_size < 10_000
    with pytest.raises(
        MissingError, match="no prompt list 'prompts:none'; there are first_tries, occupations"
    ):
        resolve("prompts:none")
    with pytest.raises(MissingError, match="there is no 'emoji:none'"):
        resolve("emoji:none")


def test_pickapic_shards_give_their_captions_and_nothing_else(write_votes: Callable[..., Path]) -> None:
    file = write_votes([vote(number, caption=f"caption {number // 2}") for number in range(6)])
    for source in (file, file.parent):
        prompts, report = read_prompt_list(source, "pickapic")
        assert [prompt.text for prompt in prompts] == ["caption 0", "caption 1", "caption 2"]
        assert report.read == 6 and all(prompt.attributes == {} for prompt in prompts)


@pytest.mark.parametrize(
    "form", ["partiprompts", "drawbench", "geneval", "imagereward", "text", "jsonl", "parquet"]
)
def test_a_folder_where_a_file_is_meant_is_refused(tmp_path: Path, form: str) -> None:
    with pytest.raises(MissingError, match=f"is a folder; the format {form} is one file"):
        read_prompt_list(tmp_path, form)


def test_activities_alone_are_no_animals(tmp_path: Path) -> None:
    (tmp_path / "activities.txt").write_text("riding a bike\n")
    with pytest.raises(ImportFormatError, match="which is no prompt; name its folder"):
        read_prompt_list(tmp_path / "activities.txt", "ddpo_animals")
