"""The site: `python -m sphinx -W -b html -c docs . build/site`, from the repository's root.

The source folder is the repository itself, so a relative link means the same here and in a clone:
notebooks, figures and pages are read where they lie, and nothing is copied or executed.
"""

import inspect
import re
import tomllib
import unicodedata
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.logging import getLogger

from derkit.config import PRESETS, Config

ROOT = Path(__file__).resolve().parents[1]

project, author, project_copyright = "derkit", "the authors of derkit", "MIT licence"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/**.md", "notebooks/0*.ipynb",
                    "notebooks/solutions/0*.ipynb"]  # no notebook that somebody saves beside them

nb_execution_mode = "off"  # pages show the outputs that the notebooks are stored with
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3  # links to headings, by the names that a repository's pages give them

default_role = "py:obj"  # `name` in a docstring is a link wherever there is such a name
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme, html_title = "sphinx_book_theme", f"derkit {release}"
html_theme_options = dict(home_page_in_toc=True, show_toc_level=2, use_download_button=False,
                          use_fullscreen_button=False)
html_extra_path = ["static"]  # its index.html leads from the site's root to docs/index.html
html_math_renderer = "mathml"


def script(letter):
    """A capital in script: most browsers have it as a character, and not as a style of N."""
    try:
        return f"<mi>{unicodedata.lookup(f'MATHEMATICAL SCRIPT CAPITAL {letter[1]}')}</mi>"
    except KeyError:  # eight of them, such as L, are older than the others
        return f"<mi>{unicodedata.lookup(f'SCRIPT CAPITAL {letter[1]}')}</mi>"


def formula(translator, node):
    """A formula as MathML, which browsers draw themselves: no script and no network."""
    block = node.tagname == "math_block"
    found = convert(node.astext(), display="block" if block else "inline")
    if "\\" in found:
        getLogger(__name__).warning("unknown command in %s", node.astext(), location=node)
    found = re.sub('<mi mathvariant="script">([A-Z])</mi>', script, found)
    translator.body.append(f'<div class="math">{found}</div>' if block else found)
    raise SkipNode


def parameters(what, obj):
    """The names that a docstring may explain: parameters, and the fields of a class."""
    try:
        names = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):  # not every object can be called
        names = set()
    return names | set(getattr(obj, "__annotations__", ())) if what == "class" else names


def plain(text):
    """Text in which nothing but `names` and ``code`` is markup."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    parts[::2] = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def table(heads, rows):
    """The lines of a table; its last column is the meaning of the others."""
    out = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in [(*heads.split(), "meaning"), *rows]:
        out += [f"   {' ' if i else '*'} - {cell}" for i, cell in enumerate(row)]
    return [*out, ""]


def docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text, in which indented blocks keep their lines. A line that begins with
    the name of a parameter begins a paragraph. Configs get a table of their fields.
    """
    if str(getattr(obj, "__module__", "")).startswith("pydantic"):
        lines[:] = ["The fields as a plain dict, which JSON can hold."]
    known, out, block = parameters(what, obj), [], False
    for line in lines:
        indented = line.startswith(" ")
        if indented and not block and (not out or not out[-1]):
            block, out = True, [*out, "::", ""]
        if line and not indented:
            block = False
        if block:
            out.append(line)
            continue
        first = re.match(r"(\w+(?:, \w+)*): ", line)
        if first and known & set(first[1].split(", ")):
            out += ["", f"**{plain(first[1])}**: {plain(line[first.end() :])}"]
        else:
            out.append(plain(line.strip()))
    if name == "derkit.config":
        rows = [(f"``{preset}``", plain(found.about)) for preset, found in PRESETS.items()]
        out += ["", "Presets, the first argument of `TrainConfig.make`:", *table("preset", rows)]
    if what == "class" and issubclass(obj, Config) and obj is not Config:
        rows = [(f"``{field}``", f"``{info.default!r}``", plain(info.description))
                for field, info in obj.model_fields.items()]  # fmt: skip
        out += table("field default", rows)
    lines[:] = [*out, ""]


def signature(app, what, name, obj, options, arguments, returns):
    """A config has more fields than a line holds, and what pydantic takes is no matter of ours."""
    if what == "class" and issubclass(obj, Config):
        return "(**fields)", returns
    return ("()", "dict") if name.endswith("Config.as_dict") else None


def skip(app, what, name, obj, skipped, options):
    """What pydantic adds to a config, and the fields of named tuples, which have no text."""
    text = str(getattr(obj, "__doc__", ""))
    return True if name.startswith("model_") or text.startswith("Alias for field") else None


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
