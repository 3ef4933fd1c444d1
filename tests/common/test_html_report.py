"""The HTML page of an evaluation: harmless names, no network, bounded size, honest order."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from common.figures import roc_curves
from common.files import escaped
from common.html_report import (
    LONGEST_SIDE,
    Chart,
    Entry,
    Gallery,
    Page,
    Table,
    Tile,
    as_svg,
    named,
    picture_of,
    record,
    render,
    within_budget,
    wrongness,
)

ODD = "a\"><script>alert(1)</script>\n'&.png\udcff\u202egnp"
IMAGE = np.full((40, 60), 0.5)


class Elements(HTMLParser):
    """Every element with its attributes, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.found if found == tag]


def entry(name: str, kind: str = "found", score: float = 1.0) -> Entry:
    picture = picture_of(IMAGE, f"image {name}", name, truth=IMAGE > 0)
    return Entry(name, kind, name, {"score": score, "auroc": None}, 0.5, [picture])


def page(text: str, entries: list[Entry], total: int = 0) -> Page:
    """A page that shows a text at every place."""
    chart = Chart(
        text, as_svg(lambda file: roc_curves({escaped(text): ([0, 1], [0, 1])}, file)), text
    )
    kinds = {"found": text, "missed": "missed"}
    return Page(
        title=text,
        lead=text,
        tiles_title=text,
        tiles=[Tile(text, text, text)],
        warnings=[text],
        tables=[Table(text, [text], [[text, text]], text)],
        charts=[chart],
        gallery=Gallery(entries, kinds, {"score": text}, total, {text: (0, 1)}, text),
        facts=[(text, text)],
        records=[record(text, text)],
    )


def test_names_that_are_html_are_texts_and_nothing_else() -> None:
    odd = Elements(render(page(ODD, [entry(ODD)])))
    plain = Elements(render(page("plain", [entry("plain")])))
    assert [tag for tag, _ in odd.found] == [tag for tag, _ in plain.found]
    assert [list(names) for _, names in odd.found] == [list(names) for _, names in plain.found]
    (card,) = odd.all("article")
    assert card["data-name"] == ODD.replace("\udcff", r"\udcff").replace("\u202e", r"\u202e")


def test_page_needs_nothing_from_outside_and_runs_its_own_script_alone() -> None:
    text = render(page("plain", [entry("a.png")]))
    elements = Elements(text)
    assert "http:" not in text
    assert "https:" not in text
    sources = [image["src"] for image in elements.all("img")]
    assert len(sources) == 3  # chart, image, outline
    assert all(source.startswith("data:image/") for source in sources)
    policy = elements.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"\s(on\w+|style)=", text)


def test_every_picture_has_a_text_and_every_control_a_name() -> None:
    elements = Elements(render(page("plain", [entry("a.png")])))
    alts = [image["alt"] for image in elements.all("img")]
    assert alts == ["plain", "a.png", ""]  # the outline only decorates its image
    buttons = elements.all("button")
    assert [button["aria-label"] for button in buttons if "aria-label" in button] == [
        *("Enlarge a.png", "Previous image", "Next image", "Close")
    ]


def test_page_says_how_many_images_it_shows_of_how_many() -> None:
    assert "The 1 images of 10000 on which" in render(page("plain", [entry("a.png")], total=10000))
    assert "All 1 images" in render(page("plain", [entry("a.png")], total=1))


def test_gallery_ends_where_its_pictures_are_too_large(caplog) -> None:
    entries = [entry("a.png"), entry("b.png"), entry("c.png")]
    size = entries[0].size
    assert within_budget(iter(entries), 3 * size) == entries
    assert within_budget(iter(entries), 3 * size - 1) == entries[:2]
    assert "pictures of 2 images" in caplog.text


def test_lesion_of_one_pixel_keeps_an_outline_in_the_small_picture() -> None:
    truth = np.zeros((2000, 1000), dtype=bool)
    truth[1500, 250] = True
    picture = picture_of(np.zeros(truth.shape), "image", "", truth=truth)
    assert picture.size == (LONGEST_SIDE // 2, LONGEST_SIDE)
    edge = np.asarray(Image.open(io.BytesIO(picture.outline)).convert("RGBA"))[:, :, 3] > 0
    rows, columns = np.nonzero(edge)
    y, x = 1500 * LONGEST_SIDE // 2000, 250 * LONGEST_SIDE // 2000
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (y - 2, y + 2, x - 2, x + 2)
    assert not edge[y, x]


def test_heat_is_brighter_where_it_is_more_anomalous_and_unknown_scores_leave_the_image() -> None:
    heat = np.zeros((40, 60))
    heat[:, 20:40], heat[:, 40:] = 1, np.nan
    data = picture_of(IMAGE, "m", "", heatmap=heat, limits=(0, 1)).data
    levels = np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=float)
    cold, hot, unknown = levels[:, 5:15].mean(), levels[:, 25:35].mean(), levels[:, 45:].mean()
    assert hot > 180 > cold
    assert unknown == pytest.approx(127, abs=2)


def test_colour_images_and_heatmaps_without_image_are_drawn() -> None:
    colour = np.zeros((3, 20, 20))
    colour[0] = 1
    shown = Image.open(io.BytesIO(picture_of(colour, "i", "").data))
    assert shown.getpixel((10, 10)) == pytest.approx((254, 0, 0), abs=2)
    assert picture_of(None, "m", "", heatmap=np.zeros((20, 30))).size == (30, 20)
    with pytest.raises(ValueError, match="m: neither an image nor a heatmap"):
        picture_of(None, "m", "")


def test_wrongness_by_hand() -> None:
    # lesions 1 and 5, normals 0, 1, 2 and 9
    labels = [True, True, False, False, False, False]
    found = wrongness(labels, [1, 5, 0, 1, 2, 9])
    assert found.tolist() == [0.75, 0.25, 0, 0.5, 0.5, 1]
    assert wrongness([True, True], [1, 2]).tolist() == [0, 0]


def test_long_records_are_cut_and_say_so() -> None:
    assert record("t", "x" * 60_010).text.endswith("\n… 10 more characters")
    assert named(["a", "b\n", "c"], most=2) == "a\nb\\x0a\n… and 1 more"
