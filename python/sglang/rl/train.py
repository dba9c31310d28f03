"""A training run: `python -m sglang.rl.train RECIPE`, or `torchrun ... -m sglang.rl.train RECIPE` on several GPUs.

The loop, on every rank: rank 0 collects attempts (`director`), all ranks update the adapter (`trainer`), rank 0
publishes it. While one step is trained the servers work on the next ones, as far as the recipe's `max_staleness` lets
them. Stop it at any time and go on with ``--resume``.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from sglang.rl import distributed, metrics
from sglang.rl.batching import make_minibatches
from sglang.rl.checkpoints import Checkpoints
from sglang.rl.config import Recipe, load_recipe
from sglang.rl.director import Director, Evaluation, Work
from sglang.rl.policy import load_policy
from sglang.rl.trainer import Trainer

logger = logging.getLogger(__name__)

STEP_SEEDS = 1_000_003
"""Seeds of a run's steps are apart from those of runs whose seeds are neighbours."""


class Run:
    """One run on one rank.

    Args:
        resume: go on behind the last checkpoint, if there is one.
    """

    def __init__(self, recipe: Recipe, resume: bool) -> None:
        self._recipe = recipe
        self._out = Path(recipe.out)
        self._out.mkdir(parents=True, exist_ok=True)
        self._checkpoints = Checkpoints(self._out / "checkpoints")
        restored = self._checkpoints.latest() if resume else None
        device = distributed.start()
        policy = load_policy(recipe.model, device, recipe.seed)
        self._config: Any = policy.model.peft_config["default"]  # type: ignore[index]
        self._trainer = Trainer(policy, recipe, device)
        self._first = 0
        if restored is not None:
            self._trainer.load_state_dict(restored.trainer)
            self._first = restored.step
        self._director = Director(recipe, self._out, self._config) if distributed.rank() == 0 else None
        if self._director is not None:
            (self._out / "recipe.json").write_bytes(msgspec.json.format(msgspec.json.encode(recipe)))
            self._director.resume(self._first, None if restored is None else restored.director)

    def run(self) -> None:
        """All steps that are left."""
        self._publish(self._first)
        if self._first == 0:
            self._evaluate(0, {})
        for step in range(self._first, self._recipe.steps):
            values = self._step(step)
            self._evaluate(step + 1, values)
            every = self._recipe.checkpoint_every
            if every and (step + 1) % every == 0 or step + 1 == self._recipe.steps:
                self._save(step + 1)

    def close(self) -> None:
        """Stop servers, leave the other ranks."""
        if self._director is not None:
            self._director.close()
        distributed.stop()

    def _step(self, step: int) -> dict[str, float]:
        """Collect, update, publish; the step's statistics."""
        started = time.perf_counter()
        work: Work = distributed.broadcast(self._director.collect(step) if self._director else None)
        collected = time.perf_counter()
        stats = self._update(work, step)
        trained = time.perf_counter()
        seconds = self._publish(step + 1)
        whole = time.perf_counter() - started
        return {
            **work.stats,
            **stats,
            metrics.TRAIN_SECONDS: trained - collected,
            metrics.SYNC_SECONDS: seconds,
            metrics.TOKENS_PER_SECOND: work.stats[metrics.TOKENS_PER_STEP] / whole,
        }

    def _update(self, work: Work, step: int) -> dict[str, float]:
        if not work.samples:
            logger.warning("step %d: every group was solved or failed by all of its attempts; nothing to learn", step)
            return {}
        optim = self._recipe.optim
        minibatches = make_minibatches(
            work.samples,
            work.advantages,
            count=optim.ppo_n_minibatches,
            max_tokens=optim.max_tokens,
            seed=self._recipe.seed * STEP_SEEDS + step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        return self._trainer.update(minibatches, step)

    def _publish(self, number: int) -> float:
        """The policy to the servers; an adapter that has never moved is the base model, and stays here."""
        adapter = self._trainer.adapter()
        if self._director is None or number == 0:
            return 0.0
        return self._director.publish(adapter, number)

    def _evaluate(self, done: int, values: dict[str, float]) -> None:
        """Evaluate if it is time, and write the line of the step behind which we are."""
        every = self._recipe.eval.every
        if every and (done % every == 0 or done == self._recipe.steps):
            found: Evaluation = distributed.broadcast(self._director.evaluate() if self._director else None)
            values = values | found.rewards | self._gap(found, done)
        if self._director is not None:
            self._director.log(done, values)

    def _gap(self, found: Evaluation, version: int) -> dict[str, float]:
        """Servers and trainer compared on attempts by the policy that both have now."""
        if not found.probe:
            return {}
        zeros = [0.0] * len(found.probe)
        ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        max_tokens = self._recipe.optim.max_tokens
        (batches,) = make_minibatches(found.probe, zeros, count=1, max_tokens=max_tokens, seed=0, **ranks)
        return self._trainer.gap(batches, version)

    def _save(self, done: int) -> None:
        state = None if self._director is None else self._director.state()
        self._checkpoints.save(done, self._trainer.state_dict(), state, self._trainer.adapter(), self._config)


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang.rl.train", description="Train a LoRA adapter by reinforcement learning."
    )
    parser.add_argument("recipe", help="a recipe's name, or the path of its YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value, instead of the recipe's")
    parser.add_argument("--out", help="directory of logs, checkpoints and plots")
    parser.add_argument("--resume", action="store_true", help="go on behind the last checkpoint in that directory")
    args = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s train] %(levelname)s %(message)s")
    recipe = load_recipe(args.recipe, tuple(args.overrides))
    if args.out:
        recipe = msgspec.structs.replace(recipe, out=args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that servers are stopped
    run = Run(recipe, args.resume)
    try:
        run.run()
    finally:
        run.close()


if __name__ == "__main__":
    main()
