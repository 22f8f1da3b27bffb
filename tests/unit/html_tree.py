"""HTML as a tree, by the standard library's parser: what tests of the report ask about tags, classes and texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def all(self, tag: str = "", name: str = "") -> list[Node]:
        """Nodes below with this tag and this class, in order."""
        found = [] if (tag and self.tag != tag) or (name and name not in self.classes) else [self]
        return found + [node for child in self.children for node in child.all(tag, name)]

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(self.words)


class Page(HTMLParser):
    """A tree of the page; every tag must be closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], f"never closed: {[node.tag for node in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for node in self._open:
            node.words.append(data)
