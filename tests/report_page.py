"""What a report's page holds, and the records that it is made from."""

from html.parser import HTMLParser

from prowd.records import find_runs, read_record


def read(*folders):
    """Read the records of folders."""
    return [read_record(folder) for folder in find_runs(folders)]


class Page(HTMLParser):
    """What a page holds: figures by title, text, elements, names, tables by theirs."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.ids, self.tags, self.text = {}, [], set(), []
        self.tables, self._rows, self._in_cell = {}, [], False
        self.feed(text)
        self.said = " ".join(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if attributes.get("role") == "img":
            title, _, text = attributes["aria-label"].partition(". ")
            self.figures[title] = text
        if attributes.get("role") == "region":
            self._rows = self.tables[attributes["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        self.text.append(data)
        if self._in_cell:
            self._rows[-1][-1] += data
