"""Tensors on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.errors import LedgerDamaged, LedgerUnavailable
from liveweight.ledger import BlobStore

TENSORS = {"left": torch.arange(6.0).reshape(2, 3), "which": torch.tensor([3, 1]), "half": torch.ones(2).bfloat16()}


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_what_is_written_is_read_bit_for_bit(blobs: BlobStore) -> None:
    read = blobs.read(blobs.write(TENSORS))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_blob_is_named_by_its_content_and_kept_once(blobs: BlobStore) -> None:
    name = blobs.write(TENSORS)
    assert blobs.write(dict(reversed(TENSORS.items()))) == name
    assert blobs.write({"left": torch.zeros(1)}) != name
    assert blobs.path(name).parent.name == name[:2]
    assert len(list(blobs.names())) == 2


def test_tensors_that_share_memory_or_are_transposed_can_be_written(blobs: BlobStore) -> None:
    square = torch.arange(9.0).reshape(3, 3)
    read = blobs.read(blobs.write({"one": square, "row": square[1], "across": square.T}))
    assert torch.equal(read["across"], square.T)
    assert torch.equal(read["row"], square[1])


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_flipped_bit_is_found_and_the_blob_is_named(blobs: BlobStore, position: int) -> None:
    name = blobs.write(TENSORS)
    content = bytearray(blobs.path(name).read_bytes())
    content[position] ^= 1
    blobs.path(name).write_bytes(content)
    with pytest.raises(LedgerDamaged, match=name) as caught:
        blobs.read(name)
    assert str(blobs.path(name)) in caught.value.hint


def test_a_missing_blob_is_named(blobs: BlobStore) -> None:
    with pytest.raises(LedgerDamaged, match="f" * 64):
        blobs.read("f" * 64)


def test_writing_again_mends_a_damaged_blob(blobs: BlobStore) -> None:
    name = blobs.write(TENSORS)
    blobs.path(name).write_bytes(b"half")
    assert blobs.write(TENSORS) == name
    assert torch.equal(blobs.read(name)["left"], TENSORS["left"])


def test_pruning_removes_what_nobody_needs_and_what_was_left_half_written(blobs: BlobStore) -> None:
    kept, lost = blobs.write(TENSORS), blobs.write({"x": torch.zeros(3)})
    half = blobs.path(kept).with_name("half.1.part")
    half.write_bytes(b"half")
    assert blobs.prune({kept}) == [lost]
    assert list(blobs.names()) == [kept]
    assert not half.exists()


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("in the way")
    with pytest.raises(LedgerUnavailable, match="blobs"):
        BlobStore(tmp_path / "blobs").write(TENSORS)
