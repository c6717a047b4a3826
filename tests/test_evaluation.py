"""Win rates and their statistics, prompt files, `trl-diffusion evaluate`, and the callbacks that score."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import picture
from tests.test_callbacks import make_trainer
from trl_diffusion import LogImagesCallback, WinRateCallback
from trl_diffusion.cli import COMMANDS, main
from trl_diffusion.evaluation import (
    Estimate,
    bootstrap_interval,
    compare,
    prompt_medians,
    read_prompts,
    sign_test,
    win_rate,
)
from trl_diffusion.evaluation import images as image_files
from trl_diffusion.evaluation.images import ImageFolder
from trl_diffusion.evaluation.report import (
    Evaluation,
    Pair,
    as_html,
    as_markdown,
    data_uri,
    pick_pairs,
    report_folder,
    verdict,
)
from trl_diffusion.evaluation.statistics import median_win_rate


PROMPTS = ["a cat", "a dog", 'two <b>boats</b> | "&"']


def brightness(images, prompts):
    return [float(np.asarray(image.convert("L"), dtype=float).mean()) for image in images]


# ---- Statistics -----------------------------------------------------------------------------------------------------


def test_win_rate():
    found = win_rate([3, 1, 2, 5], [1, 1, 4, 2])
    assert (found.rate, found.n) == (0.625, 4)
    # Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    z, p, n = 1.959963984540054, 0.625, 4
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-12)
    assert win_rate([1] * 10, [0] * 10).low == pytest.approx(10 / (10 + z**2))


@pytest.mark.parametrize(
    ("scores", "baseline", "words"),
    [
        ([1.0], [1.0, 2.0], "Found 1 scores and 2 baseline scores"),
        ([], [], "Found 0 scores"),
        ([math.nan], [1.0], "expected finite numbers"),
    ],
)
def test_win_rate_refuses(scores, baseline, words):
    with pytest.raises(ValueError, match=words):
        win_rate(scores, baseline)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (3, 3, 1), (8, 2, 2 * 56 / 1024)],
)
def test_sign_test(wins, losses, p):
    assert sign_test(wins, losses) == p
    assert sign_test(losses, wins) == p


@settings(deadline=None)
@given(wins=st.integers(0, 300), losses=st.integers(0, 300))
def test_sign_test_is_twice_the_binomial_tail(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert sign_test(wins, losses) == pytest.approx(min(1, 2 * tail), rel=1e-12)


def test_sign_test_of_many():
    """About the normal approximation with continuity correction."""
    z = (5150 - 5000 - 0.5) / 50
    assert sign_test(5150, 4850) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    with pytest.raises(ValueError, match="Found -1 wins"):
        sign_test(-1, 2)


def test_bootstrap_is_about_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    narrow = bootstrap_interval(values.tolist(), confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert narrow[1] - narrow[0] == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.05)
    assert bootstrap_interval(values.tolist()) == (low, high)
    assert bootstrap_interval(values.tolist(), seed=1) != (low, high)


def test_bootstrap_of_two_values():
    """Means of two draws from {0, 1}: 0, 1/2 and 1 with 1/4, 1/2 and 1/4."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        ([1.0], {}, "Found 1 prompts, expected at least 2"),
        ([1.0, 2.0], {"confidence": 1.0}, "`confidence` must be between 0 and 1, found 1.0"),
        ([1.0, 2.0], {"resamples": 0}, "`resamples` must be at least 1, found 0"),
    ],
)
def test_bootstrap_refuses(values, changes, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(values, **changes)


def test_compare():
    """Five prompts of three images, worked out by hand."""
    ours = [[1, 9, 2], [4, 4, 4], [5, 0, 0], [7, 8, 9], [3, 3, 3]]
    theirs = [[2, 1, 8], [4, 4, 4], [1, 1, 1], [1, 1, 1], [2, 9, 2]]
    found = compare(ours, theirs)
    assert (found.prompts, found.images_per_prompt) == (5, 3)
    assert found.mean == 62 / 15
    assert found.baseline_mean == 42 / 15
    assert found.difference.value == pytest.approx(20 / 15)
    # Medians 2, 4, 0, 8, 3 against 2, 4, 1, 1, 2.
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)
    assert found.win_rate.value == pytest.approx(3 / 5)
    assert found.p_value == 1.0
    # Pairs: 1 of 3; three ties; 1 of 3; 3 of 3; 2 of 3.
    assert found.pair_win_rate.value == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 + 2 / 3) / 5)
    assert tuple(found.win_rate)[1:] == bootstrap_interval([0.5, 0.5, 0, 1, 1])
    assert tuple(found.difference)[1:] == pytest.approx(bootstrap_interval([1 / 3, 0, 2 / 3, 7, -4 / 3]))


