"""Names of files made from names of images: unique, safe, short enough, and reversible."""

import os
import unicodedata

import pytest

from common.files import escaped, file_stems, unescaped

UNDECODABLE = os.fsdecode(b"M\xfcller.png")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.png", "a.png"),
        ("sub/Müller 100%.png", "sub/Müller 100%.png"),
        (UNDECODABLE, r"M\xfcller.png"),
        ("two\nlines\t.png", r"two\x0alines\x09.png"),
        (r"M\xfcller.png", r"M\x5cxfcller.png"),
        (r"a\b.png", r"a\b.png"),
        (r"\x5cxfc", r"\x5cx5cxfc"),
        ("\\" + UNDECODABLE, r"\M\xfcller.png"),
    ],
)
def test_name_as_text_is_one_line_of_utf8_and_gives_the_name_back(name: str, text: str) -> None:
    assert escaped(name) == text
    assert "\n" not in text.encode("utf-8").decode()
    assert unescaped(text) == name


def test_ordinary_names_keep_their_published_stems() -> None:
    names = ["a.png", "patient/0.png", "scan.png", "scan.tif", "x.y.png", "$a b.png", "日本.png"]
    assert file_stems(names) == {
        "a.png": "a",
        "patient/0.png": "patient__0",
        "scan.png": "scan.png",
        "scan.tif": "scan.tif",
        "x.y.png": "x.y",
        "$a b.png": "$a b",
        "日本.png": "日本",
    }


@pytest.mark.parametrize(
    "names",
    [
        ["a/b.png", "a__b.png"],
        ["s.png", "s.tif", "s.png.png"],
        ["A.png", "a.png"],
        [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")],
        ["ß.png", "ss.png"],
        ["a/b/c.png", "a__b/c.png", "a/b__c.png", "a__b__c.png"],
        ["m" * 300 + "1.png", "m" * 300 + "2.png"],
        [UNDECODABLE, os.fsdecode(b"M\xfdller.png"), "M_ller.png"],
        ["a\nb.png", "a\tb.png", "a_b.png"],
    ],
)
def test_no_two_images_share_a_file_where_neither_case_nor_composition_counts(names) -> None:
    stems = file_stems(names)
    folded = {unicodedata.normalize("NFC", stem).casefold() for stem in stems.values()}
    assert len(folded) == len(names)
    assert file_stems(reversed(names)) == stems


def test_name_that_imitates_another_images_hash_gets_one_of_its_own() -> None:
    taken = file_stems(["a/b.png", "a__b.png"])["a/b.png"]
    names = ["a/b.png", "a__b.png", f"{taken}.png"]
    assert len(set(file_stems(names).values())) == 3


@pytest.mark.parametrize("name", ["m" * 400 + ".png", "é" * 130 + ".png", "日" * 85 + ".png"])
def test_long_names_are_cut_to_the_bytes_that_there_are_with_a_hash(name: str) -> None:
    stem = file_stems([name], 200)[name]
    assert len(stem.encode()) <= 200
    assert stem.startswith(name[:50])
    assert stem != file_stems([f"x{name}"], 200)[f"x{name}"]


@pytest.mark.parametrize("name", [".hidden/x.png", "a\nb.png", UNDECODABLE, "a\x1b[31m.png"])
def test_names_that_are_no_plain_text_give_plain_file_names(name: str) -> None:
    stem = file_stems([name])[name]
    assert stem.isprintable()
    assert stem.encode("utf-8")
    assert not stem.startswith(".")
    assert "/" not in stem
