"""A recipe: what a run trains, on what, with which loss; read from YAML, checked once, frozen.

Read by every module of `sglang.rl`; owns no behaviour but its own checks. Field names are the field's: those of the
near-on-policy recipe that this package is made for (`recipes/qwen3-1.7b-math.yaml`) keep the names it was published
with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

RECIPES = Path(__file__).with_name("recipes")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says the field, its value and the remedy."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: unknown keys are errors, so a typing mistake never silently keeps a default."""


class LoraSection(_Section, frozen=True, kw_only=True):
    """The adapter that is trained. `target_modules`: suffixes of linear layers, or ``all-linear``."""

    rank: int = 32
    alpha: float = 16.0
    target_modules: tuple[str, ...] | str = "all-linear"


class ModelSection(_Section, frozen=True, kw_only=True):
    """The base model, frozen.

    Fields:
        path: directory in Hugging Face's format, a .gguf file, or a name that the server knows; looked for beside the
            recipe first.
        dtype: the trainer computes in it; float32, bfloat16 or float16. The adapter is kept in float32.
        fp32_lm_head: logits are float32; with it servers should have --enable-fp32-lm-head. Rounded to bfloat16 they
            are off by more than the rest of a small model's arithmetic, on both sides, each in its own way.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    fp32_lm_head: bool = False
    lora: LoraSection = LoraSection()
    gradient_checkpointing: bool = True


class TaskSection(_Section, frozen=True, kw_only=True):
    """Problems and rewards, by the name of a task (`sglang.rl.tasks`) and its own options.

    Fields:
        eval: name of an evaluation set -> options of the same task.
    """

    name: str
    options: dict[str, Any] = {}
    eval: dict[str, dict[str, Any]] = {}


class ServerSection(_Section, frozen=True, kw_only=True):
    """Inference servers.

    Fields:
        urls: servers that run already; empty starts one with `args` (flags of ``sglang.launch_server``).
        transport: how adapters travel: auto, shm, bytes or broadcast, see `publisher`. A broadcast from a GPU needs
            servers on other GPUs.
    """

    urls: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    api_key: str | None = None
    admin_api_key: str | None = None
    mode: Literal["live", "switch", "pause"] = "live"
    transport: str = "auto"
    keep_last: int = 2
    timeout: float = 60.0
    grace: float = 3.0


class RolloutSection(_Section, frozen=True, kw_only=True):
    """What is generated for a step.

    Fields:
        groups: problems of a step; samples: attempts at each.
        max_staleness: versions that the oldest token of a sample may be behind the trainer's when it is used.
        partial_rollouts: generation that a publish or an abort has cut off goes on with the tokens it has.
        max_concurrent: attempts in flight.
    """

    groups: int = 32
    samples: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_staleness: int = 1
    partial_rollouts: bool = True
    max_concurrent: int = 256
    timeout: float = 600.0


class LossSection(_Section, frozen=True, kw_only=True):
    """The policy's loss.

    Fields:
        algorithm: m2po (second-moment trust region), grpo and ppo (a fixed clip).
        m2_threshold: of m2po; eps_low, eps_high: of the fixed clip.
        kl_coef: weight of the KL to the base model; 0 computes none.
        recompute_logprob: old log-probabilities are the trainer's own, taken just before the update; False takes those
            that the server drew with.
        normalize: a batch's loss is a mean over its tokens, or over sequences of their means.
    """

    algorithm: Literal["m2po", "grpo", "ppo"] = "m2po"
    m2_threshold: float = 0.01
    eps_low: float = 0.2
    eps_high: float = 0.2
    kl_coef: float = 0.0
    recompute_logprob: bool = True
    normalize: Literal["token", "sequence"] = "token"


class AdvantageSection(_Section, frozen=True, kw_only=True):
    """Rewards to advantages.

    Fields:
        group_std: divide by the group's deviation; batch_norm: whiten over the step after that.
        filter_zero: leave groups out of which every attempt has the same reward.
    """

    group_mean: bool = True
    group_std: bool = True
    batch_norm: bool = False
    filter_zero: bool = True


class OptimSection(_Section, frozen=True, kw_only=True):
    """AdamW and the shape of an update.

    Fields:
        ppo_n_minibatches: optimizer steps of one rollout step.
        max_tokens: of a micro-batch, padding included.
    """

    lr: float = 5e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 1.0
    warmup_steps: int = 0
    ppo_n_minibatches: int = 1
    max_tokens: int = 16384


class EvalSection(_Section, frozen=True, kw_only=True):
    """Evaluation: every `every` steps, before the first and after the last; 0 never.

    Fields:
        temperatures: by evaluation set; `temperature` for the others.
        max_new_tokens: None for the rollouts'.
    """

    every: int = 25
    samples: int = 1
    temperature: float = 0.0
    temperatures: dict[str, float] = {}
    max_new_tokens: int | None = None


class Recipe(_Section, frozen=True, kw_only=True):
    """Everything about a run.

    Fields:
        out: directory of logs, checkpoints and plots; ``{recipe}`` is the recipe's name.
        note: why these settings are stable, or what they are meant to show.
    """

    model: ModelSection
    task: TaskSection
    server: ServerSection = ServerSection()
    rollout: RolloutSection = RolloutSection()
    loss: LossSection = LossSection()
    advantage: AdvantageSection = AdvantageSection()
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    steps: int = 100
    seed: int = 0
    out: str = "runs/{recipe}"
    checkpoint_every: int = 25
    note: str = ""


def load_recipe(source: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or the name of one of the package's recipes. A file may say ``extends: other`` and
            hold only what differs.
        overrides: ``section.field=value`` with YAML values, e.g. ``optim.lr=1e-4``.

    Raises:
        RecipeError: no such recipe, unknown field, a value of the wrong type or out of range.
    """
    path = _find(source)
    try:
        tree = _read(path)
        for override in overrides:
            _override(tree, override)
        # YAML reads 5e-6 as a string: numbers are taken from strings too.
        recipe = msgspec.convert(tree, Recipe, strict=False)
    except msgspec.MsgspecError as error:
        raise RecipeError(f"{path}: {error}") from error
    _check(recipe)
    return msgspec.structs.replace(recipe, out=recipe.out.replace("{recipe}", path.stem))


