"""YAML files and `--set` settings -> the configuration, with errors that name the key."""

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from medseg_diff.config import Config
from medseg_diff.errors import UserError, reason

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
"""What safe_load raises: the latter two for impossible dates and huge numbers, and for brackets without end."""


def load_config(path: Path, settings: Iterable[str] = ()) -> Config:
    """Reads a YAML file and lays `KEY=VALUE` settings over it. Raises UserError naming the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, reason(error), "Name a readable YAML file, such as configs/quickstart.yaml.") from error
    try:
        content = yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise UserError(path, " ".join(str(error).split()), "Write plain YAML: no tags, two spaces a level.") from error
    if not isinstance(content, dict):
        raise UserError(path, "holds no mapping of keys", "Start from configs/quickstart.yaml.")
    for setting in settings:
        _lay_over(content, setting)
    return parse_config(content, path)


def parse_config(content: Any, where: str | Path) -> Config:
    """Validates plain values. Raises UserError that names every wrong key."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        problems = [_problem(dict(found)) for found in error.errors()]
        raise UserError(where, "; ".join(problems), "Mend the configuration or the --set that gave it.") from error


def _lay_over(content: dict[str, Any], setting: str) -> None:
    key, separator, value = setting.partition("=")
    if not separator or not key:
        raise UserError(f"--set {setting}", "is not KEY=VALUE", "Write for instance --set train.steps=500.")
    *sections, leaf = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {setting}", f"{section} is no section", "Write section.key=value.")
    try:
        content[leaf] = yaml.safe_load(value)
    except YAML_ERRORS as error:
        raise UserError(f"--set {setting}", "the value is no YAML", "Quote it, or write [1, 2] for a list.") from error


def _problem(found: dict[str, Any]) -> str:
    key = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        return _unknown(key)
    message = found["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if found["type"] == "missing":
        return f"{key}: {message}"
    return f"{key}: {message} (it is {shorten(reprlib.repr(found['input']), 100)})"


def _unknown(key: str) -> str:
    """What may have been meant: a key that looks alike, in the same section or in another."""
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in _keys(Config)}
    beside = {known: own for known, own in names.items() if known.rpartition(".")[0] == section}
    for candidates in (beside, names):
        close = difflib.get_close_matches(name, candidates.values(), n=1)
        if close:
            meant = [known for known, own in candidates.items() if own in close]
            return f"{key}: unknown key, did you mean {' or '.join(meant)}?"
    return f"{key}: unknown key (there are {', '.join(beside)})"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
