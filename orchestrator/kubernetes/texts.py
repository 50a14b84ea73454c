"""YAML as people read it, and as every reader reads it back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

# Line ends to YAML, and not to those who look at a text for a line end.
_ODD_ENDS = re.compile("[\r\x85\u2028\u2029]")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are, and nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if _ODD_ENDS.search(text) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def documents(trees: Iterable[Any]) -> str:
    """Trees as a YAML stream."""
    return yaml.dump_all(trees, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def document(tree: Any) -> str:
    """A tree as YAML."""
    return documents([tree])
