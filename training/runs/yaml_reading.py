"""YAML as users write it: what is ambiguous or broken is refused with the line where it stands."""

from pathlib import Path
from typing import Any

import yaml

from peft_psr.text import read_text


_MERGE = "tag:yaml.org,2002:merge"


class _KeyComesTwice(ValueError):
    """Its message begins with the line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which alone would take the last of two equal keys without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if key.value in lines:
                raise _KeyComesTwice(
                    f"line {key.start_mark.line + 1}: the key {key.value!r} stands in line {lines[key.value]} too; "
                    "leave one of the two out."
                )
            lines[key.value] = key.start_mark.line + 1
        return node


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; `ValueError`, naming `where` and the line, if it is no YAML or a key comes twice."""
    try:
        return yaml.load(text, _Loader)
    except _KeyComesTwice as error:
        raise ValueError(f"{where}, {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {_in_a_line(error)}") from error
    except ValueError as error:  # a date that there is not, for one
        raise ValueError(f"{where} holds a value that YAML can't read: {error}. Put it in quotes.") from error


def _in_a_line(error: yaml.YAMLError) -> str:
    """What is wrong and in which line; PyYAML says so in several."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return " ".join(str(error).split())
    tab = ", a tab: YAML is indented with spaces" if "'\\t'" in str(error.problem) else ""
    return f"line {mark.line + 1}: {error.problem or error.context}{tab}"


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; raises as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path), str(path))
