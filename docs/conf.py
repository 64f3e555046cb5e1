"""Settings of the documentation's generator, Sphinx; ``tools/docs`` runs it."""

from importlib.metadata import version as version_of

project = "onnxprune"
author = "the onnxprune developers"
project_copyright = author
version = release = version_of("onnxprune")

extensions = ["myst_parser", "sphinx_click", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_typehints = "description"
napoleon_google_docstring = False
smartquotes = False  # two hyphens are an option
exclude_patterns = ["_build"]
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = "onnxprune"


def as_text(app: object, ctx: object, lines: list[str]) -> None:
    """Help texts are no reStructuredText: a star in them is a star."""
    lines[:] = [line.replace("*", "\\*") for line in lines]


def setup(app: object) -> None:
    """Tell sphinx-click."""
    app.connect("sphinx-click-process-description", as_text)  # type: ignore[attr-defined]
