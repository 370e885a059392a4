"""The YAML file of `peft-arrow build`: the same names as on the command line."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


# Other names of options.
ALIASES = {"out": "output"}
# Sections of the YAML file with fields of TRL's and PEFT's own configs.
SECTIONS = ("sft_config", "lora_config")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def with_config(arguments: argparse.Namespace, add_arguments: Any) -> tuple[argparse.Namespace, dict[str, dict]]:
    """The options with those of `--config` where they were not given, and the sections of the file.

    Args:
        arguments (`argparse.Namespace`): as parsed.
        add_arguments (`Callable`): what adds the command's options to a parser.

    Raises:
        ValueError: the file is no YAML mapping, or holds an unknown key or a value of a wrong kind.
    """
    merged, path = argparse.Namespace(**vars(arguments)), getattr(arguments, "config", None)
    sections: dict[str, dict] = {name: {} for name in SECTIONS}
    if path is None:
        return merged, sections
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config {path!r} is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"config {path!r} holds no mapping of option names to values.")
    known = sorted((set(vars(arguments)) - {"command", "config"}) | set(SECTIONS))
    words = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            raise ValueError(f"config {path!r} holds {key!r}, which is unknown; allowed are {known}.")
        if name in SECTIONS:
            if not isinstance(value, Mapping):
                raise ValueError(f"config {path!r}: {key} must be a mapping.")
            sections[name] = dict(value)
        elif value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *words_of(value)]
    parser = _Parser(prog=str(path), add_help=False)
    add_arguments(parser)
    try:
        parsed = parser.parse_args(words)
    except ValueError as error:
        raise ValueError(f"config {path!r}: {error}") from error
    for name, value in vars(parsed).items():
        if getattr(merged, name) is None:
            setattr(merged, name, value)
    return merged, sections


def words_of(value: Any) -> list[str]:
    """A value as command-line words; a flag has none."""
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
