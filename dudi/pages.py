"""Pages from templates in data/: values are escaped, a name that is not given is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2


def render_page(template: str, filters: dict[str, Callable[..., Any]], **values: Any) -> str:
    """The text of a page; `filters` are those of its template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dudi", "data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)
