import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from shared.engine.weight_reading import Reading, TensorCopy, read_header, read_tensors, samples
from shared.errors import StartupError

CPU = torch.device("cpu")
TENSORS = {
    "a": torch.arange(1000, dtype=torch.float32).view(10, 100),
    "b": torch.arange(7, dtype=torch.bfloat16),
    "c": torch.linspace(-2, 2, 501).to(torch.float16),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def silent(_read, _all):
    pass


def write(path, entries, data):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("piece_bytes", [4, 64, 4000, 2**20])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_places_get_the_numbers_of_the_file_however_it_is_cut(path, num_threads, piece_bytes, dtype):
    stored = read_header(path).tensors
    copies = [TensorCopy(each, torch.full(each.shape, 77.0, dtype=dtype or each.dtype)) for each in stored]
    read_tensors(copies, CPU, Reading(num_threads, piece_bytes), silent)
    assert {copy.source.name for copy in copies} == TENSORS.keys()
    for copy in copies:
        assert torch.equal(copy.place, TENSORS[copy.source.name].to(copy.place.dtype))


def test_a_place_may_be_a_part_of_a_larger_tensor(path):
    (stored,) = (each for each in read_header(path).tensors if each.name == "a")
    whole = torch.zeros(30, 100)
    read_tensors([TensorCopy(stored, whole[10:20])], CPU, Reading(2, 128), silent)
    assert torch.equal(whole[10:20], TENSORS["a"])
    assert not whole[:10].any()
    assert not whole[20:].any()


def test_the_reader_tells_how_far_it_is(path):
    stored = read_header(path).tensors
    told = []
    copies = [TensorCopy(each, torch.empty(each.shape)) for each in stored]
    read_tensors(copies, CPU, Reading(2, 1000), lambda read, all_: told.append((read, all_)))
    num_bytes = sum(tensor.nbytes for tensor in TENSORS.values())
    assert [all_ for _, all_ in told] == [num_bytes] * len(told)
    assert [read for read, _ in told] == sorted(read for read, _ in told)
    assert told[-1][0] == num_bytes
    assert len(told) == 4 + 1 + 2


def test_a_sample_is_the_middle_of_a_tensor_and_all_of_a_small_one(path):
    a, b, _ = samples(read_header(path), 40)
    assert a == TENSORS["a"].view(-1)[495:505].numpy().tobytes()
    assert b == TENSORS["b"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "entries",
    [
        b"{",
        b"[" * 100_000,
        [],
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        {"a": {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
        {"a": 3},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, entries):
    write(tmp_path / "t", entries, bytes(8))
    with pytest.raises(StartupError, match="no safetensors file"):
        read_header(tmp_path / "t")


@pytest.mark.parametrize("num_bytes", [7, 9])
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path, num_bytes):
    write(tmp_path / "t", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(num_bytes))
    with pytest.raises(StartupError, match="cannot be read"):
        read_header(tmp_path / "t")


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(path, num_threads):
    stored = read_header(path).tensors
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StartupError, match="it ends at byte"):
        read_tensors(
            [TensorCopy(each, torch.empty(each.shape)) for each in stored], CPU, Reading(num_threads, 256), silent
        )
