"""A bank gives each text the bits that its encoder gave, which is asked once, whichever process asks it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diffexpo.data import prompt_bank
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.prompt_bank import PromptBank
from diffexpo.data.sharing import Alone
from diffexpo.rng import torch_generator
from diffexpo.types import Conditioning

from .conftest import LetterPolicy

TEXTS = [f"a picture of thing number {k}" for k in range(20)]


def encode(text: str) -> Conditioning:
    """Two tensors of different types; long texts have another shape."""
    generator = torch_generator("bank", text)
    length = 3 if len(text) < 40 else 5
    states = torch.randn(1, length, 4, generator=generator).to(torch.bfloat16)
    return Conditioning({"states": states, "mask": torch.tensor([[len(text), 1]])})


class Counting:
    """An encoder that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str) -> Conditioning:
        self.asked.append(text)
        return encode(text)


def assert_same(found: Conditioning | None, text: str) -> None:
    assert found is not None
    for name, tensor in encode(text).tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def test_every_text_is_encoded_once_and_comes_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_bank, "_FILE_BYTES", 100)
    bank, encoder = PromptBank(tmp_path, "me", Alone()), Counting()
    long = "a text of another length, which the encoder gives more rows"
    bank.add([*TEXTS[:12], long], encoder)
    bank.add([*TEXTS, long], encoder)
    assert encoder.asked == [*TEXTS[:12], long, *TEXTS[12:]] and len(bank) == 21
    again = PromptBank(tmp_path, "me", Alone())
    again.add([*TEXTS, long], encoder)
    assert len(encoder.asked) == 21 and len(list(tmp_path.iterdir())) > 2
    for text in [*TEXTS, long]:
        assert_same(again.read(text), text)
    assert again.read("never seen") is None and "never seen" not in again


class Together:
    """A process among others in one program."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier) -> None:
        self.rank, self.size, self._barrier = rank, size, barrier

    def barrier(self) -> None:
        self._barrier.wait(timeout=60)

    def gather_objects(self, items: list[Any]) -> list[Any]:
        raise NotImplementedError


def test_processes_share_the_encoding_and_see_the_same(tmp_path: Path) -> None:
    barrier, encoders, found = threading.Barrier(3), [Counting() for _ in range(3)], {}

    def work(rank: int) -> None:
        bank = PromptBank(tmp_path, "me", Together(rank, 3, barrier))
        for texts in (TEXTS[:11], TEXTS):
            bank.add(texts, encoders[rank])
        found[rank] = [bank.read(text) for text in TEXTS]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    asked = [text for encoder in encoders for text in encoder.asked]
    assert sorted(asked) == sorted(TEXTS) and [len(encoder.asked) for encoder in encoders] == [7, 7, 6]
    for rows in found.values():
        for row, text in zip(rows, TEXTS, strict=True):
            assert_same(row, text)


def test_what_is_damaged_or_of_another_encoder_is_made_again(tmp_path: Path) -> None:
    PromptBank(tmp_path, "me", Alone()).add(TEXTS[:3], encode)
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    assert len(PromptBank(tmp_path, "me", Alone())) == 3
    damaged = bytearray(whole)
    damaged[-1] ^= 1  # in the last row of the last tensor
    file.write_bytes(damaged)
    bank = PromptBank(tmp_path, "me", Alone())
    assert [bank.read(text) is None for text in TEXTS[:3]].count(True) == 1
    for cut in (0, 5, 40, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert len(PromptBank(tmp_path, "me", Alone())) == 0 and not file.exists()
    file.write_bytes(whole)
    assert len(PromptBank(tmp_path, "another", Alone())) == 0 and not file.exists()


class Texts(LetterPolicy):
    """Counts how often its text encoders leave the device."""

    released = 0

    def release_text_encoders(self) -> None:
        self.released += 1

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return super().encode_prompts(prompts)


def test_with_a_bank_nothing_is_encoded_later_however_little_memory_there_is(tmp_path: Path) -> None:
    policy = Texts()
    bank = PromptBank(tmp_path, policy.fingerprint, Alone())
    embeddings = PromptEmbeddings(policy, [""], max_bytes=64, bank=bank)
    embeddings.add(["", *TEXTS])
    assert policy.encoded_texts == ["", *TEXTS] and policy.released == 2
    for start in range(0, 20, 4):
        rows = embeddings.select(TEXTS[start : start + 4]).tensors["letters"]
        plain = LetterPolicy().encode_prompts(TEXTS[start : start + 4]).tensors["letters"]
        assert torch.equal(rows, plain)
    assert policy.encoded_texts == ["", *TEXTS] and len(embeddings) <= 2
