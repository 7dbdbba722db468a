"""Render the pages' templates by Jinja2: every value is escaped unless it is Markup."""
import os
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'templates')
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,           # a line with a statement alone leaves no empty line
)


def render(name: str, **values: Any) -> Markup:
    """Render the template file `name` with `values`."""
    return Markup(ENVIRONMENT.get_template(name).render(values))
