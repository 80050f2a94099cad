"""Reads a training config: YAML with ``defaults:``, overrides in Hydra's form, every key and type checked."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvrouter.grpo.schema import ONLY_VALUE, MasterConfig

T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> MasterConfig:
    """The config of a YAML file, with overrides as a command line gives them.

    ``defaults: other.yaml`` (or a list of files; paths are relative to the file they stand in) comes first, the file
    itself over it, the overrides over both: ``key=value``; ``++key=value``, the same; ``+key=value``, only where the
    files do not set the key; ``~key``, as if the files did not set it.  ``${other.key}`` stands for another key's
    value, ``${mul:a,b}`` for a product.

    Raises ValueError, naming the key, for one that is unknown, of the wrong type or not supported.
    """
    if not OmegaConf.has_resolver("mul"):
        OmegaConf.register_resolver("mul", lambda a, b: a * b)
    tree = _load(Path(path), ())
    for override in overrides:
        tree = _override(tree, override)
    return config_from(tree)


def config_from(tree: DictConfig | Mapping[str, Any]) -> MasterConfig:
    """The config that a tree of keys holds, defaults filled in; raises ValueError as ``load_config`` does."""
    try:
        whole = OmegaConf.to_container(
            tree if isinstance(tree, DictConfig) else OmegaConf.create(dict(tree)), resolve=True
        )
    except OmegaConfBaseException as error:
        raise ValueError(f"the config cannot be resolved: {error}") from None
    assert isinstance(whole, dict)
    named = {str(name): value for name, value in whole.items()}
    _drop_what_is_off(named)
    return _built(MasterConfig, named, "")


# --- files and overrides ---


def _load(path: Path, under_way: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in under_way:
        raise ValueError(f"defaults go in a circle: {' -> '.join(p.name for p in (*under_way, path))}")
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        named_by = f" (named by defaults in {under_way[-1]})" if under_way else ""
        raise ValueError(f"there is no config file {path}{named_by}") from None
    except Exception as error:  # the YAML parser has many
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} must hold keys with values")
    defaults = tree.pop("defaults", [])
    names = [defaults] if isinstance(defaults, str) else list(defaults)
    bases = [_load(path.parent / name, (*under_way, path)) for name in names]
    merged = OmegaConf.merge(*bases, tree)
    assert isinstance(merged, DictConfig)
    return merged


_ABSENT = object()


def _override(tree: DictConfig, override: str) -> DictConfig:
    prefix = next((sign for sign in ("++", "+", "~") if override.startswith(sign)), "")
    key, equals, value = override[len(prefix) :].partition("=")
    if not key or (prefix != "~" and not equals):
        raise ValueError(f"override {override!r} must be key=value, +key=value, ++key=value or ~key")
    present = OmegaConf.select(tree, key, default=_ABSENT, throw_on_missing=False) is not _ABSENT
    if prefix == "~":
        if not present:
            raise ValueError(f"override {override!r}: the config does not set {key}")
        parent, _, name = key.rpartition(".")
        del (OmegaConf.select(tree, parent) if parent else tree)[name]
        return tree
    if prefix == "+" and present:
        raise ValueError(f"override {override!r}: the config sets {key} already: use {key}={value}")
    try:
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{key}={value}"]))
    except Exception as error:  # OmegaConf's errors, and the YAML parser's
        raise ValueError(f"override {override!r}: {error}") from None
    assert isinstance(merged, DictConfig)
    return merged


# --- checks ---


def _drop_what_is_off(tree: dict[str, Any]) -> None:
    """Removes keys that may have one value only; raises ValueError for another value."""
    for key, only in ONLY_VALUE.items():
        *parents, name = key.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name not in node:
            continue
        if node[name] != only:
            hint = ""
            if key == "policy.generation.colocated.enabled":
                hint = " (the router needs engines of their own, too)"
            shown = "null" if only is None else str(only).lower()
            raise ValueError(f"{key}: {node[name]!r} is not supported yet: set {key}={shown}{hint}")
        del node[name]
        if parents and not node:
            _remove_empty(tree, parents)


def _remove_empty(tree: dict[str, Any], path: Sequence[str]) -> None:
    node = tree
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]


def _built(cls: type[T], tree: Any, path: str) -> T:
    """An instance of a dataclass of the schema."""
    values = _checked_keys(cls, tree, path)
    hints = get_type_hints(cls)
    schemas: dict[str, Any] = {item.name: item.metadata.get("schema") for item in fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        key = f"{path}{name}"
        schema = schemas[name]
        if schema is not None:
            # A part of which only the given keys matter: checked against its schema, and kept as it is.
            _built(schema, value, f"{key}.")
            arguments[name] = value
        else:
            arguments[name] = _checked_value(hints[name], value, key)
    return cls(**arguments)


def _checked_keys(cls: type[Any], tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{path[:-1]} must hold keys with values, not {tree!r}")
    known = [item.name for item in fields(cls)]
    for name in tree:
        if name not in known:
            raise ValueError(f"unknown key {path}{name}: {_hint(str(name), known, path)}")
    return tree


def _hint(name: str, known: Sequence[str], path: str) -> str:
    """The nearest key: one beside it, or else one of that name elsewhere."""
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"did you mean {path}{near[0]}?"
    everywhere = {key.rpartition(".")[2]: key for key in _all_keys(MasterConfig)}
    near = difflib.get_close_matches(name, everywhere, 1)
    return f"did you mean {everywhere[near[0]]}?" if near else f"{path[:-1] or 'the config'} has {', '.join(known)}"


def _all_keys(cls: type[Any], path: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        key = f"{path}{item.name}"
        yield key
        inner = item.metadata.get("schema") or hints[item.name]
        if is_dataclass(inner):
            assert isinstance(inner, type)
            yield from _all_keys(inner, f"{key}.")


def _checked_value(  # noqa: PLR0911 -- a return a kind of type
    kind: Any, value: Any, key: str
) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = [one for one in get_args(kind) if one is not type(None)]
        origin = get_origin(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _built(kind, value, f"{key}.")
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{key} must be one of {', '.join(map(repr, get_args(kind)))}, not {value!r}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{key} must be a list, not {value!r}")
        return [_checked_value(get_args(kind)[0], one, f"{key}[{index}]") for index, one in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key} must hold keys with values, not {value!r}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} must be of type {kind.__name__}, not {value!r} ({type(value).__name__})")
    return value
