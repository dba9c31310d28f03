"""The rewriting: what it finds, what it refuses, and that neither lines nor comments matter."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("libcst", reason="the patcher needs libcst: pip install libcst")

from sglang_lora_patch import transform, versions
from sglang_lora_patch.transform import CONTROL, MANAGER, REGISTRY, Refusal, plan, rewrite
from toy_stock import FILES, TARGETS

SOURCE = {anchors: FILES[anchors.paths[0]] for anchors in (MANAGER, CONTROL, REGISTRY)}


def changed_lines(before, after):
    before, after = before.splitlines(), after.decode().splitlines()
    return [line.strip() for line in after if line not in before]


def test_inserts_only_short_calls():
    lines = changed_lines(SOURCE[MANAGER], rewrite(SOURCE[MANAGER].encode(), MANAGER))
    assert lines == [
        "import sglang._lora_patch.runtime as _lora_patch",
        "self.rid_to_state: Dict[str, ReqState] = _lora_patch.StateTable()",
        "@_lora_patch.owns_request",
        "obj.lora_id = await _lora_patch.acquire(self.lora_registry, obj.lora_path)",
        "@_lora_patch.dispatches",
        "@_lora_patch.dispatches",
        "@_lora_patch.keeps_record",
        "pass",
        "@_lora_patch.ends_batch",
        "pass",
        "@_lora_patch.ends_aborted",
    ]


@pytest.mark.parametrize("anchors", SOURCE, ids=lambda anchors: anchors.classes[0])
def test_lines_and_comments_do_not_matter(anchors):
    source = SOURCE[anchors]
    shifted = re.sub(r"^(    (?:async )?def )", r"    # a remark\n\n\n\1", source, flags=re.MULTILINE)
    plain = rewrite(source.encode(), anchors).decode().splitlines()
    moved = rewrite(("# first\n" * 7 + shifted).encode(), anchors).decode().splitlines()
    kept = [line for line in moved if line and not line.lstrip().startswith("#")]
    assert sorted(kept) == sorted(line for line in plain if line)


def test_import_stands_behind_docstring_and_future():
    lines = rewrite(SOURCE[REGISTRY].encode(), REGISTRY).decode().splitlines()
    assert lines.index("from __future__ import annotations") < lines.index(
        f"import {transform.COPIED_RUNTIME} as _lora_patch"
    )


def test_line_endings_stay():
    result = rewrite(SOURCE[CONTROL].replace("\n", "\r\n").encode(), CONTROL)
    assert result.count(b"\n") == result.count(b"\r\n")


@pytest.mark.parametrize(
    ("anchors", "old", "new", "reason"),
    [
        (MANAGER, "class TokenizerManager(", "class OtherManager(", "generate_request found 0"),
        (MANAGER, "async def generate_request", "async def answer", "generate_request found 0"),
        (MANAGER, "async def generate_request", "def generate_request", "not asynchronous"),
        (MANAGER, "self.lora_registry.acquire(", "self.lora_registry.take(", "acquire found 0"),
        (MANAGER, "self.aborts.append(rid)", "self.lora_registry.release(rid)", "release found 3"),
        (MANAGER, "ReqState] = {}", "ReqState] = dict()", "rid_to_state found 0"),
        (MANAGER, "tokenized_objs", "requests", "no parameter tokenized_objs"),
        (MANAGER, "async def _resolve", "def _release_lora_once(self): ...\n\n    async def _resolve", "itself"),
        (CONTROL, "unload_lora_adapter(self, obj", "unload_lora_adapter(self, body", "no parameter obj"),
        (REGISTRY, "= RWLock()", "= OtherLock()", "registry lock found 0"),
        (REGISTRY, "= ConcurrentCounter()", "= ConcurrentCounter(0)", "usage counter found 0"),
        (REGISTRY, "async def release", "async def give_back", "release found 0"),
        (REGISTRY, "class Ref:", "class Ref", "cannot be parsed"),
    ],
)
def test_refuses_what_it_is_not_sure_about(anchors, old, new, reason):
    assert old in SOURCE[anchors]
    source = SOURCE[anchors].replace(old, new)
    if anchors is MANAGER and new == "def generate_request":
        source = SOURCE[anchors].replace(
            "async def generate_request(self, obj, request=None):",
            "def generate_request(self, obj):\n        return\n\n    async def rest(self, obj):",
        )
    with pytest.raises(Refusal, match=reason):
        rewrite(source.encode(), anchors)


def test_refuses_a_second_time():
    once = rewrite(SOURCE[MANAGER].encode(), MANAGER)
    with pytest.raises(Refusal, match="patched already"):
        rewrite(once, MANAGER)


def test_plan_covers_all_files_or_none(toy):
    assert sorted(plan(toy / "sglang")) == TARGETS
    (toy / "sglang/srt/lora/lora_registry.py").unlink()
    with pytest.raises(Refusal, match="lora_registry"):
        plan(toy / "sglang")


def test_versions():
    assert all(versions.why_not(version) is None for version in versions.SUPPORTED)
    assert "needs no patch" in versions.why_not("0.5.22")
    for other in ("0.5.8", "0.6.0", "0.5.12+lora.1", "0.5.12.dev3"):
        assert "nothing was changed" in versions.why_not(other)
