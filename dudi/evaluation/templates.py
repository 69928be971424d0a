"""Templates and expressions of tasks: jinja2 in a sandbox; a field that a row lacks is an error."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _written(value: Any) -> Any:
    """What is put into a text: jinja2 would write a null as None."""
    if value is None:
        raise ValueError("a field that it writes is null")
    return value


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=_written,
    )


@lru_cache(maxsize=256)
def _template(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=256)
def _expression(source: str) -> Any:
    return _environment().compile_expression(source, undefined_to_none=False)


def check_template(source: str) -> None:
    try:
        _template(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"must be valid jinja2: line {error.lineno}: {error.message}, got {source!r}"
        ) from None


def check_expression(source: str) -> None:
    try:
        _expression(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"must be an expression of jinja2: {error.message}, got {source!r}"
        ) from None


def rendered(place: str, source: str, fields: Mapping[str, Any]) -> str:
    """The template's text for a row; ValueError names `place`."""
    try:
        return _template(source).render(fields)
    except Exception as error:  # whatever a filter or an expression in a template raises
        raise _failed(place, error, fields) from None


def evaluated(place: str, source: str, fields: Mapping[str, Any]) -> Any:
    """The expression's value for a row."""
    try:
        value = _expression(source)(**fields)
    except Exception as error:
        raise _failed(place, error, fields) from None
    if isinstance(value, jinja2.Undefined):
        has = ", ".join(sorted(fields))
        raise ValueError(f"{place} {source!r} is not in the row, which has {has}")
    return value


def _failed(place: str, error: Exception, fields: Mapping[str, Any]) -> ValueError:
    if isinstance(error, jinja2.UndefinedError):
        has = ", ".join(sorted(fields))
        return ValueError(f"{place} uses an unknown field: {error.message}; the row has {has}")
    return ValueError(f"{place} failed: {type(error).__name__}: {error}")
