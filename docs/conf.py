"""The site: `python -m sphinx -W -b html docs build/site`. Nothing is fetched while it is built."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also for the pages that are executed
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the kernel warns of frozen modules

import jaxnorm  # noqa: E402 (the platform is chosen before)

project = "jaxnorm"
author = "the jaxnorm authors"
copyright = author
version = release = jaxnorm.__version__

repository_url = ""
"""Where the repository is shown, as on `https://github.com`; see `_ext/repository_links.py`."""

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "gallery",
    "generated_toctrees",
    "name_links",
    "reference",
    "repository_links",
]
exclude_patterns = ["_ext", "_static", "**.ipynb_checkpoints"]
nitpicky = True

# Pages: executed ones say so in their front matter (`file_format: mystnb`).
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "site_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# The reference.
default_role = "name"
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # arguments that share a text stay together
napoleon_custom_sections = ["Numerics", "Source", "Differs"]

# Looks.
html_theme = "furo"
html_title = "jaxnorm"
html_static_path = ["_static"]
html_css_files = ["jaxnorm.css"]
html_favicon = "_static/mark.svg"
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_logo": "wordmark_light.svg",
    "dark_logo": "wordmark_dark.svg",
    "sidebar_hide_name": True,
    "light_css_variables": {"color-brand-primary": "#1b5e8a", "color-brand-content": "#1b5e8a"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0"},
}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
