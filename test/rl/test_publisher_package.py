"""An adapter's bytes: the same from every framework, in PEFT's form, with nothing lost."""

from __future__ import annotations

import enum
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from safetensors.numpy import load
from server_process import child_environment

from sglang.rl.publisher_package import Package, gather, plain

CONFIG = {"r": 2, "lora_alpha": 4}
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (6, 2)}
    return {f"{NAME}.{name}": rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def image(package: Package) -> bytes:
    return b"".join(package.image())


def test_importing_the_publisher_brings_no_framework():
    code = (
        "import sys; import sglang.rl.publisher; heavy = {'torch', 'peft', 'transformers', 'fastapi', 'sgl_kernel'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_framework_gives_the_same_bytes(dtype):
    import torch
    from safetensors.torch import load as load_torch

    given = tensors()
    of_torch = {name: torch.from_numpy(value) for name, value in given.items()}
    mixed = dict(zip(given, [next(iter(given.values())), list(of_torch.values())[1]], strict=True))
    images = {image(Package(source, CONFIG, dtype)) for source in (given, of_torch, mixed)}
    assert len(images) == 1
    read = load_torch(images.pop())
    for name, value in of_torch.items():
        assert torch.equal(read[name], value.to(getattr(torch, dtype)))


def test_the_order_does_not_matter_and_the_content_does():
    given = tensors()
    package = Package(given, CONFIG)
    reverse = Package(dict(reversed(given.items())), dict(reversed(CONFIG.items())))
    assert package.digest == reverse.digest
    assert package.digest == hashlib.sha256(package.config + image(package)).hexdigest()
    assert package.nbytes == len(image(package))
    assert len({package.digest, Package(tensors(1), CONFIG).digest, Package(given, {**CONFIG, "r": 1}).digest}) == 3


def test_tensors_of_any_strides_and_of_a_graph():
    import torch

    given = tensors()
    weight = {
        name: torch.nn.Parameter(torch.from_numpy(value.T.copy())).T for name, value in given.items()
    }  # neither contiguous nor leaves
    assert image(Package(weight, CONFIG)) == image(Package(given, CONFIG))


def test_names_are_those_that_peft_saves():
    given = tensors()
    wrapped = {
        name.replace("q_proj.lora_A", "q_proj._orig_mod.lora_A.default").replace("lora_B", "lora_B.default"): value
        for name, value in given.items()
    }
    wrapped = {f"_fsdp_wrapped_module.{name}": value for name, value in wrapped.items()}
    assert list(Package(wrapped, CONFIG).shapes) == sorted(given)
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A.default": next(iter(given.values()))}
    assert list(Package(embedding, CONFIG).shapes) == ["base_model.model.model.embed_tokens.lora_embedding_A"]
    with pytest.raises(ValueError, match="the same name"):
        Package({**given, f"{NAME}.lora_A.default.weight": given[f"{NAME}.lora_A.weight"]}, CONFIG)


def test_what_cannot_be_sent_is_an_error():
    import torch

    with pytest.raises(ValueError, match="no tensors"):
        Package({}, CONFIG)
    for bad in (np.zeros((2, 2), np.int64), torch.zeros((2, 2), dtype=torch.int64)):
        with pytest.raises(TypeError, match="lora_A.weight"):
            Package({f"{NAME}.lora_A.weight": bad}, CONFIG)
    with pytest.raises(ValueError, match="give the LoraConfig"):
        gather(tensors())
    with pytest.raises(TypeError, match="neither a PeftModel nor"):
        gather([1], CONFIG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_that_are_not_finite_are_named(dtype, value):
    given = tensors()
    given[f"{NAME}.lora_B.weight"][3, 1] = value
    package = Package(given, CONFIG, dtype)
    if value == 1e30 and dtype != "float16":
        package.check_finite()
        return
    with pytest.raises(ValueError, match="lora_B.weight has NaN"):
        package.check_finite()


class Kind(enum.Enum):
    LORA = "LORA"


@dataclass
class Options:
    scale: float


def test_configs_become_plain():
    config = {"kind": Kind.LORA, "modules": {"v", "q"}, "options": Options(0.5), "ranks": (1, 2), 3: None}
    assert plain(config) == {
        "kind": "LORA", "modules": ["q", "v"], "options": {"scale": 0.5}, "ranks": [1, 2], "3": None,
    }  # fmt: skip
    with pytest.raises(TypeError, match="JSON has no form"):
        plain({"f": print})


class Sharded:
    """A DTensor, as far as anybody looks."""

    def __init__(self, whole: np.ndarray) -> None:
        self.whole = whole

    def full_tensor(self) -> np.ndarray:
        return self.whole


def test_sharded_tensors_are_gathered():
    given = tensors()
    whole, config = gather({name: Sharded(value) for name, value in given.items()}, CONFIG)
    assert image(Package(whole, config)) == image(Package(given, CONFIG))


def test_a_peft_model_brings_its_tensors_and_config(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, vocab_size=64, **shape))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True)
    model = get_peft_model(base, config)
    package = Package(*gather(model), dtype="float32")
    model.save_pretrained(tmp_path)
    saved = load((tmp_path / "adapter_model.safetensors").read_bytes())
    sent = load(image(package))
    assert sent.keys() == saved.keys()
    assert all(np.array_equal(sent[name], saved[name]) for name in saved)
    told = json.loads(package.config)
    assert (told["peft_type"], told["r"], told["use_rslora"]) == ("LORA", 4, True)
    assert told["target_modules"] == ["down_proj", "q_proj"]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(1.0)
    assert Package(*gather(model, config), dtype="float32").digest != package.digest
