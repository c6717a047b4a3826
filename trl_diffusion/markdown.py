"""Text of others in Markdown: names, prompts and paths that stay text, whatever characters they hold."""

import re


def _one_line(value: object) -> str:
    """Without line breaks and control characters, and with nothing that UTF-8 cannot hold."""
    words = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", str(value))
    return " ".join(re.sub(r"[\ud800-\udfff]", "\ufffd", words).split())


def text(value: object) -> str:
    """One line that Markdown shows as it is: no tags, no table cells, no code, no emphasis, no links."""
    words = re.sub(r"[\\`*~#|]", r"\\\g<0>", _one_line(value).replace("&", "&amp;"))
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", words)  # those within a word are no emphasis
    words = words.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"\](?=[\[(])", r"\\]", words)  # a link's middle


def code(value: object) -> str:
    """One line in the font of code."""
    words = _one_line(value)
    # Within backticks nothing can be escaped.
    return f"<code>{text(words)}</code>" if not words or set(words) & set("`|\\<>&") else f"`{words}`"


def fence(language: str, block: str) -> str:
    """A block of code, within more backticks than it holds side by side."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", block)), default=0))
    return f"{ticks}{language}\n{block}\n{ticks}"


def link(label: object, url: str) -> str:
    """A link, where the URL is one of the web; else the label."""
    if not re.fullmatch(r"https?://[\w.~:/?#@!$&+,;=%-]+", url, re.ASCII):
        return text(label)
    return f"[{text(label)}]({url})"
