"""What `--help` says of each setting: its value here, and the comment of the file that it stands in.

What a setting means and may hold is written once, in the configuration files; help shows that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from kvmerge.places import config_dir, files

_SETTING = re.compile(r"(?P<key>\w+):(?=\s|$)(?P<rest>.*)")
_COMMENT = re.compile(r"(?:^|\s)#\s*(.*)")
_GROUPS = ("model", "benchmark", "method", "executor")
_COLUMN = 34
"""Where comments begin, unless a value is longer."""


def described(config: DictConfig, chosen: Mapping[str, Any]) -> str:
    """Return a line a setting of a composed configuration, by section, with what its file says of it.

    Args:
        config: the composed configuration.
        chosen: choice of each configuration group.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    run = {key: value for key, value in plain.items() if key not in (*_GROUPS, "hydra")}
    lines = list(_lines(run, comments(config_dir() / "config.yaml")))
    for group in _GROUPS:
        name = str(chosen[group])
        own = {key: value for key, value in plain[group].items() if not key.startswith("_")}
        if not own:
            continue
        lines += ["", f"{group}.*, of {group}={name}:"]
        said = {key: text for path in files(group, name) for key, text in comments(path).items()}
        lines += _lines(own, said)
    return "\n".join(lines)


def comments(path: Path) -> dict[str, str]:
    """Return what a file says of its settings, those of the files that its `defaults` name before.

    A comment stands on the line of its setting, or on the lines above it. Of `a` inside `b` the key is
    `b.a`.
    """
    text = path.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    if path.name != "config.yaml":
        for base in yaml.safe_load(text).get("defaults", []):
            beside = path.with_name(f"{base}.yaml")
            found |= comments(beside) if beside.is_file() else {}
    above: list[str] = []
    section = ""
    for line in text.splitlines():
        setting = _SETTING.match(line.strip())
        inline = _COMMENT.search(line)
        if setting is None:
            above = [*above, inline[1]] if inline else []
            continue
        key = setting["key"]
        if not line.startswith(" "):
            section = key
        elif not line.startswith("   "):
            key = f"{section}.{key}"
        said = inline[1] if inline else " ".join(above)
        if said:
            found[key] = said
        above = []
    return found


def _lines(values: Mapping[str, Any], said: Mapping[str, str], within: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping) and value and "_target_" not in value:
            yield f"  {name}: {said[name]}" if name in said else f"  {name}:"
            yield from _lines(value, said, f"{name}.")
            continue
        if isinstance(value, Mapping) and value:
            value = "{...}"  # an object of its own, which no setting reaches into
        shown = f"  {name}: {_value(value)}"
        yield f"{shown:<{_COLUMN}}  # {said[name]}" if name in said else shown


def _value(value: Any) -> str:
    text = value if value == "{...}" else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return str(text).removesuffix("\n...\n").strip()
