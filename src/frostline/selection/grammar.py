"""The language of selections: text → syntax tree. Knows no model and imports no torch.

    expr    = term { "|" term }
    term    = factor { ("&" | "-") factor }          left to right
    factor  = "~" factor | "(" expr ")" | path | param
    path    = segment { "." segment }
    segment = name [ "[" item { "," item } "]" ] | "{" name { "," name } "}"
    item    = int | [int] ":" [int] [ ":" [int] ] | ranked
    ranked  = ( "top" int | "cover" share ) "by" ( "tokens" | "gate" )      of `experts`, alone in its brackets
    param   = "param" "(" quoted pattern ")"          a tensor's own name, with *, ? and [abc]
    esft    = "esft" "(" quoted file ")"              an expert configuration of ESFT, where a path may stand

A `ranked` item and an `esft` file are not known from the model alone: `outside.py` writes them as plain selections.

`~` binds tighter than `&` and `-`, these tighter than `|`. Every node keeps its column (0-based), so that errors
point at the text. Read `parse` first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from frostline.errors import SelectionError, did_you_mean

Score = Literal["tokens", "gate"]
SCORES: tuple[Score, ...] = ("tokens", "gate")
"""What experts are ranked by: their share of a layer's choices, or of the weight its router gives."""
MAX_DEPTH = 50
"""Nested parentheses and complements allowed."""
MEANT = {
    "+": "'|' takes both",
    "/": "'.' leads into a part, as in ffn.gate",
    "*": 'a name without an index means every one, and patterns of tensors\' own names stand in param("…")',
    "!": "'~' means everything but",
    ";": "',' stands between indices",
    "and": "'|' takes both, '&' what is in both",
    "or": "'|' takes both",
    "not": "'~' means everything but",
    "(": "indices stand in brackets, as in layers[0]",
}
"""What other languages write → how it is said here."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """The experts of each layer with the highest score: so many, or the fewest that have a share of it."""

    amount: int | float
    """`top`: a number of experts; `cover`: a share of the score, above 0 and at most 1."""
    by: str
    """One of `SCORES`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One index or range inside brackets."""

    text: str
    column: int
    value: int | slice | Ranked


@dataclass(frozen=True, slots=True)
class PathSegment:
    """One step of a path: a name, or several in braces, and the indices in brackets, if any."""

    names: tuple[str, ...]
    columns: tuple[int, ...]
    items: tuple[Item, ...] | None

    @property
    def text(self) -> str:
        """The step as it is written."""
        names = self.names[0] if len(self.names) == 1 else "{" + ",".join(self.names) + "}"
        return names + (f"[{','.join(i.text for i in self.items)}]" if self.items else "")


@dataclass(frozen=True, slots=True)
class Path:
    """A leaf: steps that a component's name must contain in a row."""

    text: str
    column: int
    segments: tuple[PathSegment, ...]


@dataclass(frozen=True, slots=True)
class Param:
    """A leaf: a pattern that the raw names of tensors must match as a whole."""

    text: str
    column: int
    pattern: str
    pattern_column: int


@dataclass(frozen=True, slots=True)
class Esft:
    """A leaf: the file of an expert configuration of ESFT."""

    text: str
    column: int
    path: str


@dataclass(frozen=True, slots=True)
class Complement:
    """`~ x`: everything but x."""

    column: int
    operand: Expr


@dataclass(frozen=True, slots=True)
class Binary:
    """`left op right` with op one of `|`, `&`, `-`."""

    op: str
    column: int
    left: Expr
    right: Expr


Leaf = Path | Param | Esft
Expr = Leaf | Complement | Binary

_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<int>[0-9]+)|(?P<sign>[|&~(){}\[\].,:-])"
    r"|\"(?P<double>[^\"]*)\"|'(?P<single>[^']*)')"
)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # "name", "int", "quoted", "end", or the sign itself
    text: str
    column: int


