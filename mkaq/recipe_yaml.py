"""YAML as a recipe may hold it: plain data without aliases, and errors that name the place."""

from typing import Any

import yaml


class NoValueError(yaml.MarkedYAMLError):
    """A value is none of the type that it has by its form (`2001-99-99`) or by its tag (`!!bool maybe`)."""


class Loader(yaml.SafeLoader):
    """Reads plain data; every fault is a `yaml.YAMLError`."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; an alias is refused."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = "aliases (*name) have no place in a recipe: write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # no message could tell one of more than 4,300 digits, which 0xfff... may have
        except (ArithmeticError, AttributeError, LookupError, ValueError):  # as the types of PyYAML fail
            kind = node.tag.rpartition(":")[2]
            what = f"{str(node.value)[:40]!r} is no value of the type {kind}"
            raise NoValueError(problem=what, problem_mark=node.start_mark) from None
        return value
