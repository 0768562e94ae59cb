"""The site of the documentation; `make docs` builds it into output/docs."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "docs")]

from config_keys import write_page  # noqa: E402

import sssd  # noqa: E402  (before Detectron2: it applies the compatibility layer)

project = "sssd"
author = "the sssd authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "sssd"
html_show_copyright = False
exclude_patterns = ["examples"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# What a GPU needs.
autodoc_mock_imports = ["triton"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "show-inheritance": True}


def generate(app: Sphinx) -> None:
    """The page that follows from the code."""
    pages = Path(app.srcdir) / "generated"
    pages.mkdir(exist_ok=True)
    write_page(Path(sssd.__file__).parent / "config.py", pages / "config_keys.md")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", generate)
