"""What a terminal gets to see of text from elsewhere."""

import re
import unicodedata

import pytest

from slimmoe_jax.terminal import one_line, printable

SEPARATORS_AND_BIDI = "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("right\x08\x08wrong", r"right\x08\x08wrong"),
        ("kept\rhidden\r\n", "kept\\rhidden\\r\n"),
        ("\x9b31m \x90q\x9c \x85", r"\x9b31m \x90q\x9c \x85"),
        ("\x00\x7f\x0b\x0c", r"\x00\x7f\x0b\x0c"),
        ("a\u202ecba", r"a\u202ecba"),
        ("name\udcff", r"name\udcff"),
        ("tab\tand\nline", "tab\tand\nline"),
        (
            "caf\u00e9 \u65e5\u672c \U0001f469\u200d\U0001f4bb \u05d0\u200f \ufffd",
            "caf\u00e9 \u65e5\u672c \U0001f469\u200d\U0001f4bb \u05d0\u200f \ufffd",
        ),
        ("", ""),
    ],
)
def test_control_characters_are_shown_and_text_is_kept(text, shown):
    assert printable(text) == shown


def test_every_character_is_either_harmless_or_an_escape_that_names_it():
    for number in range(0x110000):
        character = chr(number)
        control = unicodedata.category(character) in ("Cc", "Cs") or character in SEPARATORS_AND_BIDI
        shown = printable(character)
        if control and character not in "\n\t":
            assert re.fullmatch(r"\\(r|x[0-9a-f]{2}|u[0-9a-f]{4})", shown) and shown.encode().decode("unicode_escape") == character
        else:
            assert shown == character


def test_pieces_are_shown_as_the_whole_is():
    """As text that is generated comes: an escape sequence may be cut anywhere."""
    text = "a\x1b]0;\u9b31\x9bb\x07\r\n\u202e\U0001f4bb"
    assert "".join(map(printable, text)) == printable(text)


def test_a_name_stays_on_its_line():
    assert one_line("a\nb\tc\r\x1b") == r"a\nb\tc\r\x1b"
    assert one_line("plain name") == "plain name"
