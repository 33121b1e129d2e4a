"""Headers of safetensors files: read without tensors, and found out where they lie."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from arvision import CheckpointError
from arvision.headers import read_header


def written(entries, data):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_header_tells_shapes_types_and_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.shapes == {"a": (2, 3), "b": (5,)}
    assert header.dtypes == {"a": "F32", "b": "BF16"}
    assert (header.metadata, header.num_values) == ({"format": "pt"}, 11)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"version https://git-lfs", "no safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "no safetensors file"),
        (written([], b""), "header cannot be read"),
        (written({"a": {"dtype": "F32"}}, b""), "header cannot be read"),
        (
            written({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123"),
            "complete",
        ),
        (
            written({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678"),
            "'a'",
        ),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "b.safetensors")
