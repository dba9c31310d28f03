"""GGUF metadata and tensors, ours against the `gguf` library's own reader."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from unit.tiny_models import write_gguf

from sglang.srt.errors import ConfigError
from sglang.srt.utils.gguf_file import GGUFFile, open_gguf


def test_metadata_equals_the_librarys_reading(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", fields={"x.flag": True, "x.numbers": [1.5, 2.5], "x.names": ["é", ""]})
    ours, theirs = GGUFFile(str(path)), gguf.GGUFReader(path)
    assert len(theirs.fields) > 15
    for key, field in theirs.fields.items():
        assert ours.field(key) == field.contents()
    assert ours.architecture == "llama"
    assert ours.field("x.flag") is True
    assert ours.field("x.numbers") == [1.5, 2.5]
    assert ours.field("x.names") == ["é", ""]


def test_arrays_are_read_right_without_the_fast_reader(tmp_path, monkeypatch):
    path = str(write_gguf(tmp_path / "m.gguf"))
    fast = GGUFFile(path)
    monkeypatch.setattr("sglang.srt.utils.gguf_file._FastReader", gguf.GGUFReader)
    slow = GGUFFile(path)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        assert fast.field(key) == slow.field(key)


def test_missing_keys(tmp_path):
    file = GGUFFile(str(write_gguf(tmp_path / "m.gguf")))
    assert file.field("no.such") is None
    assert file.field("no.such", 7) == 7
    with pytest.raises(ConfigError, match=r"m.gguf has no metadata key 'no.such'"):
        file.require("no.such")


def test_tensors_are_float32_in_out_by_in_orientation(tmp_path):
    matrix = np.arange(8 * 32, dtype=np.float32).reshape(8, 32)
    path = write_gguf(
        tmp_path / "m.gguf", tensors={"w": matrix, "half": matrix.astype(np.float16), "v": matrix[0].copy()}
    )
    file = GGUFFile(str(path))
    assert file.tensor_names() == ["token_embd.weight", "w", "half", "v"]
    assert file.tensor_shape("w") == (8, 32)
    for name, want in (("w", matrix), ("half", matrix), ("v", matrix[0])):
        got = file.tensor(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
    with pytest.raises(KeyError):
        file.tensor("nothing")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16])
def test_quantised_tensor(tmp_path, kind):
    matrix = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    writer.add_tensor("w", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(str(tmp_path / "q.gguf"))
    assert file.tensor_shape("w") == (4, 64)
    np.testing.assert_allclose(file.tensor("w"), matrix, atol=1 / 128)


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", b"GGUF\x03\x00\x00\x00"])
def test_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad.gguf is not a readable GGUF file"):
        GGUFFile(str(tmp_path / "bad.gguf"))


def test_truncated_file_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ConfigError, match=r"m.gguf is not a readable GGUF file"):
        GGUFFile(str(path))


def test_open_gguf_reads_a_file_once_until_it_changes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    first = open_gguf(str(path))
    assert open_gguf(str(path)) is first
    write_gguf(path, fields={"x.new": 1})
    assert open_gguf(str(path)).field("x.new") == 1


def test_real_model(smollm2_path):
    file = open_gguf(smollm2_path)
    assert len(file.tensor_names()) == 272
    assert len(file.field("tokenizer.ggml.tokens")) == 49152
    assert file.tensor_shape("blk.0.ffn_down.weight") == (576, 1536)
    norm = file.tensor("blk.0.attn_norm.weight")
    assert norm.shape == (576,)
    assert np.isfinite(file.tensor("blk.0.attn_k.weight")).all()
