"""Prefix cache: a radix tree of token sequences whose nodes own KV pages. Owned by KVManager.

The key of a cached prefix is its namespace (weights version, client's extra key) and its tokens, so a new policy never
reads the KV of an old one and no flush is needed. Everything is in whole pages: a prefix is matched and cached up to
the last full page.

Invariants:
* a node's `locks` counts the sequences that use it, and is never smaller than that of any child;
* `evictable_pages` + `locked_pages` is the number of pages the tree owns;
* only leaves without locks are evicted, least recently used first;
* a condemned tree is never matched, and owns no page that is not locked.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang.srt.mem_cache.page_allocator import Pages

Tokens = NDArray[np.int32]


class Namespace(NamedTuple):
    """What must be equal besides the tokens for KV to be shared."""

    version_id: int
    extra_key: str = ""


@dataclass(eq=False, slots=True)
class Node:
    """An edge of the tree with the node at its end: `tokens` (whole pages) and the `pages` that hold their KV."""

    parent: Node | None
    tokens: Tokens
    pages: Pages
    locks: int = 0
    last_used: int = 0
    children: dict[bytes, Node] = field(default_factory=dict)


class Match(NamedTuple):
    """Longest cached prefix: its pages, and the node it ends at (to be locked while used)."""

    pages: Pages
    node: Node


_NO_TOKENS: Tokens = np.empty(0, dtype=np.int32)
_NO_PAGES: Pages = np.empty(0, dtype=np.int32)


class RadixCache:
    """Longest-prefix match over everything computed so far.

    Args:
        enabled: False matches and keeps nothing (`--disable-radix-cache`).
    """

    def __init__(self, page_size: int, enabled: bool = True) -> None:
        self.page_size = page_size
        self.enabled = enabled
        self.evictable_pages = 0
        self.locked_pages = 0
        self._roots: dict[Namespace, Node] = {}
        self._condemned: list[Node] = []
        self._clock = itertools.count(1)

    @property
    def versions(self) -> set[int]:
        """Versions that have cached prefixes."""
        return {key.version_id for key, root in self._roots.items() if root.children}

    @property
    def num_condemned(self) -> int:
        """Namespaces that have been dropped and still have locked pages."""
        return len(self._condemned)

    def match(self, namespace: Namespace, tokens: Tokens) -> Match:
        """Longest cached prefix of `tokens`, in whole pages; marks it used now."""
        node = self._root(namespace)
        found: list[Pages] = []
        now = next(self._clock)
        position = 0
        while True:
            node.last_used = now
            child = node.children.get(self._key(tokens, position))
            if child is None:
                break
            common = self._common(child, tokens, position)
            if common < len(child.tokens):
                child = self._split(child, common)
                child.last_used = now
                found.append(child.pages)
                node = child
                break
            found.append(child.pages)
            node, position = child, position + common
        return Match(np.concatenate(found) if found else _NO_PAGES, node)

    def insert(self, namespace: Namespace, tokens: Tokens, pages: Pages) -> int:
        """Hand over the KV of `tokens` (a whole number of pages).

        Returns:
            Pages of the prefix that were cached already: the caller keeps its own `pages[:n]`, the tree owns the rest.
        """
        assert len(tokens) == len(pages) * self.page_size
        if not self.enabled:
            return len(pages)
        cached, node = self.match(namespace, tokens)
        start = len(cached)
        if start < len(pages):
            rest = tokens[start * self.page_size :].copy()
            leaf = Node(parent=node, tokens=rest, pages=pages[start:].copy(), last_used=node.last_used)
            node.children[self._key(rest, 0)] = leaf
            self.evictable_pages += len(leaf.pages)
        return start

    def lock(self, node: Node) -> None:
        """Keep `node` and everything above it from eviction; every lock needs one `unlock`."""
        step: Node | None = node
        while step is not None:
            if step.locks == 0:
                self._move(step, to_locked=True)
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`."""
        step: Node | None = node
        while step is not None:
            assert step.locks > 0, "unlock without lock"
            step.locks -= 1
            if step.locks == 0:
                self._move(step, to_locked=False)
            step = step.parent

    def evict(self, num_pages: int) -> Pages:
        """Drop least recently used prefixes until `num_pages` pages are free or nothing can go; returns the pages.

        Namespaces left empty are forgotten: a `Match` must be locked before the next eviction.
        """
        freed = self._prune(self._roots.values(), num_pages)
        self._roots = {key: root for key, root in self._roots.items() if root.children or root.locks}
        return freed

    def drop(self, version_id: int) -> Pages:
        """Forget every prefix of a version that no request names any more; returns the pages.

        A sequence that has moved to another version may still use some: `sweep` returns those once it has ended.
        """
        gone = [key for key in self._roots if key.version_id == version_id]
        self._condemned += [self._roots.pop(key) for key in gone]
        return self.sweep()

    def sweep(self) -> Pages:
        """Pages of dropped versions that nobody uses any more."""
        if not self._condemned:
            return _NO_PAGES
        freed = self._prune(self._condemned, self.evictable_pages)
        self._condemned = [root for root in self._condemned if root.children]
        return freed

    def clear(self) -> Pages:
        """Drop everything that is not locked; returns the pages."""
        return self.evict(self.evictable_pages)

    def _root(self, namespace: Namespace) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(parent=None, tokens=_NO_TOKENS, pages=_NO_PAGES)
        return root

    def _prune(self, roots: Iterable[Node], num_pages: int) -> Pages:
        """Cut unlocked leaves, least recently used first, until `num_pages` pages are free or nothing can go."""
        heap = [(node.last_used, id(node), node) for node in _leaves(roots) if node.locks == 0]
        heapq.heapify(heap)
        freed: list[Pages] = []
        count = 0
        while heap and count < num_pages:
            _, _, node = heapq.heappop(heap)
            freed.append(node.pages)
            count += len(node.pages)
            parent = node.parent
            assert parent is not None
            del parent.children[self._key(node.tokens, 0)]
            if not parent.children and parent.locks == 0 and parent.parent is not None:
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        self.evictable_pages -= count
        return np.concatenate(freed) if freed else _NO_PAGES

    def _move(self, node: Node, to_locked: bool) -> None:
        count = len(node.pages) if to_locked else -len(node.pages)
        self.locked_pages += count
        self.evictable_pages -= count

    def _key(self, tokens: Tokens, start: int) -> bytes:
        """First page of the tokens from `start`; shorter than a page when too few are left, which matches no child."""
        return tokens[start : start + self.page_size].tobytes()

    def _common(self, node: Node, tokens: Tokens, start: int) -> int:
        """Tokens of `node` that equal `tokens[start:]`, rounded down to whole pages."""
        length = min(len(node.tokens), len(tokens) - start)
        different = np.flatnonzero(node.tokens[:length] != tokens[start : start + length])
        same = int(different[0]) if len(different) else length
        return same // self.page_size * self.page_size

    def _split(self, node: Node, length: int) -> Node:
        """Cut `node` after `length` tokens; returns the new upper half, which has the same locks."""
        pages = length // self.page_size
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.tokens[:length], node.pages[:pages], node.locks, node.last_used)
        parent.children[self._key(node.tokens, 0)] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[length:], node.pages[pages:]
        upper.children[self._key(node.tokens, 0)] = node
        return upper


def _leaves(roots: Iterable[Node]) -> list[Node]:
    leaves: list[Node] = []
    stack = list(roots)
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        if not node.children and node.parent is not None:
            leaves.append(node)
    return leaves