def _find(source: str, beside: Path | None = None) -> Path:
    places = [Path(source), RECIPES / f"{source}.yaml"]
    if beside is not None:
        places.insert(0, beside / f"{source}.yaml")
    for path in places:
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise RecipeError(f"there is no recipe {source!r}; give the path of a YAML file or one of: {known}")


def _read(path: Path) -> dict[str, Any]:
    """The file's tree, on top of the one that it extends."""
    tree: dict[str, Any] = msgspec.yaml.decode(path.read_bytes(), type=dict[str, Any])
    model = tree.get("model")
    if isinstance(model, dict) and (path.parent / str(model.get("path"))).exists():
        model["path"] = str(path.parent / model["path"])
    parent = tree.pop("extends", None)
    return tree if parent is None else _merged(_read(_find(str(parent), path.parent)), tree)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(tree: Any, override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r} must look like section.field=value")
    *sections, last = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override {override!r}: {section} is not a section")
    tree[last] = msgspec.yaml.decode(value.encode())


def _check(recipe: Recipe) -> None:
    at_least = {
        "steps": (recipe.steps, 1),
        "rollout.groups": (recipe.rollout.groups, 1),
        "rollout.samples": (recipe.rollout.samples, 1),
        "rollout.max_staleness": (recipe.rollout.max_staleness, 0),
        "rollout.max_new_tokens": (recipe.rollout.max_new_tokens, 1),
        "rollout.max_concurrent": (recipe.rollout.max_concurrent, 1),
        "optim.ppo_n_minibatches": (recipe.optim.ppo_n_minibatches, 1),
        "optim.max_tokens": (recipe.optim.max_tokens, 1),
        "model.lora.rank": (recipe.model.lora.rank, 1),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise RecipeError(f"{name} is {value}; it must be at least {least}")
    if not recipe.optim.lr > 0:
        raise RecipeError(f"optim.lr is {recipe.optim.lr}; it must be above 0")
    if recipe.rollout.temperature <= 0:
        raise RecipeError(f"rollout.temperature is {recipe.rollout.temperature}; exploration needs one above 0")
    if recipe.advantage.group_std and recipe.rollout.samples < 2:
        raise RecipeError("advantage.group_std needs rollout.samples of 2 or more")
