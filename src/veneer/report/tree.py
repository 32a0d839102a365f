"""A model's module tree for people, with repeated layers folded into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rich.text import Text
from rich.tree import Tree

from veneer.core.records import ModuleRecord


@dataclass
class _Node:
    """One module with its children in the model's order."""

    name: str
    module: ModuleRecord
    children: list[_Node] = field(default_factory=list)

    def shape(self) -> tuple[object, ...]:
        """Equal for modules that look the same, whatever their names are."""
        inside = tuple((child.name, child.shape()) for child in self.children)
        return (self.module.type_name, self.module.kind, self.module.shape, self.module.parameters, inside)


def module_tree(modules: Sequence[ModuleRecord]) -> Tree:
    """The tree of a model; neighbours that only differ in their number stand as one.

    Args:
        modules: the model itself first (with an empty path), then every module after its parent.
    """
    root = _Node("", modules[0])
    nodes = {"": root}
    for module in modules[1:]:
        parent, _, name = module.path.rpartition(".")
        nodes[module.path] = _Node(name, module)
        nodes[parent].children.append(nodes[module.path])
    tree = Tree(_label("", root, 1), guide_style="dim")
    _grow(tree, root)
    return tree


def _grow(tree: Tree, node: _Node) -> None:
    for _, group in groupby(node.children, key=lambda child: (child.name.isdigit() or child.name, child.shape())):
        alike = list(group)
        first = alike[0]
        name = first.name if len(alike) == 1 else f"{first.name}..{alike[-1].name}"
        _grow(tree.add(_label(name, first, len(alike))), first)


def _label(name: str, node: _Node, count: int) -> Text:
    module = node.module
    parts: list[tuple[str, str]] = [(f"{name} ", "bold")] if name else []
    parts.append((f"{count} x {module.type_name}" if count > 1 else module.type_name, "cyan"))
    if module.shape is not None:
        parts.append((f"  {module.shape[0]:,} x {module.shape[1]:,}", ""))
    if module.parameters:
        parts.append((f"  {short(module.parameters * count)}", "dim"))
    if module.kind is not None:
        parts.append((f"  {module.kind}", "green"))
    return Text.assemble(*parts)


def short(count: int) -> str:
    """A count in three digits.

    >>> short(134_515_008)
    '135M'
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
