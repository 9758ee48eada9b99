"""YAML files to dataclasses. Errors name the file, the key and the value, and come before anything is built."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


class SettingsError(ValueError):
    """A setting cannot be used."""

    def __init__(self, file: str | Path, key: str, value: Any, problem: str):
        super().__init__(f"{file}: `{key}` is {value!r}: {problem}")


def read(file: str | Path, kind: type) -> Any:
    """A dataclass of this kind from a YAML file."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    return build(kind, values, file)


def build(kind: type, values: Any, file: str | Path, key: str = "") -> Any:
    """A dataclass from a dictionary. `key` is where the dictionary stands in the file."""
    if not isinstance(values, dict):
        raise SettingsError(file, key or "the file", values, "expected keys and values.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name, value in values.items():
        if name not in fields:
            raise SettingsError(
                file, f"{prefix}{name}", value, f"this key is unknown. Known are: {', '.join(fields)}."
            )
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise SettingsError(file, f"{prefix}{name}", None, "this key is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, file, f"{prefix}{name}") for name, value in values.items()})


def check_least(file: str | Path, values: Any, names: Iterable[str], least: int, prefix: str = "") -> None:
    """Refuse settings of a dataclass that are below `least`; those that are None are left alone."""
    for name in names:
        if (value := getattr(values, name)) is not None and value < least:
            raise SettingsError(file, f"{prefix}{name}", value, f"expected {least} or more.")


def _convert(hint: Any, value: Any, file: str | Path, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only "or None" is used
        if value is None:
            return None
        return _convert(next(one for one in arguments if one is not type(None)), value, file, key)
    if origin is typing.Literal:
        if value not in arguments:
            raise SettingsError(file, key, value, f"expected one of {', '.join(map(str, arguments))}.")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise SettingsError(file, key, value, "expected a list.")
        return [_convert(arguments[0], item, file, f"{key}[{index}]") for index, item in enumerate(value)]
    if dataclasses.is_dataclass(hint):
        return build(hint, value, file, key)
    if hint is float:
        try:
            number = float(value if not isinstance(value, bool) else "")  # YAML takes 1e-4 for a text
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SettingsError(file, key, value, "expected a number.")
        return number
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        names = {int: "a whole number", str: "a text", bool: "true or false"}
        raise SettingsError(file, key, value, f"expected {names[hint]}.")
    return value
