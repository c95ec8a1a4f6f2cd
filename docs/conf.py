"""The documentation site: `make docs` builds it, strictly and without the network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import kl_gpu

project = "kl_gpu"
copyright = "the kl_gpu authors, Apache-2.0"
version = release = kl_gpu.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# A link to something that does not exist, or an argument that a docstring misspells, ends the build.
nitpicky = True
nitpick_ignore_regex = [
    # Types of other projects: the build asks no server for their inventories.
    (r"py:.*", r"(torch|Tensor|nn|optional|float|int|str|bool|dict|list|tuple|Any|Iterable)\b.*"),
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
# Docstrings write code and shapes between single backticks.
default_role = "literal"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "kl_gpu"
html_static_path = ["_static"]
html_css_files = ["kl_gpu.css"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b57a4", "color-brand-content": "#0b57a4"},
    "dark_css_variables": {"color-brand-primary": "#7ab7f0", "color-brand-content": "#7ab7f0"},
}
