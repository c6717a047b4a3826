"""The site: built without a warning, complete, and without anything from elsewhere."""

import dataclasses
import posixpath
import re
import sys
from html import unescape
from importlib import import_module
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import trl_diffusion
from trl_diffusion import data, evaluation, losses, rewards
from trl_diffusion.cli.arguments import ModelArguments, ScriptArguments
from trl_diffusion.trainer.base_config import DiffusionConfig, PreferenceConfig


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
OPTIONS = {
    "trainers/kto.html": (trl_diffusion.DiffusionKTOConfig,),
    "trainers/rpo.html": (trl_diffusion.DiffusionRPOConfig,),
    "trainers/dpo.html": (trl_diffusion.DiffusionDPOConfig,),
    "trainers/sft.html": (trl_diffusion.DiffusionSFTConfig,),
    "trainers/common.html": (DiffusionConfig, PreferenceConfig, ModelArguments, ScriptArguments),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The site as it is built, with an error where mkdocs or a plugin would warn."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """Page -> HTML."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}


def test_the_readme_is_the_first_page(site):
    assert "See it work" in site["index.html"]
    assert 'href="trainers/rpo.html"' in site["index.html"]
    assert 'src="docs/' not in site["index.html"]


@pytest.mark.parametrize("page", OPTIONS)
def test_options(site, page):
    for kind in OPTIONS[page]:
        for field in dataclasses.fields(kind):
            if field.name in kind.__annotations__:
                assert f"<td><code>{field.name}</code></td>" in site[page]


def test_every_public_name_is_in_the_reference(site):
    ids = {
        name.rpartition(".")[2]
        for page, html in site.items()
        if page.startswith("api/")
        for name in re.findall(r'id="(trl_diffusion\.[\w.]+)"', html)
    }
    public = {*trl_diffusion.__all__, *data.__all__, *evaluation.__all__}
    public |= {name for name in vars(losses) if name.endswith("_loss")}
    public |= {name for name in rewards.__all__ if name not in ("SCORERS", "Scorer", "scorer_names")}
    assert public <= ids


def test_no_link_is_dead(site, folder):
    """Links to files, and to anchors within pages; 404.html has the absolute links of a server."""
    for page, html in site.items():
        for link in re.findall(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", html):
            if page == "404.html" or re.match(r"\w+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            assert target in site or (not anchor and (folder / target).is_file()), f"{page}: {link}"
            assert not anchor or re.search(rf"\bid=\"{re.escape(anchor)}\"", site[target]), f"{page}: {link}"


def test_pages_that_files_cite_exist():
    folders = [ROOT / name for name in ("trl_diffusion", "examples", "tests", "docs")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".md", ".ipynb")
    ]
    for path in files:
        for cited in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text()):
            assert (ROOT / cited).is_file(), f"{path.relative_to(ROOT)} cites {cited}"


def test_every_recipe_is_shown(site):
    for recipe in (ROOT / "examples" / "recipes").glob("*.yaml"):
        assert f'href="recipes/{recipe.stem}.html"' in site["examples/index.html"]
        text = re.sub(r"<[^>]+>", "", site[f"examples/recipes/{recipe.stem}.html"])
        assert recipe.read_text().splitlines()[0] in unescape(text)


def test_docstrings_are_lists_and_links(site):
    html = site["api/losses.html"]
    assert re.search(r"<li>\s*(<p>)?<code>beta</code> \(<code>float</code>\):", html)
    assert re.search(r'<a [^>]*href="#trl_diffusion.losses.dpo_loss"[^>]*><code>dpo_loss</code></a>', html)
    for page, html in site.items():
        if page.startswith("api/"):
            assert not re.search(r"<p>(Args|Parameters|Returns|Raises):", html), page


def test_nothing_is_fetched_from_elsewhere(site):
    for page, html in site.items():
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^>]*>", html)
        assert not fetched, page


def test_docstrings_of_hugging_face_as_markdown():
    text = """\
One.

Args:
    > Group

    a (`int`), b (`int`):
        Both, see [`~x.f`] and [`g`].
    **rest: More.

End."""
    expected = """\
One.

**Args**

*Group*

- `a` (`int`), b (`int`):
    Both, see [`f`][x.y.f] and `g`.
- `**rest`: More.

End."""
    converted = import_module("docstrings").as_markdown(text, {"f": "x.y.f"})
    assert re.sub(r"\n\n+", "\n\n", converted) == expected
