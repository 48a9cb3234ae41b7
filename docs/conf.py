"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

from importlib.metadata import version as version_of

project = "si_jax"
author = "The si_jax authors"
copyright = author
version = release = version_of("si_jax")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",  # pages need no network, built or read
]
exclude_patterns = ["_build"]
nitpicky = True
# Types of other packages, whose inventories would have to be downloaded.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jnp|optax|np|numpy|flax|matplotlib|Mapping|collections)(\..*)?"),
    (
        "py:.*",
        r"(Array|ArrayLike|ArrayTree|Any|Figure|PyTree|EmptyState|optional|Callable)",
    ),
    ("py:.*", r"(.*\.)?_[A-Z]\w*"),
    ("py:.*", r"orbax.*|os\.PathLike|pathlib.*|si_jax\.train\.AnyExamples"),
]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types and shapes
napoleon_google_docstring = True
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "si_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
