"""An update: the same whatever it is cut into, on however many ranks, and after a restart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rl.trainer_cases import make_batches, make_model, make_recipe, run

from sglang.rl.batching import collate
from sglang.rl.policy import _logprobs, load_policy
from sglang.rl.samples import Sample
from sglang.rl.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_trainer(model: Path, directory: Path, **sections: dict[str, object]) -> Trainer:
    recipe = make_recipe(model, directory, **sections)
    return Trainer(load_policy(recipe.model, CPU, seed=0), recipe, CPU)


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_log_probabilities_are_the_models(model: Path, tmp_path: Path) -> None:
    import transformers

    trainer = make_trainer(model, tmp_path)
    sample = Sample([5, 9, 2], [7, 7, 30], [0.0] * 3, [0] * 3)
    batch = collate([sample, Sample([1], [3], [0.0], [0])], [1.0, 1.0])
    with torch.no_grad():
        got = trainer._logprobs(batch)
        logits = transformers.AutoModelForCausalLM.from_pretrained(model)(torch.tensor([[5, 9, 2, 7, 7, 30]])).logits
    want = (logits[0, :-1] / 0.8).log_softmax(-1).gather(1, torch.tensor([[9, 2, 7, 7, 30]]).T).squeeze(1)
    torch.testing.assert_close(got[0, 1:], want)
    assert got.shape == (2, 6) and got[0, 0] == 0


def test_wide_logits_are_not_rounded() -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(32, 100, bias=False).bfloat16(), (4 * torch.randn(50, 32)).bfloat16()
    targets = torch.arange(50)
    logits = hidden.double() @ head.weight.double().t() / 0.8
    want = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        rounded, wide = (_logprobs(head, hidden, targets, 0.8, fp32) for fp32 in (False, True))
    assert (wide - want).abs().max() < 1e-5 < 1e-3 < (rounded - want).abs().max()


def test_an_update_does_not_depend_on_micro_batches(model: Path, tmp_path: Path) -> None:
    adapters = []
    for max_tokens in (20, 64, 10_000):
        trainer = make_trainer(model, tmp_path, optim={"max_tokens": max_tokens})
        batches = make_batches(trainer._recipe, 0)
        trainer.update(batches, 0)
        adapters.append((len(batches[0]), trainer.adapter()))
    assert adapters[0][0] > adapters[1][0] > adapters[2][0] == 1
    # AdamW divides by a root: where the gradient is next to nothing, rounding decides its sign.
    assert difference(adapters[0][1], adapters[2][1]) < 2e-4
    assert difference(adapters[1][1], adapters[2][1]) < 2e-4


def test_near_on_policy_the_importance_weight_is_one(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path)
    for step in range(3):
        stats = trainer.update(make_batches(trainer._recipe, step), 0)
        assert abs(stats["ratio/mean"] - 1) < 1e-5 and stats["clip/share"] == stats["mask/share"] == 0
        assert stats["logp_gap/mean"] > 0 and stats["grad_norm"] > 0 and stats["lr"] == 0.01


def test_several_minibatches_leave_the_policy_that_drew(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path, optim={"ppo_n_minibatches": 4, "lr": 0.05})
    stats = trainer.update(make_batches(trainer._recipe, 0, 24), 0)
    assert trainer.updates == 4 and stats["ratio/max"] > 1.05 and stats["m2"] > 1e-3 and stats["mask/share"] > 0


def test_only_the_adapter_moves(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path, optim={"weight_decay": 0.0})
    before = {n: p.clone() for n, p in trainer.policy.named_parameters()}
    trainer.update(make_batches(trainer._recipe, 0), 0)
    moved = {n for n, p in trainer.policy.named_parameters() if not torch.equal(before[n], p)}
    assert moved and all(".lora_B." in name for name in moved)
    trainer.update(make_batches(trainer._recipe, 1), 0)
    moved = {n for n, p in trainer.policy.named_parameters() if not torch.equal(before[n], p)}
    assert all(".lora_" in name for name in moved) and any(".lora_A." in name for name in moved)


def test_a_good_attempt_becomes_likelier(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path)
    good, bad = Sample([5, 9], [7, 3], [-4.0] * 2, [0] * 2), Sample([5, 9], [1, 2], [-4.0] * 2, [0] * 2)
    batch = collate([good, bad], [1.0, -1.0])
    with torch.no_grad():
        before = trainer._logprobs(batch).sum(1)
        for _ in range(10):
            with torch.enable_grad():
                trainer.update([[batch]], 0)
        after = trainer._logprobs(batch).sum(1)
    assert after[0] > before[0] + 0.5 and after[1] < before[1] - 0.5


def test_it_continues_bit_for_bit(model: Path, tmp_path: Path) -> None:
    whole, first, second = (make_trainer(model, tmp_path, optim={"warmup_steps": 3}) for _ in range(3))
    for step in range(4):
        whole.update(make_batches(whole._recipe, step), 0)
    for step in range(2):
        first.update(make_batches(first._recipe, step), 0)
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(2, 4):
        second.update(make_batches(second._recipe, step), 0)
    assert second.updates == whole.updates == 4
    assert difference(whole.adapter(), second.adapter()) == 0


def test_a_checkpoint_of_other_ranks_is_refused(model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(ValueError, match="checkpoint is of 3 ranks"):
        trainer.load_state_dict(trainer.state_dict() | {"world_size": 3})


@pytest.mark.slow
def test_two_ranks_do_what_one_does(model: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo."""
    want, want_stats = run(model, tmp_path)
    script = Path(__file__).with_name("trainer_cases.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "out.pt"
    subprocess.run([*command, str(script), str(model), str(out)], check=True, timeout=240, env=environment)
    got, got_stats = torch.load(out, weights_only=True)
    assert difference(want, got) < 5e-4
    for ours, theirs in zip(want_stats, got_stats, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=2e-2, abs=1e-4), name
