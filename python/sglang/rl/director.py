"""Rank 0's half of a run: servers, rollouts, rewards, publishing, evaluation, the log. The other half is `trainer`.

Owned by `train`. Knows versions by number: 0 is the base model, n what the policy was after n steps.
Invariants: what `collect` returns was drawn by policies at most `max_staleness` versions old; a server that has been
started again gets the current policy before it is asked for anything else.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sglang.rl import metrics
from sglang.rl.advantages import compute_advantages
from sglang.rl.config import Recipe
from sglang.rl.metrics import RunLog
from sglang.rl.plots import plot_curves
from sglang.rl.publisher import Publisher
from sglang.rl.rollout import Rollout
from sglang.rl.samples import Group, Sample
from sglang.rl.servers import Servers
from sglang.rl.tasks import make_task
from sglang.srt.config.model_path import resolve_model_path
from sglang.srt.parser.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PROBES = 64
"""Attempts of an evaluation by which servers and trainer are compared."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step trains on, the same on every rank.

    Fields:
        stats: of the rollouts, by the names of `metrics`.
    """

    samples: list[Sample]
    advantages: list[float]
    stats: dict[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good the policy is.

    Fields:
        rewards: by the names of `metrics`.
        probe: some attempts at the rollouts' temperature, by the current policy alone.
    """

    rewards: dict[str, float]
    probe: list[Sample]


class Director:
    """See the module.

    Args:
        out: the run's directory.
        config: LoraConfig of the adapter.
    """

    def __init__(self, recipe: Recipe, out: Path, config: Any) -> None:
        self._recipe, self._out, self._config = recipe, out, config
        server = recipe.server
        self._servers = Servers(server, recipe.model.path, out / "server.log")
        self._servers.ensure()
        self._publisher = Publisher(
            self._servers.urls,
            mode=server.mode,
            transport=server.transport,  # type: ignore[arg-type]
            keep_last=server.keep_last,
            timeout=server.timeout,
            grace=server.grace,
            api_key=server.api_key,
            admin_api_key=server.admin_api_key,
            dtype=recipe.model.dtype,
        )
        tokenizer = Tokenizer.from_path(resolve_model_path(recipe.model.path))
        self._task = make_task(recipe.task, tokenizer)
        self._evals = self._task.evals()
        self._rollout = Rollout(
            self._servers.urls,
            recipe.rollout,
            self._task,
            tokenizer,
            adapter_name=self._adapter_name,
            api_key=server.api_key,
            seed=recipe.seed,
            watch=self._watch,
        )
        self._log = RunLog(out, recipe.steps)
        self._draws = importlib.util.find_spec("matplotlib") is not None
        if not self._draws:
            logger.warning("matplotlib is not installed: no curves are drawn")
        self._adapter: Mapping[str, Tensor] | None = None
        self._number = 0

    # ---- a step ----------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> Work:
        """Attempts for a step, and what they are worth."""
        started = time.perf_counter()
        groups = self._rollout.collect(self._recipe.rollout.groups, step)
        advantages = compute_advantages(groups, self._recipe.advantage)
        stats = self._describe(groups, advantages.kept, step, time.perf_counter() - started)
        kept = [(g, v) for g, v, keep in zip(groups, advantages.values, advantages.kept, strict=True) if keep]
        samples = [sample for group, _ in kept for sample in group.samples]
        values = [value for _, numbers in kept for value in numbers]
        # An attempt that was cut off before its first token has nothing to learn from.
        pairs = [(sample, value) for sample, value in zip(samples, values, strict=True) if sample.output_ids]
        return Work([sample for sample, _ in pairs], [value for _, value in pairs], stats)

    def publish(self, adapter: Mapping[str, Tensor], number: int) -> float:
        """Bring the policy to every server as version `number`; seconds that it took.

        Args:
            adapter: whole tensors by PEFT's names.

        Raises:
            PublishError: a server cannot be reached, and does not come back in time.
        """
        started = time.perf_counter()
        self._adapter, self._number = adapter, number
        self._bring_up()
        self._rollout.published(self._publisher.publish(adapter, self._config), number)
        return time.perf_counter() - started

    def evaluate(self) -> Evaluation:
        """The current policy on every evaluation set."""
        section = self._recipe.eval
        found: dict[str, float] = {}
        probe: list[Sample] = []
        for name, problems in self._evals.items():
            temperature = section.temperatures.get(name, section.temperature)
            groups = self._rollout.evaluate(problems, section.samples, temperature, section.max_new_tokens)
            rewards = [sample.reward for group in groups for sample in group.samples]
            found[metrics.EVAL + name] = float(np.mean(rewards))
            if temperature == self._recipe.rollout.temperature:
                probe += [sample for group in groups for sample in group.samples if sample.output_ids]
        return Evaluation(found, probe[:PROBES])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the log; after an evaluation the curves are drawn anew, where there is matplotlib."""
        self._log.log(step, values)
        if self._draws and any(name.startswith(metrics.EVAL) for name in values):
            plot_curves(self._out / metrics.FILE, self._out / "curves.png")

    # ---- what outlives a process -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where the rollouts are, as JSON."""
        return {"rollout": self._rollout.snapshot()}

    def resume(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Continue behind `step` steps: those of the log that come later are forgotten.

        Args:
            state: None begins anew.
        """
        self._log.resume(step if state is not None else -1)
        if state is not None:
            self._rollout.restore(state["rollout"])

    def close(self) -> None:
        """Stop everything, a server of our own last."""
        self._rollout.close()
        self._publisher.close()
        self._task.close()
        self._log.close()
        self._servers.close()

    # ---- servers ---------------------------------------------------------------------------------------------------

    def _adapter_name(self) -> str | None:
        current = self._publisher.current
        return None if current is None else current.name

    def _watch(self) -> None:
        """While rollouts are waited for: a server that has been started again gets its policy back."""
        if self._bring_up() and self._adapter is not None:
            self._rollout.published(self._publisher.publish(self._adapter, self._config), self._number)

    def _bring_up(self) -> bool:
        """Wait until every server answers; whether one of them has been started again."""
        restarted = self._servers.ensure()
        for url in restarted:
            logger.warning("%s has been away; publishing the policy to it again", url)
            self._rollout.restarted(url)
        return bool(restarted)

    # ---- statistics ------------------------------------------------------------------------------------------------

    def _describe(self, groups: list[Group], kept: list[bool], step: int, seconds: float) -> dict[str, float]:
        samples = [sample for group in groups for sample in group.samples]
        rewards = np.array([sample.reward for sample in samples])
        ages = np.array([step - sample.oldest_version for sample in samples])
        tokens = sum(len(sample.output_ids) for sample in samples)
        return {
            metrics.VERSION: step,
            metrics.REWARD_MEAN: float(rewards.mean()),
            metrics.REWARD_STD: float(rewards.std()),
            metrics.STALENESS_MEAN: float(ages.mean()),
            metrics.STALENESS_MAX: float(ages.max()),
            metrics.GROUPS_KEPT: sum(kept),
            metrics.TOKENS_PER_STEP: tokens,
            metrics.SAMPLES_ABORTED: sum(sample.finish == "abort" for sample in samples),
            metrics.SAMPLES_CONTINUED: sum(sample.continuations > 0 for sample in samples),
            metrics.ROLLOUT_SECONDS: seconds,
        }
