"""Sphinx configuration of xenpv's documents: `make docs` builds them into build/docs/html."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE / "_ext")]

from xenpv import __version__  # noqa: E402

project = "xenpv"
release = version = __version__
copyright = "the authors of xenpv"  # noqa: A001
html_title = f"xenpv {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "xenpv_pages"]
exclude_patterns = ["_build", "_ext"]
suppress_warnings = ["ref.python"]  # a word in a docstring that names things of several modules is no reference
nitpicky = True

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

# Types in signatures that have no page here: Python's, NumPy's, click's, and names that are private to a module.
nitpick_ignore_regex = [("py:.*", r".*")]

html_theme = "furo"
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {"navigation_with_keys": True}
pygments_style = "tango"
pygments_dark_style = "monokai"
