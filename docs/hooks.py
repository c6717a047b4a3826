"""
What the site is made of beside the files of this folder (`hooks` of mkdocs.yml).

Pages from elsewhere in the repository are shown as they are, README.md as the first of them, and each recipe has a
page that shows its file. Links in all pages are those of the repository, so that they work there too, and are turned
into links of the site. `<!-- options: Class -->`
becomes the table of the options that a class adds to its parents.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")
RECIPE = re.compile(r"^(examples/recipes/\w+)\.yaml$")
OPTIONS = re.compile(r"^<!-- options: (\w+) -->$", re.MULTILINE)


# ---- Pages and links ------------------------------------------------------------------------------------------------


def place_on_site(path: str) -> str:
    """The page or file of the site that shows a file of the repository, both relative."""
    return MOVED.get(path) or RECIPE.sub(r"\1.md", path).removeprefix("docs/")


def place_in_repository(path: str) -> str:
    """The inverse of [`place_on_site`]."""
    moved = {site: path for path, site in MOVED.items()}
    return moved.get(path) or (path if path.startswith("examples/") else f"docs/{path}")


def on_files(files, config):
    examples = [path for kind in ("md", "png", "ipynb") for path in (ROOT / "examples").rglob(f"*.{kind}")]
    for path in (*MOVED, *sorted(path.relative_to(ROOT).as_posix() for path in examples)):
        files.append(File.generated(config, place_on_site(path), abs_src_path=str(ROOT / path)))
    for recipe in sorted((ROOT / "examples" / "recipes").glob("*.yaml")):
        page = f"# {recipe.stem}\n\n```yaml\n{recipe.read_text()}```\n"
        files.append(File.generated(config, place_on_site(recipe.relative_to(ROOT).as_posix()), content=page))
    return files


def on_page_markdown(markdown, page, config, files):
    page_folder = posixpath.dirname(page.file.src_uri)
    folder = posixpath.dirname(place_in_repository(page.file.src_uri))

    def on_site(link: re.Match) -> str:
        label, target, anchor = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
        place = place_on_site(target)
        if files.get_file_from_path(place) is not None:
            return f"[{label}]({posixpath.relpath(place, page_folder or '.')}{anchor})"
        # A file of the repository that is no page keeps its name; a link to nothing is left, and is reported.
        return label if (ROOT / target).exists() else link[0]

    markdown = OPTIONS.sub(lambda found: options_table(found[1]), markdown)
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(on_site, text) for text in parts[::2]]
    return "".join(parts)


# ---- Options --------------------------------------------------------------------------------------------------------


def options_table(name: str) -> str:
    """The fields that a class of options defines itself, with the help texts of the command line, from its source."""
    rows = []
    for node in class_named(name).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            of_field = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
            default = f"`{as_code(of_field['default'])}`" if "default" in of_field else "required"
            meaning = of_field["metadata"]["help"].replace("%%", "%").replace("|", r"\|")
            rows.append(f"| `{ast.unparse(node.target)}` | {in_words(node.annotation)} | {default} | {meaning} |")
    return "\n".join(["| option | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def class_named(name: str) -> ast.ClassDef:
    for path in (ROOT / "trl_diffusion").rglob("*.py"):
        source = path.read_text()
        if re.search(rf"^class {name}\b", source, re.MULTILINE):
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
            return next(node for node in classes if node.name == name)
    raise ValueError(f"Found no class {name}, whose options a page asks for.")


def as_code(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def in_words(annotation: ast.expr) -> str:
    """A type as a reader says it: the values of a `Literal`, `or` between those of a union."""
    if isinstance(annotation, ast.BinOp):
        return f"{in_words(annotation.left)} or {in_words(annotation.right)}"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return ", ".join(f"`{as_code(value)}`" for value in ast.literal_eval(annotation.slice))
    return f"`{ast.unparse(annotation)}`"
