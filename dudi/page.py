"""Pages: data/*.html.j2, each one file without scripts or requests, around data/page.css."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2


def page(name: str, filters: dict[str, Callable[..., Any]], **fields: Any) -> str:
    """The page of the template `name`, which is told the version; a field it lacks is an error."""
    from dudi import __version__

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dudi", "data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name).render(version=__version__, **fields)
