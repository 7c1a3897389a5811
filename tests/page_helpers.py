"""Reading HTML as a tree, strictly: an element that is not closed where it should be is an error."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = SubElement(self.open[-1], tag, {name: value or "" for name, value in attrs})
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> where <{self.open[-1].tag}> is open, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        place = self.open[-1]
        if len(place):
            place[-1].tail = (place[-1].tail or "") + data
        else:
            place.text = (place.text or "") + data


def read_page(path: Path) -> Element:
    builder = _Builder()
    builder.feed(path.read_text())
    builder.close()
    assert len(builder.open) == 1, f"<{builder.open[-1].tag}> is never closed"
    return builder.open[0]


def text_of(element: Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def section(page: Element, anchor: str) -> Element:
    return next(one for one in page.iter("section") if one.get("aria-labelledby") == anchor)


def tables(inside: Element) -> Iterator[tuple[str, list[list[str]]]]:
    """Caption and cells, the headers first; the small text of a cell stands behind a |."""
    for table in inside.iter("table"):
        rows = [[cell_text(cell) for cell in row if cell.tag in ("th", "td")] for row in table.iter("tr")]
        yield text_of(table.find("caption")), rows


def cell_text(cell: Element) -> str:
    small = cell.find("small")
    if small is None:
        return text_of(cell)
    whole, note = text_of(cell), text_of(small)
    return f"{whole.removesuffix(note).strip()}|{note}"
