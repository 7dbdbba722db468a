"""Parse the HTML of a page for its tests, strictly."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {'meta', 'link', 'img', 'br', 'path', 'input'}                      # elements without an end tag


class Page(HTMLParser):
    """The elements [tag, attributes, text] of an HTML text. Fails unless tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open, self.texts, self.text = [], [], [], text
        self.feed(text)
        assert self.open == [], 'not closed'

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), '']
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ''])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f'</{tag}> in line {self.getpos()[0]}'

    def handle_data(self, data):
        self.texts.append(data)
        for element in self.open:
            element[2] += data

    def find(self, tag, name=None, **attributes):
        """Return the elements of a tag with a class and attributes."""
        return [element for element in self.elements if element[0] == tag
                and (name is None or name in element[1].get('class', '').split())
                and all(element[1].get(key) == value for key, value in attributes.items())]

    def charts(self):
        """Return {title: its data for the pointer}."""
        drawn = self.find('svg', role='img')
        return {svg[1]['aria-label'].split(': ')[0]: json.loads(svg[1]['data-chart']) for svg in drawn}


def open_page(path: Path) -> Page:
    """Parse a page, which must load nothing: no file, no style, no picture from elsewhere."""
    text = path.read_text(encoding='utf-8')
    found = Page(text)
    for _, attributes, _ in found.elements:
        for key in ('src', 'href', 'srcset', 'data'):
            assert attributes.get(key, 'data:').startswith('data:'), attributes
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)|@import|url\(', text)
    return found


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of each row below the head of the table that an HTML text has."""
    return [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in text.split('<tr>')[2:]]
