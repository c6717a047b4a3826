"""
Docstrings in the style of Hugging Face, as Markdown: an extension of griffe, which reads the sources for
mkdocstrings.

Their sections are not those of any style that griffe parses: types stand in parentheses with the default in words, and
`> Parameters that control the data` groups the parameters of a configuration.
"""

import re
from pathlib import Path

import griffe


PAGES = Path(__file__).parent / "api"
TITLES = {"Args:", "Parameters:", "Attributes:", "Returns:", "Raises:", "Example:"}
LISTS = TITLES - {"Returns:", "Example:"}
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\(|\[)")
ITEM = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?=:| \()")


def as_markdown(docstring: str, places: dict[str, str]) -> str:
    """
    The docstring with lists in the place of sections, and links in the place of names in brackets.

    Args:
        docstring (`str`): As griffe has it, without common indentation.
        places (`dict[str, str]`): Path of each documented object by its name.
    """
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        indented = line.startswith("    ")
        if line in TITLES:
            section = line
            lines += ["", f"**{line.removesuffix(':')}**", ""]
            continue
        if line and not indented:
            section = ""
        if section not in LISTS or not indented:
            lines.append(line.removeprefix("    ") if section == "Returns:" else line)
        elif line.startswith("    > "):
            lines += ["", f"*{line.removeprefix('    > ')}*", ""]
        elif line.startswith("     "):  # goes on
            lines.append("    " + line.strip())
        else:
            lines.append("- " + ITEM.sub(r"`\1`", line.strip(), count=1))
    return REFERENCE.sub(lambda name: link(name[1], name[2], places), "\n".join(lines))


def link(short: str, name: str, places: dict[str, str]) -> str:
    last = name.rpartition(".")[2]
    shown = last if short else name
    return f"[`{shown}`][{places[last]}]" if last in places else f"`{shown}`"


class HuggingFaceDocstrings(griffe.Extension):
    """Turns every docstring of the package into Markdown, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        directives = [re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE) for page in PAGES.glob("*.md")]
        places = {path.rpartition(".")[2]: path for paths in directives for path in paths}
        self._convert(pkg, places)

    def _convert(self, parent: griffe.Object, places: dict[str, str]) -> None:
        for child in parent.members.values():
            if child.is_alias:
                continue
            if child.docstring is not None:
                child.docstring.value = as_markdown(child.docstring.value, places)
            self._convert(child, places)
