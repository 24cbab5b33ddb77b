"""Messages to users: one sentence of at most 300 characters, whatever the names and numbers in it."""

import ast
from pathlib import Path

from mlcm_jax.errors import listed

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "mlcm_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
SHOWN = 25  # characters of what stands in a message for a name or a number, about


def text_of(node):
    """A message's text, with SHOWN characters for each value in it; None where it is built in another way."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join("x" * SHOWN if isinstance(part, ast.FormattedValue) else text_of(part) for part in node.values)
    return None


def messages():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "UserError"
                and node.args
            ):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", text_of(node.args[0])


def test_each_message_is_one_short_sentence():
    found = {place: text for place, text in messages() if text is not None}
    assert len(found) > 150
    long = {place: len(text) for place, text in found.items() if len(text) > 300}
    assert not long
    ends = (".", "?", "x" * SHOWN)
    assert not [place for place, text in found.items() if not text.endswith(ends) or ". " in text or "\n" in text]


def test_listed():
    assert listed("ba") == "a, b" and listed("abcdefg") == "a, b, c, d, e and 2 more"
    assert listed(["a" * 100, "b" * 100]) == "a" * 100 + " and 1 more"
    assert len(listed(["a" * 1000, "b"])) < 160
