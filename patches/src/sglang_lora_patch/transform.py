"""Rewrites SGLang's sources: finds what to change by structure, inserts one-line calls of `runtime`.

Owns the anchors: which class has which methods with which parameters, and which expressions stand in them. A source
whose anchors are not found exactly as often as expected is refused as a whole; a line number or a piece of text is
never an anchor, and no text of SGLang is stored here. Everything is a function from sources to sources: nothing is
written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst
from libcst import matchers as m

ALIAS = "_lora_patch"
# Where `apply` puts a copy of the runtime module, and where the import hook finds it.
COPIED_RUNTIME = "sglang._lora_patch.runtime"
INSTALLED_RUNTIME = "sglang_lora_patch.runtime"


class Refusal(Exception):
    """The source is not one this patch is sure about. Nothing was changed."""


# ---- expressions ------------------------------------------------------------------------------------------------


def _ours(name: str) -> cst.Attribute:
    return cst.Attribute(cst.Name(ALIAS), cst.Name(name))


def _on_self(*path: str) -> m.Attribute:
    matcher: m.Name | m.Attribute = m.Name("self")
    for part in path:
        matcher = m.Attribute(value=matcher, attr=m.Name(part))
    assert isinstance(matcher, m.Attribute)
    return matcher


_ACQUIRE = m.Call(func=_on_self("lora_registry", "acquire"), args=[m.Arg()])
_RELEASE = m.Call(func=_on_self("lora_registry", "release"))
_TABLE = _on_self("rid_to_state")
_EMPTY = m.Dict(elements=[])


def _acquire(node: cst.BaseExpression) -> cst.BaseExpression | None:
    if not m.matches(node, _ACQUIRE):
        return None
    call = cst.ensure_type(node, cst.Call)
    registry = cst.ensure_type(call.func, cst.Attribute).value
    return call.with_changes(func=_ours("acquire"), args=[cst.Arg(registry), *call.args])


def _built_by(name: str, ours: str) -> Callable[[cst.BaseExpression], cst.BaseExpression | None]:
    def replace(node: cst.BaseExpression) -> cst.BaseExpression | None:
        if m.matches(node, m.Call(func=m.Name(name), args=[])):
            return cst.ensure_type(node, cst.Call).with_changes(func=_ours(ours))
        return None

    return replace


# ---- statements -------------------------------------------------------------------------------------------------


def _no_release(node: cst.BaseSmallStatement) -> cst.BaseSmallStatement | None:
    if m.matches(node, m.Expr()) and m.findall(node, _RELEASE):
        return cst.Pass()
    return None


def _table(node: cst.BaseSmallStatement) -> cst.BaseSmallStatement | None:
    plain = m.Assign(targets=[m.AssignTarget(target=_TABLE)], value=_EMPTY)
    if m.matches(node, plain | m.AnnAssign(target=_TABLE, value=_EMPTY)):
        return node.with_changes(value=cst.Call(_ours("StateTable")))
    return None


# ---- what is looked for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decorated:
    """A method that gets a decorator of ours, recognised by its name and the parameters we rely on."""

    method: str
    decorator: str
    parameters: tuple[str, ...]
    asynchronous: bool | None = True


@dataclass(frozen=True, eq=False)
class Anchors:
    """What one class must look like, and what happens to it."""

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    methods: tuple[Decorated, ...]
    # Name of the anchor: how often it must be found, and what takes its place.
    expressions: Mapping[str, tuple[int, Callable[[cst.BaseExpression], cst.BaseExpression | None]]] = field(
        default_factory=dict
    )
    statements: Mapping[str, tuple[int, Callable[[cst.BaseSmallStatement], cst.BaseSmallStatement | None]]] = field(
        default_factory=dict
    )


MANAGER = Anchors(
    paths=("srt/managers/tokenizer_manager.py",),
    classes=("TokenizerManager",),
    methods=(
        Decorated("generate_request", "owns_request", ("self", "obj")),
        Decorated("_send_one_request", "dispatches", ("self", "tokenized_obj"), None),
        Decorated("_send_batch_request", "dispatches", ("self", "tokenized_objs"), None),
        Decorated("_wait_one_response", "keeps_record", ("self", "obj"), None),
        Decorated("_handle_batch_output", "ends_batch", ("self", "recv_obj"), None),
        Decorated("_handle_abort_req", "ends_aborted", ("self", "recv_obj"), False),
    ),
    expressions={"acquire": (1, _acquire)},
    statements={"release": (2, _no_release), "rid_to_state": (1, _table)},
)
CONTROL = Anchors(
    paths=("srt/managers/tokenizer_control_mixin.py", "srt/managers/tokenizer_communicator_mixin.py"),
    classes=("TokenizerControlMixin", "TokenizerCommunicatorMixin"),
    methods=(
        Decorated("_unload_lora_adapter_locked", "evicts", ("self", "obj")),
        Decorated("load_lora_adapter", "loads", ("self", "obj")),
        Decorated("load_lora_adapter_from_tensors", "loads", ("self", "obj")),
        Decorated("unload_lora_adapter", "unloads", ("self", "obj")),
    ),
)
REGISTRY = Anchors(
    paths=("srt/lora/lora_registry.py",),
    classes=("LoRARegistry",),
    methods=(
        Decorated("unregister", "retires", ("self", "lora_name")),
        Decorated("acquire", "counts_uses", ("self", "lora_name")),
        Decorated("release", "gives_back", ("self", "lora_id")),
        Decorated("wait_for_unload", "waits_for_users", ("self", "lora_id")),
        Decorated("get_unregistered_loras", "revives", ("self", "lora_name")),
    ),
    expressions={
        "registry lock": (1, _built_by("RWLock", "InstantLock")),
        "usage counter": (1, _built_by("ConcurrentCounter", "UsageCounter")),
    },
)
ALL = (MANAGER, CONTROL, REGISTRY)
# A method of this name means that the release repairs the count itself.
OWN_FIX = "_release_lora_once"


# ---- the rewriting ----------------------------------------------------------------------------------------------


class _Rewriter(cst.CSTTransformer):
    """Applies one `Anchors` to one module and counts what it found."""

    def __init__(self, anchors: Anchors) -> None:
        super().__init__()
        self.anchors = anchors
        self.found: Counter[str] = Counter()
        self.problems: list[str] = []
        self._inside = 0
        self._depth = 0
        self._methods = {each.method: each for each in anchors.methods}

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._inside += node.name.value in self.anchors.classes

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        self._inside -= original_node.name.value in self.anchors.classes
        return updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._depth += 1

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        self._depth -= 1
        name = original_node.name.value
        if not self._inside or self._depth:
            return updated_node
        if name == OWN_FIX:
            raise Refusal("this sglang counts the users of an adapter itself: it needs no patch")
        wanted = self._methods.get(name)
        if wanted is None:
            return updated_node
        self.found[name] += 1
        self._check(original_node, wanted)
        decorator = cst.Decorator(_ours(wanted.decorator))
        return updated_node.with_changes(decorators=[decorator, *updated_node.decorators])

    def _check(self, node: cst.FunctionDef, wanted: Decorated) -> None:
        parameters = {each.name.value for each in (*node.params.params, *node.params.kwonly_params)}
        missing = [each for each in wanted.parameters if each not in parameters]
        if missing:
            self.problems.append(f"{wanted.method} has no parameter {', '.join(missing)}")
        if wanted.asynchronous is not None and wanted.asynchronous != (node.asynchronous is not None):
            self.problems.append(f"{wanted.method} is {'not ' * wanted.asynchronous}asynchronous")

    def on_leave(self, original_node: cst.CSTNodeT, updated_node: cst.CSTNodeT) -> object:  # type: ignore[override]
        result = super().on_leave(original_node, updated_node)
        if not self._inside:
            return result
        if isinstance(result, cst.Call):
            return self._replaced(result, self.anchors.expressions)
        if isinstance(result, (cst.Expr, cst.Assign, cst.AnnAssign)):
            return self._replaced(result, self.anchors.statements)
        return result

    def _replaced(self, node: object, changes: Mapping[str, tuple[int, Callable[..., object]]]) -> object:
        for name, (_, change) in changes.items():
            replacement = change(node)
            if replacement is not None:
                self.found[name] += 1
                return replacement
        return node

    def finish(self, where: str) -> None:
        """Raise a refusal unless every anchor was found as often as it should be."""
        wanted = {each.method: 1 for each in self.anchors.methods}
        wanted |= {name: count for name, (count, _) in (*self.anchors.expressions.items(),)}
        wanted |= {name: count for name, (count, _) in (*self.anchors.statements.items(),)}
        wrong = [f"{name} found {self.found[name]} time(s), not {count}" for name, count in wanted.items()]
        wrong = [text for text, (name, count) in zip(wrong, wanted.items(), strict=True) if self.found[name] != count]
        if wrong or self.problems:
            raise Refusal(f"{where} is not as expected: {'; '.join(wrong + self.problems)}")


def _with_import(module: cst.Module, runtime: str) -> cst.Module:
    """Put the import of our runtime behind the docstring and the imports from `__future__`."""
    docstring = m.SimpleStatementLine(body=[m.Expr(value=m.SimpleString() | m.ConcatenatedString())])
    future = m.SimpleStatementLine(body=[m.ImportFrom(module=m.Name("__future__"))])
    at = 0
    while at < len(module.body) and m.matches(module.body[at], future | docstring if at == 0 else future):
        at += 1
    line = cst.parse_statement(f"import {runtime} as {ALIAS}", config=module.config_for_parsing)
    return module.with_changes(body=[*module.body[:at], line, *module.body[at:]])


def is_patched(source: bytes) -> bool:
    """Whether `source` carries the import that this module inserts."""
    return any(f" as {ALIAS}".encode() in line for line in source.splitlines() if line.startswith(b"import "))


def rewrite(source: bytes, anchors: Anchors, runtime: str = COPIED_RUNTIME) -> bytes:
    """Return `source` with the changes of `anchors`, or raise `Refusal`."""
    where = anchors.paths[0].rpartition("/")[2]
    if is_patched(source):
        raise Refusal(f"{where} is patched already")
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        raise Refusal(f"{where} cannot be parsed: {error.message}") from error
    rewriter = _Rewriter(anchors)
    changed = module.visit(rewriter)
    rewriter.finish(where)
    result = _with_import(changed, runtime).bytes
    compile(result, where, "exec", dont_inherit=True)
    return result


def plan(package: Path, runtime: str = COPIED_RUNTIME) -> dict[str, bytes]:
    """Return the changed files of the `sglang` package in `package` by their path in it, or raise `Refusal`."""
    files: dict[str, bytes] = {}
    for anchors in ALL:
        present = [path for path in anchors.paths if (package / path).is_file()]
        if len(present) != 1:
            raise Refusal(f"{package} has no {' or '.join(anchors.paths)}: this is not a stock sglang")
        files[present[0]] = rewrite((package / present[0]).read_bytes(), anchors, runtime)
    return files