def parse(expression: str) -> Expr:
    """The syntax tree of a selection. Raises `SelectionError` at the column where the text stops making sense."""
    return _Parser(expression).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokens()
        self.at = 0
        self.depth = 0

    def error(self, message: str, column: int) -> SelectionError:
        return SelectionError(message, expression=self.text, column=column)

    def _tokens(self) -> list[_Token]:
        out, at, end = [], 0, len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            if match is None:
                column = at + len(self.text[at:]) - len(self.text[at:].lstrip())
                found = self.text[column]
                if found in "'\"":
                    raise self.error("this quote is not closed", column)
                raise self.error(f"unexpected character {found!r}{_meant(found)}", column)
            group = match.lastgroup or ""
            token = match[group]
            kind = {"sign": token, "double": "quoted", "single": "quoted"}.get(group, group)
            out.append(_Token(kind, token, match.start(group)))
            at = match.end()
        return [*out, _Token("end", "", end)]

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def accept(self, *kinds: str) -> _Token | None:
        token = self.token
        if token.kind not in kinds:
            return None
        self.at += 1
        return token

    def expect(self, kind: str, what: str) -> _Token:
        token = self.accept(kind)
        if token is None:
            raise self.error(f"expected {what}, found {self.found()}", self.token.column)
        return token

    def found(self) -> str:
        return repr(self.token.text) if self.token.kind != "end" else "the end"

    def parse(self) -> Expr:
        if self.token.kind == "end":
            raise self.error("a selection cannot be empty; write 'all' for everything", 0)
        tree = self.union()
        if self.token.kind != "end":
            what = "expected '|', '&' or '-' between parts, found"
            before = self.tokens[self.at - 1].text
            hint = _meant(self.token.text) or (_meant(before) if before == "not" else "")
            raise self.error(f"{what} {self.found()}{hint}", self.token.column)
        return tree

    def union(self) -> Expr:
        left = self.term()
        while token := self.accept("|"):
            left = Binary("|", token.column, left, self.term())
        return left

    def term(self) -> Expr:
        left = self.factor()
        while token := self.accept("&", "-"):
            left = Binary(token.kind, token.column, left, self.factor())
        return left

    def factor(self) -> Expr:
        if token := self.accept("~"):
            with_depth = self.nested(token)
            operand = self.factor()
            self.depth = with_depth - 1
            return Complement(token.column, operand)
        if token := self.accept("("):
            with_depth = self.nested(token)
            inside = self.union()
            self.expect(")", f"')' for the '(' at column {token.column + 1}")
            self.depth = with_depth - 1
            return inside
        if self.token.text == "param" and self.tokens[self.at + 1].kind == "(":
            return self.param()
        if self.token.text == "esft" and self.tokens[self.at + 1].kind == "(":
            return self.esft()
        return self.path()

    def nested(self, token: _Token) -> int:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep", token.column)
        return self.depth

    def param(self) -> Param:
        start = self.token.column
        self.at += 2
        pattern = self.expect("quoted", 'a quoted name, as in param("model.layers.*.mlp.*")')
        closing = self.expect(")", "')' after the name")
        if not pattern.text:
            raise self.error("a name cannot be empty", pattern.column)
        return Param(self.text[start : closing.column + 1], start, pattern.text, pattern.column)

    def esft(self) -> Esft:
        start = self.token.column
        self.at += 2
        path = self.expect("quoted", 'a quoted file, as in esft("experts.json")')
        closing = self.expect(")", "')' after the file")
        if not path.text:
            raise self.error("a file's name cannot be empty", path.column)
        return Esft(self.text[start : closing.column + 1], start, path.text)

    def path(self) -> Path:
        start = self.token.column
        segments = [self.segment()]
        while self.accept("."):
            segments.append(self.segment())
        last = self.tokens[self.at - 1]
        text = self.text[start : last.column + len(last.text)]
        return Path(text, start, tuple(segments))

    def segment(self) -> PathSegment:
        if self.accept("{"):
            names = [self.expect("name", "a name")]
            while self.accept(","):
                names.append(self.expect("name", "a name"))
            self.expect("}", "',' or '}'")
        else:
            if self.token.kind == "int" and self.at and self.tokens[self.at - 1].kind == ".":
                raise self.error(f"expected the name of a part, found {self.found()}{_meant('(')}", self.token.column)
            names = [self.expect("name", "the name of a part")]
        items = self.items() if self.accept("[") else None
        found = tuple(n.text for n in names)
        for item in items or ():
            if isinstance(item.value, Ranked) and found != ("experts",):
                raise self.error("only experts are ranked by use: experts[top 4 by tokens]", item.column)
            if isinstance(item.value, Ranked) and len(items or ()) > 1:
                raise self.error("a ranking stands alone in its brackets; join two with '|'", item.column)
        return PathSegment(found, tuple(n.column for n in names), items)

    def items(self) -> tuple[Item, ...]:
        items = [self.item()]
        while self.accept(","):
            items.append(self.item())
        self.expect("]", "',' or ']'")
        return tuple(items)

    def item(self) -> Item:
        start = self.token.column
        if self.token.kind == "name":
            return self.ranked()
        numbers: list[int | None] = [self.integer()]
        while len(numbers) < 3 and self.accept(":"):
            numbers.append(self.integer())
        last = self.tokens[self.at - 1]
        text = self.text[start : last.column + len(last.text)]
        if len(numbers) == 1:
            if numbers[0] is None:
                raise self.error(f"expected an index or a range such as 2:8, found {self.found()}", start)
            return Item(text, start, numbers[0])
        if len(numbers) == 3 and numbers[2] is not None and numbers[2] < 1:
            raise self.error("the step of a range must be at least 1", start)
        return Item(text, start, slice(*numbers))

    def ranked(self) -> Item:
        """`top 4 by tokens`, `cover 0.2 by gate`."""
        kind = self.expect("name", "an index")
        if kind.text not in ("top", "cover"):
            near = did_you_mean(kind.text, ("top", "cover"))
            what = "expected an index or a range such as 2:8"
            raise self.error(f"{what}, found {kind.text!r}{'.' if near else ''}{near}", kind.column)
        at = self.token.column
        amount = self.number()
        if amount is None:
            what = "a number of experts" if kind.text == "top" else "a share, such as 0.2,"
            raise self.error(f"expected {what} after '{kind.text}', found {self.found()}", at)
        if kind.text == "top" and not (isinstance(amount, int) and amount >= 1):
            raise self.error("top takes a whole number of experts, 1 or more", at)
        if kind.text == "cover" and not 0 < amount <= 1:
            raise self.error("cover takes a share of the score, above 0 and at most 1", at)
        if self.token.text != "by":
            raise self.error(f"expected 'by tokens' or 'by gate', found {self.found()}", self.token.column)
        self.at += 1
        score = self.expect("name", "'tokens' or 'gate'")
        if score.text not in SCORES:
            near = did_you_mean(score.text, SCORES)
            raise self.error(f"experts are ranked by tokens or by gate, not by '{score.text}'.{near}", score.column)
        value = Ranked(amount if kind.text == "top" else float(amount), score.text)
        return Item(self.text[kind.column : score.column + len(score.text)], kind.column, value)

    def number(self) -> int | float | None:
        """A number without a sign, such as `4` or `0.25`; its point has no spaces around it."""
        whole = self.accept("int")
        if whole is None:
            return None
        point, digits = self.token, self.tokens[min(self.at + 1, len(self.tokens) - 1)]
        end = whole.column + len(whole.text)
        if point.kind == "." and digits.kind == "int" and (point.column, digits.column) == (end, end + 1):
            self.at += 2
            return float(f"{whole.text}.{digits.text}")
        if len(whole.text) > 9:
            raise self.error("this number is too large", whole.column)
        return int(whole.text)

    def integer(self) -> int | None:
        minus = self.accept("-")
        token = self.expect("int", "a number") if minus else self.accept("int")
        if token is None:
            return None
        if len(token.text) > 9:
            raise self.error("this number is too large", token.column)
        return -int(token.text) if minus else int(token.text)


def _meant(found: str) -> str:
    """`": '|' takes both"` for what is written so elsewhere; empty for everything else."""
    return f": {MEANT[found]}" if found in MEANT else ""
