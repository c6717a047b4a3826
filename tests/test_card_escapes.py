"""Names, prompts and paths stay text in the model card and in the reports, whatever characters they hold."""

import ast
import html.parser
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.conftest import picture
from tests.test_methods import LORA, trainer_of
from trl_diffusion import card as card_module
from trl_diffusion import markdown
from trl_diffusion.evaluation.report import Evaluation, as_html, as_markdown
from trl_diffusion.evaluation.statistics import compare


TAGS = {"<details>", "</details>", "<summary>", "</summary>", "<Gallery />", "<code>", "</code>"}
NASTY = [
    "<script>alert(1)</script>",
    "</details><img src=x onerror=alert(1)>",
    "a\n\n# Another title\n\n---\nlicense: mit\n---\n",
    "a | b \\| c \\",
    "`a` ``` \n```\n<b>",
    "[click](javascript:alert(1)) ![x](http://x.org/y.png) <http://x.org>",
    "quote \" and ' and \\",
    "*bold* &lt;b&gt; &amp; \u2028 \x85 \x00 \udc80 \U0001f600",
    "---",
    "- item: [1, 2] # no",
    "\r\n| a | b |\r\n",
    "<!-- --> <![CDATA[ ]]> <?php ?>",
    "",
]
nasty = st.sampled_from(NASTY) | st.lists(
    st.sampled_from([*"<>|`*_[]()\\&#!-\"'\n\r :~$a1", "```", "---", "</details>", "javascript:", "\u2028", "<b>"]),
    max_size=12,
).map("".join)


def parsed(text: str) -> list:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


def inline(tokens: list) -> list:
    return [child for token in tokens for child in (token.children or [])]


def shown(token) -> str:
    """The text of a cell or title, as a reader sees it."""
    return "".join(
        " " if child.type.endswith("break") else child.content
        for child in token.children
        if child.type != "html_inline"
    )


def assert_only_known_tags(tokens: list) -> None:
    for token in (*tokens, *inline(tokens)):
        if token.type in ("html_block", "html_inline"):
            assert set(re.findall(r"<[^>]*>", token.content)) <= TAGS, token.content
            assert token.content.count("<") == len(re.findall(r"<[^>]*>", token.content))


@given(nasty)
@example(NASTY[7])
def test_text_is_shown_as_it_is(value):
    expected = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", value).replace("\udc80", "\ufffd").split())
    for block, kind in (
        (f"# {markdown.text(value)}", "inline"),
        (f"| a |\n|---|\n| {markdown.text(value)} |", "inline"),
    ):
        tokens = parsed(block)
        cells = [token for token in tokens if token.type == kind]
        assert shown(cells[-1]) == expected
        assert {child.type for child in inline(tokens)} <= {"text", "text_special"}
    cell = parsed(f"| a |\n|---|\n| {markdown.code(value)} |")
    assert_only_known_tags(cell)
    assert shown([token for token in cell if token.type == "inline"][-1]) == expected
    (block,) = parsed(markdown.fence("yaml", value.replace("\r", "\n").replace("\x00", "")))
    assert block.type == "fence"


@pytest.fixture(scope="module", params=["full", "adapter"])
def trainer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    trainer = trainer_of("dpo", folder, peft_config=LORA if request.param == "adapter" else None)
    (folder / "assets").mkdir()
    for name in (card_module.CURVES, card_module.BEFORE_AFTER):
        picture(0).save(folder / name)
    return trainer


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nasty, nasty, nasty, nasty)
def test_model_card(trainer, name, base, data, prompt):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "base_model_id", base)
        patch.setattr(trainer, "hub_model_id", None, raising=False)
        patch.setattr(trainer.args, "run_name", name)
        patch.setattr(trainer.args, "validation_prompts", [prompt])
        patch.setattr(trainer.args, "model_init_kwargs", {"revision": data})
        patch.setattr(trainer.state, "log_history", [{f"eval_score/{name}": 1.5, "loss": 0.5, prompt: 2.0}])
        patch.setattr(card_module, "samples", lambda trainer: [(prompt, {"after": Path("after-0.png")})])
        licence = {"license": "other", "license_name": name, "license_link": f"javascript://x.org/{data}"}
        patch.setattr(card_module, "base_license", lambda *args: licence)
        content = card_module.model_card(trainer, name or "model", data, tags=[prompt or "tag"]).content
    # The front matter ends where the card's begins, and holds what was given.
    front = re.match(r"---\n(.*?)\n---\n\n", content, re.DOTALL).group(1)
    meta, body = yaml.safe_load(front), ModelCard(content).text
    assert body.lstrip().startswith("# ")
    assert meta["license"] == "other"
    assert meta["widget"][0]["text"] == prompt
    assert (meta["model-index"][0]["name"], meta["license_name"]) == (name or "model", name)
    tokens = parsed(body)
    assert_only_known_tags(tokens)
    titles = [shown(tokens[i + 1]) for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert titles[1:] == ["How to load", "How it was trained", "Results", "Licence", "Citation"]
    links = {
        child.attrs.get("href", child.attrs.get("src"))
        for child in inline(tokens)
        if child.type in ("link_open", "image")
    }
    assert all(re.match(r"https://huggingface\.co/|assets/", target) for target in links), links
    # Tables have two columns, and no cell is a row of its own.
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            row = tokens[i + 1 : next(j for j in range(i, len(tokens)) if tokens[j].type == "tr_close")]
            assert sum(other.type in ("td_open", "th_open") for other in row) == 2
    fences = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in fences if token.info != "bash"] == ["python", "yaml", "bibtex"]
    code, *_ = fences
    strings = {node.value for node in ast.walk(ast.parse(code.content)) if isinstance(node, ast.Constant)}
    assert (name or "model") in strings
    assert yaml.safe_load(fences[-2].content)["validation_prompts"] == [prompt]
    for token in fences:
        if token.info == "bash":
            # Of Markdown's own: one kind of line break, and no zero bytes.
            stored = re.sub("\r\n?", "\n", name or "model").replace("\0", "\ufffd").encode(errors="replace").decode()
            assert shlex.split(token.content)[3] == stored


COMPARISON = compare([[1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]])


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attributes}


@settings(max_examples=40, deadline=None)
@given(nasty, nasty, nasty)
def test_reports(model, scorer, prompt):
    scores = {scorer: [[1.0, 2.0], [2.0, 1.0]]}
    evaluation = Evaluation(model, prompt, [prompt, "b"], [0, 1], scores, scores, {"scheduler": scorer})
    comparisons = {scorer: COMPARISON}
    tokens = parsed(as_markdown(evaluation, comparisons))
    assert not {token.type for token in (*tokens, *inline(tokens))} & {
        "html_block",
        "html_inline",
        "link_open",
        "image",
        "fence",
    }
    assert sum(token.type == "heading_open" for token in tokens) == 1
    assert sum(token.type == "tr_open" for token in tokens) == 2
    tags = Tags()
    tags.feed(as_html(evaluation, comparisons, lambda prompt, seed: (picture(0), picture(1))))
    assert tags.found <= set(
        "html head meta title style body h1 h2 p table tr th td section figure div span img figcaption".split()
    )
    assert tags.attributes <= {"lang", "charset", "http-equiv", "content", "name", "src", "alt"}