def test_prompt_medians():
    assert prompt_medians([[5, 1, 9, 2, 3], [1, 1, 1, 7, 7]]) == [3.0, 1.0]
    assert prompt_medians([[1, 2, 4, 9]]) == [3.0]


tables = st.tuples(st.integers(2, 6), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        *[
            st.lists(
                st.lists(st.integers(0, 4), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
            )
        ]
        * 2
    )
)


@settings(max_examples=50, deadline=None)
@given(tables)
def test_compare_is_antisymmetric_and_knows_only_order(scores):
    ours, theirs = scores
    found, swapped = (compare(a, b, resamples=50) for a, b in ((ours, theirs), (theirs, ours)))
    assert found.win_rate.value + swapped.win_rate.value == pytest.approx(1)
    assert found.pair_win_rate.value + swapped.pair_win_rate.value == pytest.approx(1)
    assert found.pair_win_rate.low + swapped.pair_win_rate.high == pytest.approx(1)
    assert found.difference.value == pytest.approx(-swapped.difference.value)
    assert (found.wins, found.ties, found.losses) == (swapped.losses, swapped.ties, swapped.wins)
    assert found.p_value == swapped.p_value
    for estimate in (found.win_rate, found.pair_win_rate, found.difference):
        assert estimate.low <= estimate.high
    stretched = compare(*[[[3 * x + 1 for x in row] for row in table] for table in scores], resamples=50)
    if len(ours[0]) % 2:  # the mean of two scores in the middle is no matter of order alone
        assert stretched.win_rate == found.win_rate
    assert stretched.pair_win_rate == found.pair_win_rate


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([[1.0, 2.0]] * 2, [[1.0]] * 2, r"Found scores of shape \(2, 2\) and \(2, 1\)"),
        ([[1.0]], [[1.0]], "Found 1 prompts, expected at least 2"),
        ([[1.0], [1.0, 2.0]], [[1.0]] * 2, r"Found rows of \[1, 2\] images in `scores`"),
        ([[1.0], [math.inf]], [[1.0]] * 2, "Found inf in `scores` for prompt 1"),
        ([], [], r"Found `scores` of shape \(0,\)"),
    ],
)
def test_compare_refuses(ours, theirs, words):
    with pytest.raises(ValueError, match=words):
        compare(ours, theirs)


# ---- Prompt files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.txt", "a cat\n\n  a dog \na cat\n"),
        ("anime.json", '["a cat", "a dog", "a cat"]'),  # HPSv2's benchmark
        ("test.json", '[{"prompt": "a cat", "image_path": []}, {"prompt": "a dog"}]'),  # HPSv2's test set
        ("styles.json", '{"anime": ["a cat"], "photo": ["a dog"]}'),
        ("rows.jsonl", '{"caption": "a cat"}\n{"caption": "a dog"}\n'),
        ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na dog\tAnimals\tBasic\t\n"),
        ("rows.csv", '\ufeffprompt,note\n"a cat",1\na dog,2\n'),
    ],
)
def test_read_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a cat", "a dog"]


def test_read_prompts_of_pickapic(tmp_path):
    """Its test split: `caption`, beside columns of image bytes that are not read."""
    frame = pd.DataFrame({"jpg_0": [b"x", b"y", b"z"], "caption": ["a cat", "a dog", "a cat"]})
    frame.to_parquet(tmp_path / "test_unique.parquet")
    assert read_prompts(tmp_path / "test_unique.parquet") == ["a cat", "a dog"]
    assert read_prompts("examples/emoji/data/prompts/held_out.parquet")[0] == "fox"


def test_read_prompts_of_a_named_column(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,long\na,a cat\nb,a dog\n")
    assert read_prompts(tmp_path / "rows.csv", "long") == ["a cat", "a dog"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_read_prompts_returns_what_was_written(tmp_path_factory, prompts):
    file = tmp_path_factory.getbasetemp() / "written.json"
    file.write_text(json.dumps(prompts), encoding="utf-8")
    assert read_prompts(file) == list(dict.fromkeys(prompts))


@pytest.mark.parametrize(
    ("name", "text", "column", "words"),
    [
        ("a.xlsx", "", None, "expected one that ends in one of ('.txt'"),
        ("a.txt", " \n\n", None, "Found no prompt in"),
        ("a.csv", "text\na cat\n", None, "Found the columns ['text']"),
        ("a.csv", "prompt\na cat\n", "text", "expected one of ['text']"),
        ("a.json", '{"prompts": "a cat"}', None, "Found a str in"),
        ("a.json", "[1]", None, "Found 1 in"),
    ],
)
def test_read_prompts_refuses(tmp_path, name, text, column, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_prompts(tmp_path / name, column)


def test_read_prompts_of_no_file(tmp_path):
    with pytest.raises(ValueError, match="Found no file"):
        read_prompts(tmp_path / "missing.txt")


# ---- Images on disk -------------------------------------------------------------------------------------------------


class Draws:
    """Counts the images that the pipeline draws, and stops it before the `stop`-th call."""

    def __init__(self, monkeypatch, stop: int | None = None):
        self.seen: list[tuple[str, int]] = []
        calls, sample_rows = 0, image_files.sample_rows

        def counted(pipeline, prompts, seeds, **kwargs):
            nonlocal calls
            if calls == stop:
                raise KeyboardInterrupt
            calls += 1
            self.seen += [(prompt, seed) for prompt in prompts for seed in seeds]
            return sample_rows(pipeline, prompts, seeds, **kwargs)

        monkeypatch.setattr(image_files, "sample_rows", counted)


def test_only_what_is_missing_is_drawn(sd, sd_folder, tmp_path, monkeypatch):
    draws = Draws(monkeypatch)
    folder = ImageFolder(tmp_path, sd_folder, {"num_inference_steps": 1})
    folder.draw(lambda: sd, PROMPTS[:2], [0, 1], 8, "", num_inference_steps=1)
    first = folder.path("a cat", 0).stat().st_mtime_ns
    assert draws.seen == [("a cat", 0), ("a cat", 1), ("a dog", 0), ("a dog", 1)]
    draws.seen.clear()
    again = ImageFolder(tmp_path, sd_folder, {"num_inference_steps": 1})
    again.draw(lambda: pytest.fail("nothing is missing"), PROMPTS[:2], [0, 1], 8, "", num_inference_steps=1)
    again.path("a dog", 1).unlink()
    again.draw(lambda: sd, PROMPTS, [1, 2], 8, "", num_inference_steps=1)
    assert draws.seen == [("a cat", 2), ("a dog", 1), ("a dog", 2), (PROMPTS[2], 1), (PROMPTS[2], 2)]
    assert folder.path("a cat", 0).stat().st_mtime_ns == first


def test_an_image_is_what_the_pipeline_draws(sd, sd_folder, tmp_path):
    folder = ImageFolder(tmp_path, sd_folder, {})
    folder.draw(lambda: sd, ["a cat"], [5, 6, 7], 2, "", num_inference_steps=2)  # in batches of 2 and 1
    sd.unet.eval()
    for seed in (5, 6, 7):
        image = sd("a cat", generator=torch.Generator().manual_seed(seed), num_inference_steps=2).images[0]
        np.testing.assert_allclose(np.asarray(folder.load("a cat", seed), int), np.asarray(image, int), atol=1)
    with Image.open(folder.path("a cat", 6)) as image:
        assert image.text == {"prompt": "a cat", "seed": "6"}


def test_other_settings_and_other_weights_get_other_folders(sd, sd_folder, tmp_path):
    folders = [ImageFolder(tmp_path, sd_folder, {"steps": steps}).folder for steps in (1, 2, 1)]
    assert folders[0] == folders[2] != folders[1]
    model = tmp_path / "model"
    sd.save_pretrained(model)
    before = ImageFolder(tmp_path, str(model), {}).folder
    (model / "report.html").write_text("what is not the model does not matter")
    assert ImageFolder(tmp_path, str(model), {}).folder == before
    with torch.no_grad():
        sd.unet.conv_in.weight += 1
    sd.unet.save_pretrained(model / "unet")
    assert ImageFolder(tmp_path, str(model), {}).folder != before
    record = json.loads((before / "settings.json").read_text())
    assert (record["model"], record["settings"]) == (str(model), {})


def test_an_adapter_depends_on_its_base(sd_folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    config = {"base_model_name_or_path": sd_folder}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    states = [image_files.model_state(str(adapter))]
    (adapter / "adapter_model.safetensors").write_bytes(b"22")
    states.append(image_files.model_state(str(adapter)))
    assert states[0] != states[1]
    assert states[0][1:] == states[1][1:] == [sd_folder, image_files.model_state(sd_folder)]
    with pytest.raises(ValueError, match=r"Found neither a model_index.json nor an adapter_config.json"):
        ImageFolder(tmp_path, str(tmp_path), {})


def test_a_kill_while_writing_leaves_no_image(sd, sd_folder, tmp_path, monkeypatch):
    folder = ImageFolder(tmp_path, sd_folder, {})

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.draw(lambda: sd, ["a cat"], [0], 1, "", num_inference_steps=1)
    assert not folder.path("a cat", 0).exists()
    assert folder.missing(["a cat"], [0]) == {"a cat": [0]}
    folder.draw(lambda: sd, ["a cat"], [0], 1, "", num_inference_steps=1)
    assert sorted(path.suffix for path in folder.folder.iterdir()) == [".json", ".png"]


# ---- The report -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a browser would load or follow, the pictures, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.references, self.text, self.tags = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        loading = {"src", "srcset", "href", "data", "action", "poster", "background", "style"}
        self.references += [value for name, value in attributes if name in loading]

    def handle_data(self, data):
        self.text += data

    def pictures(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) for uri in self.references]


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert all(re.match("data:image/(png|jpeg);base64,", reference) for reference in page.references)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    return page


def an_evaluation(**changes) -> Evaluation:
    found = Evaluation(
        model="policy|1",
        baseline="<base>",
        prompts=PROMPTS,
        seeds=[3, 4],
        scores={"mine": [[1, 2], [3, 3], [9, 0]]},
        baseline_scores={"mine": [[1, 1], [4, 5], [1, 1]]},
        settings={"num_inference_steps": 2},
    )
    return found._replace(**changes)


def test_pick_pairs():
    """Gains gain and losses lose, whatever the number that is asked for."""
    found = pick_pairs([[1, 2], [3, 3], [9, 0]], [[1, 1], [4, 5], [1, 1]], 2)
    assert found["largest gains"] == [Pair(2, 0), Pair(0, 1)]
    assert found["largest losses"] == [Pair(1, 1), Pair(2, 1)]
    assert len({pair.prompt for pair in found["random"]}) == 2
    everything = pick_pairs([[1, 2], [3, 3], [9, 0]], [[1, 1], [4, 5], [1, 1]], 9)
    assert everything["largest gains"] == found["largest gains"]
    assert everything["largest losses"] == found["largest losses"]
    assert len(everything["random"]) == 3
    assert pick_pairs([[1.0], [2.0]], [[1.0], [3.0]], 6)["largest gains"] == []


MANY = 20
VERDICTS = {
    "all prompts better": (
        [2.0] * MANY,
        [1.0] * MANY,
        r"^x: the policy scores higher than the baseline \(win rate 100",
    ),
    "most prompts worse": (
        [0.0] * 18 + [2.0] * 2,
        [1.0] * MANY,
        r"^x: the policy scores lower than the baseline \(win rate 10 %, 95 % interval [0-9.]+ % to 30.1 %\)\.$",
    ),
    "even": ([0.0, 2.0] * 10, [1.0] * MANY, r"^x: no clear difference \(win rate 50 %, .* which includes 50 %\)\.$"),
    "too few prompts": (
        [2.0] * 2,
        [1.0] * 2,
        r"^x: no clear difference \(win rate 100 %, 95 % interval 34.2 % to 100 %, which includes 50 %\)\.$",
    ),
    "a few large gains": (
        [0.9] * 7 + [12.0],
        [1.0] * 8,
        r"^x: the policy scores lower .*win rate 12.5 %.*; the mean difference of \+1.288 comes from larger gains "
        r"and not from more of them \(median difference -0.1\)\.$",
    ),
    "a few large losses": (
        [1.1] * 15 + [-20.0],
        [1.0] * 16,
        r"^x: the policy scores higher .*; the mean difference of -1.219 comes from larger losses",
    ),
    "ties": ([1.0] * MANY, [1.0] * MANY, r"^x: no clear difference \(win rate 50 %, .*50 %\)\.$"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_agrees_with_win_rate_and_interval(name):
    ours, theirs, expected = VERDICTS[name]
    scores = {"scores": {"x": [[s] for s in ours]}, "baseline_scores": {"x": [[s] for s in theirs]}}
    evaluation = an_evaluation(prompts=list(map(str, range(len(ours)))), seeds=[0], **scores)
    comparison = evaluation.comparisons()["x"]
    found = verdict("x", comparison, median_win_rate(evaluation.scores["x"], evaluation.baseline_scores["x"]))
    assert re.search(expected, found), found
    assert comparison.median_difference == pytest.approx(np.median(np.subtract(ours, theirs)))
    # The same sentence in the table's file and on the page, and the median beside the mean.
    table = as_markdown(evaluation, evaluation.comparisons())
    assert f"- {found}\n" in table
    assert f"], {comparison.median_difference:+.4g} |" in table
    page = as_html(evaluation, evaluation.comparisons(), lambda prompt, seed: (picture(0), picture(1)))
    assert f"<p>{html.escape(found)}</p>" in page


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=9))
def test_the_median_difference_never_contradicts_the_win_rate(pairs):
    found = compare([[a] for a, _ in pairs], [[b] for _, b in pairs], resamples=1)
    assert found.median_difference * (found.win_rate.value - 0.5) >= 0


def test_cards_show_the_difference_and_empty_lists_say_so():
    evaluation = an_evaluation(scores={"mine": [[2, 1]] * 3}, baseline_scores={"mine": [[1, 1]] * 3})
    page = Page(as_html(evaluation, evaluation.comparisons(), lambda prompt, seed: (picture(0), picture(1))))
    assert page.text.count("+1 · ") >= 3
    assert "mine: largest lossesNone." in page.text
    assert "mine: largest gainsNone." not in page.text


def test_html_holds_everything_and_escapes():
    evaluation = an_evaluation()
    asked = []

    def load_pair(prompt, seed):
        asked.append((prompt, seed))
        return picture(len(prompt), (200, 100)), picture(seed, (32, 32))

    page = assert_self_contained(as_html(evaluation, evaluation.comparisons(), load_pair, count=2))
    assert asked[:4] == [(PROMPTS[2], 3), ("a cat", 4), ("a dog", 4), (PROMPTS[2], 4)]
    assert '+8 · two <b>boats</b> | "&" · seed 3' in page.text
    assert len(page.references) == 2 * len(asked) == 12
    assert [image.size for image in page.pictures()[:2]] == [(200, 100), (32, 32)]
    np.testing.assert_array_equal(np.asarray(page.pictures()[1]), np.asarray(picture(3, (32, 32))))
    assert 'two <b>boats</b> | "&" · seed 3' in page.text
    assert "b" not in page.tags
    assert page.tags.count("td") == 8
    for kind in ("largest gains", "largest losses", "random"):
        assert f"mine: {kind}" in page.text


def test_html_of_a_folder_whose_name_is_no_utf8():
    evaluation = an_evaluation(model=os.fsdecode(b"run-\xff"))
    page = as_html(evaluation, evaluation.comparisons(), lambda prompt, seed: (picture(0), picture(1)))
    assert b"<h1>run-? against" in page.encode()


def test_data_uri_is_no_larger_than_asked():
    head, data = data_uri(Image.new("RGB", (1000, 500)), side=384).split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (384, 192)


def test_markdown():
    evaluation = an_evaluation()
    lines = as_markdown(evaluation, evaluation.comparisons()).splitlines()
    assert lines[0] == "# policy\\|1 against &lt;base&gt;"
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    # Means 18/6 and 13/6; medians 1.5, 3, 4.5 against 1, 4.5, 1; pairs 1/2 + 1, 0 + 0, 1 + 0.
    assert cells[:3] == ["mine", "3", "2.167"]
    assert cells[3].startswith("+0.8333 [")
    assert cells[3].endswith("], +0.5")
    assert cells[4].startswith("66.67 % [")
    assert cells[5].startswith("41.67 % [")
    assert cells[6:] == ["2-0-1", "1"]
    piped = an_evaluation(scores={"a|b": [[1, 2]] * 3}, baseline_scores={"a|b": [[1, 2]] * 3})
    assert as_markdown(piped, piped.comparisons()).splitlines()[4].startswith("| a\\|b | 1.5 |")


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_folder(sd_folder, tmp_path_factory):
    """The tiny pipeline with another UNet."""
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("models") / "other"
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(sd_folder, other_folder, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    options = {
        "model_name_or_path": other_folder,
        "baseline_name_or_path": sd_folder,
        "prompts_file": tmp_path / "prompts.json",
        "scorers": "tests.test_evaluation:brightness",
        "output_dir": tmp_path / "out",
        "num_images_per_prompt": 3,
        "num_inference_steps": 2,
        "batch_size": 2,
    }

    def command(**changes) -> list[str]:
        words = ["evaluate"]
        for name, value in (options | changes).items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    return command


def test_evaluate_is_a_command():
    assert "evaluate" in COMMANDS


def test_evaluate(command, sd_folder, other_folder, tmp_path, monkeypatch, capsys):
    """Interrupted, resumed without drawing anything twice, and right to the last digit."""
    with monkeypatch.context() as patch:
        draws = Draws(patch, stop=8)  # two batches for each prompt: in the middle of the baseline
        with pytest.raises(SystemExit, match="130"):
            main(command())
        interrupted = draws.seen
    assert len(interrupted) == 9 + 3
    assert not (tmp_path / "out" / "report.json").exists()
    with monkeypatch.context() as patch:
        resumed = Draws(patch)
        main(command())
    assert interrupted[9:] + resumed.seen == [(prompt, seed) for prompt in PROMPTS for seed in range(3)]

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for who, folder in (("scores", other_folder), ("baseline_scores", sd_folder)):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        expected = [
            brightness(
                pipeline(
                    [prompt] * 3,
                    generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
                    num_inference_steps=2,
                ).images,
                [prompt] * 3,
            )
            for prompt in PROMPTS
        ]
        np.testing.assert_allclose(report[who]["tests.test_evaluation:brightness"], expected, atol=0.6)
    (name,) = report["results"]
    statistics = compare(report["scores"][name], report["baseline_scores"][name])
    assert report["results"][name]["difference"] == statistics.difference._asdict()
    assert report["results"][name]["p_value"] == statistics.p_value
    wilson = win_rate(prompt_medians(report["scores"][name]), prompt_medians(report["baseline_scores"][name]))
    assert report["results"][name]["wilson"] == {"low": wilson.low, "high": wilson.high}
    assert report["settings"] == {"num_inference_steps": 2, "dtype": "float32", "device": "cpu"}

    page = assert_self_contained((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    table, baseline = (np.array(report[who][name]) for who in ("scores", "baseline_scores"))
    shown = sum((side > 0).any(1).sum() for side in (table - baseline, baseline - table)) + 3
    assert len(page.references) == 2 * shown
    drawn = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "out" / "images").glob("*/*.png")}
    assert {np.asarray(image).tobytes() for image in page.pictures()} <= drawn
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() in printed


def test_other_settings_draw_anew_and_the_old_ones_are_kept(command, tmp_path, monkeypatch):
    small = {"num_images_per_prompt": 1, "max_prompts": 2}
    main(command(**small))
    draws = Draws(monkeypatch)
    main(command(**small, guidance_scale=3.0, resolution=8))
    assert len(draws.seen) == 4
    sizes = {Image.open(path).size for path in (tmp_path / "out" / "images").glob("*/*.png")}
    assert sizes == {(16, 16), (8, 8)}
    draws.seen.clear()
    main(command(**small))
    assert draws.seen == []


def test_no_comparison_overwrites_the_report_of_another(command, sd_folder, other_folder, tmp_path, capsys):
    """Another policy, baseline or setting gets a folder of its own; the images of all are in one place."""
    small, out = {"num_images_per_prompt": 1, "max_prompts": 2}, tmp_path / "out"
    third = tmp_path / "third" / "outputs"
    shutil.copytree(sd_folder, third)
    runs = [
        ({}, out),
        ({"model_name_or_path": sd_folder}, out / "-".join(Path(sd_folder).parts[-2:])),
        ({"model_name_or_path": third}, out / "third-outputs"),
        ({"model_name_or_path": third, "baseline_name_or_path": third}, out / "third-outputs-2"),
        ({"model_name_or_path": third, "num_inference_steps": 1}, out / "third-outputs-3"),
    ]
    written = {}
    for changes, folder in runs:
        main(command(**small | changes))
        assert f"report.html written to {folder}.\n" in capsys.readouterr().out
        assert {file.name for file in folder.glob("report.*")} == {"report.json", "report.md", "report.html"}
        assert not (folder / "images").exists() or folder == out
        for file, content in written.items():
            assert file.read_bytes() == content
        written |= {file: file.read_bytes() for file in folder.glob("report.*")}
    assert len(list(out.rglob("report.json"))) == len(runs)
    for changes, folder in runs:  # the same comparison again replaces its own report
        main(command(**small | changes))
        assert f"report.html written to {folder}.\n" in capsys.readouterr().out
    assert len(list(out.rglob("report.json"))) == len(runs)
    assert [path.name for path in out.rglob("images")] == ["images"]


@pytest.mark.parametrize("found", ['{"model": "another"}', "[1]", "not JSON"])
@pytest.mark.parametrize("model", ["owner/name", "../..", "/", "a b/c:d", ".hidden"])
def test_names_of_report_folders(tmp_path, model, found):
    (tmp_path / "report.json").write_text(found)
    folder = report_folder(tmp_path, "report.json", {"model": model})
    assert folder.parent == tmp_path
    assert re.fullmatch(r"\w[\w.-]*", folder.name)


def test_evaluate_at_a_resolution(command, tmp_path, sd_folder, capsys):
    small = {"num_images_per_prompt": 1, "max_prompts": 2}
    main(command(**small, resolution="8x16"))
    assert {Image.open(path).size for path in (tmp_path / "out" / "images").glob("*/*.png")} == {(16, 8)}
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        main(command(**small, resolution="9"))
    assert "Found resolution=9, expected a multiple of 2 for a StableDiffusionPipeline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_against_itself_is_even(command, sd_folder, tmp_path, monkeypatch):
    draws = Draws(monkeypatch)
    clip = "examples/emoji/clip"
    main(
        command(
            model_name_or_path=sd_folder,
            scorers=[f"clip={clip}", "classifier=examples/emoji/judge:noto"],
            num_images_per_prompt=1,
        )
    )
    assert len(draws.seen) == 3  # the same images serve for both
    results = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert list(results) == ["clip", "classifier"]
    for found in results.values():
        assert found["win_rate"] == found["pair_win_rate"] == Estimate(0.5, 0.5, 0.5)._asdict()
        assert (found["ties"], found["p_value"]) == (3, 1.0)
        assert found["wilson"]["low"] < 0.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scorers": "tests.test_evaluation:broken"}, "'tests.test_evaluation:broken' returned 0 scores for 1 images"),
        ({"scorers": "pick"}, "Found no scorer 'pick'"),
        ({"max_prompts": 1}, "Found 1 prompts, expected at least 2"),
        ({"batch_size": 0}, "--batch_size: found 0, expected a whole number of at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(command, tmp_path, refused, changes, words):
    assert words in refused(*command(**changes))
    assert not (tmp_path / "out").exists()


def broken(images, prompts):
    return []


# ---- During training ------------------------------------------------------------------------------------------------


def add_win_rates(trainer, scorer=brightness, **changes) -> WinRateCallback:
    arguments = {"every_n_steps": 2, "num_images_per_prompt": 3, "num_inference_steps": 2, "seed": 5}
    callback = WinRateCallback(trainer, {"light": scorer}, PROMPTS[:2], **arguments | changes)
    trainer.add_callback(callback)
    return callback


def history(trainer, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def test_win_rates_during_training(sd, tmp_path):
    trainer = make_trainer(sd, tmp_path)
    add_win_rates(trainer)

    def draw() -> list[list[float]]:
        rows = []
        for prompt in PROMPTS[:2]:
            seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
            images = [sd(prompt, generator=seed, num_inference_steps=2).images[0] for seed in seeds]
            rows.append(brightness(images, [prompt] * 3))
        return rows

    sd.unet.eval()
    start = draw()
    trainer.train()
    sd.unet.eval()
    end = draw()
    scores, rates = history(trainer, "eval_score/light"), history(trainer, "eval_win_rate/light")
    assert list(scores) == list(rates) == [0, 2, 3]
    assert list(history(trainer, "loss")) == [1, 2, 3]
    assert scores[0] == pytest.approx(np.mean(start), abs=0.3)
    assert scores[3] == pytest.approx(np.mean(end), abs=0.3)
    assert abs(scores[3] - scores[0]) > 1
    assert rates[0] == 0.5
    assert rates[3] == np.mean([np.median(a) > np.median(b) for a, b in zip(end, start, strict=True)])


def noisy(images, prompts):
    torch.randn(3)
    return brightness(images, prompts)


def test_win_rates_change_nothing_of_the_training(sd_folder, tmp_path):
    losses = []
    for name in ("without", "with"):
        trainer = make_trainer(sd_folder, tmp_path / name, disable_dropout=False)
        if name == "with":
            add_win_rates(trainer, noisy, every_n_steps=1)
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_a_resumed_run_remembers_its_start(sd_folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = make_trainer(sd_folder, tmp_path, max_steps=2, **saving)
    add_win_rates(first)
    first.train()
    resumed = make_trainer(sd_folder, tmp_path, **saving)
    add_win_rates(resumed)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(sd_folder, tmp_path / "whole")
    add_win_rates(whole)
    whole.train()
    for name in ("eval_score/light", "eval_win_rate/light"):
        assert history(resumed, name) == history(whole, name)
    assert list(history(resumed, "eval_score/light")) == [0, 2, 3]

    other = make_trainer(sd_folder, tmp_path, max_steps=4, **saving)
    add_win_rates(other, seed=6)
    with pytest.raises(ValueError, match=r"Found other settings of the callback in .*win_rate.json, expected"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / WinRateCallback.FILE).unlink()
    with pytest.raises(ValueError, match=r"Found nothing in .*win_rate.json"):
        other.train(resume_from_checkpoint=True)


def test_win_rates_need_scorers_and_prompts(sd, tmp_path):
    trainer = make_trainer(sd, tmp_path)
    with pytest.raises(ValueError, match="Found 0 scorers and 2 prompts, expected at least one of each"):
        WinRateCallback(trainer, {}, PROMPTS[:2])


def test_sample_grids_with_scores(sd, tmp_path):
    """Mean scores under each prompt and in the log; the pictures stay as they were."""
    trainer = make_trainer(sd, tmp_path, max_steps=1, learning_rate=0.0)
    arguments = {"num_images_per_prompt": 2, "num_inference_steps": 1}
    plain = LogImagesCallback(trainer, PROMPTS[:2], **arguments)
    scored = LogImagesCallback(trainer, PROMPTS[:2], **arguments, scorers={"light": brightness})
    trainer.add_callback(scored)
    trainer.train()
    logged = history(trainer, "samples/light")
    images = [
        sd(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=1).images[0]
        for prompt in PROMPTS[:2]
        for seed in (0, 1)
    ]
    assert list(logged) == [0, 1]
    assert list(history(trainer, "loss")) == [1]
    assert logged[0] == logged[1] == pytest.approx(np.mean(brightness(images, None)), abs=0.3)
    grids = [np.asarray(callback.draw()) for callback in (plain, scored)]
    assert grids[0].shape == grids[1].shape
    written = np.asarray(Image.open(Path(tmp_path) / "samples" / "step-000001.png"))
    np.testing.assert_array_equal(written, grids[1])


def test_captions_name_the_scores(sd, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr("trl_diffusion.callbacks.image_grid", lambda rows, words: captions.extend(words))
    trainer = make_trainer(sd, tmp_path)
    scorers = {"one": lambda images, prompts: [1.0, 2.0, 3.0, 5.0], "two": lambda images, prompts: [0.25] * 4}
    arguments = {"num_images_per_prompt": 2, "num_inference_steps": 1, "scorers": scorers}
    LogImagesCallback(trainer, PROMPTS[:2], **arguments).draw()
    assert captions == ["a cat · one 1.5 · two 0.25", "a dog · one 4 · two 0.25"]
