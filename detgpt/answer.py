"""The one grammar of an answer: how a reasoner is asked to write it, and how it is read back.

A reasoner thinks aloud and ends with one line, a JSON list of object names:

    Targets: ["cup", "bottle"]        or, when nothing in the picture fits,        Targets: []

`format_instruction` asks for it, `format_answer` writes it (training data), `parse_answer` reads it. The
reader is total (any text gives a `ParsedAnswer`), takes linear time, and forgives what models really do:
Markdown, lost quotes or brackets, bullet lists, JSON objects, thoughts in <think>, the sentence form
"Therefore the answer is: [cup]". A malformed answer is data: it gives no names and says what was wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from detgpt.errors import InputError
from detgpt.names import EDGES, MAX_NAME_LENGTH, NOTHING, clean, distinct, is_usable, read_name

MAX_NAMES = 50

_FORMAT = """one last line with the names of these objects as a JSON list, short names, for example
Targets: ["cup", "bottle"]
If nothing in the image fits, the last line is
Targets: []"""

RETRY_INSTRUCTION = f"Your answer did not end in the form I asked for. Write only {_FORMAT}"


def format_instruction(instruction: str) -> str:
    """The whole prompt for a general model: the instruction, the three steps, the form of the last line."""
    return f"""{instruction.strip()}

Answer in three steps.
1. Describe the image in one or two sentences.
2. Find the objects in the image that fit the request, and explain why each of them fits. \
Name only what you can see.
3. Write {_FORMAT}"""


def format_answer(reasoning: str, names: Iterable[str]) -> str:
    """An answer in the asked-for form; `parse_answer` gives back the same reasoning and names.

    Raises `InputError` for a name that cannot be read back: empty, over `MAX_NAME_LENGTH` characters, a word
    for "nothing", or one past `MAX_NAMES`.
    """
    cleaned = distinct((clean(name), name) for name in names)
    for name, original in cleaned:
        if not is_usable(name):
            raise InputError(f"{original!r} cannot be a target name: use words of 1 to {MAX_NAME_LENGTH} characters")
    if len(cleaned) > MAX_NAMES:
        raise InputError(f"{len(cleaned)} target names are too many: give at most {MAX_NAMES}")
    line = "Targets: " + json.dumps([name for name, _ in cleaned], ensure_ascii=False)
    return f"{reasoning.strip()}\n{line}" if reasoning.strip() else line


@dataclass(frozen=True)
class ParsedAnswer:
    """What an answer says.

    names: the targets in the order of first mention, distinct (ignoring case).
    spans: for each name its characters [start, end) in the text that was parsed.
    reasoning: the text in front of the answer line, without the line and without thoughts in <think>.
    problem: why there are no names, when the answer did not say so itself; otherwise None.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    reasoning: str
    problem: str | None = None

    @classmethod
    def of_names(cls, names: Sequence[str]) -> ParsedAnswer:
        """Names that the user gave, each once and in order, as if a reasoner had. Raises `InputError` for none."""
        if isinstance(names, str):
            raise InputError(f"names={names!r} is one string: give a list of names, such as [{names!r}]")
        once = tuple(dict.fromkeys(name.strip() for name in names))
        if not once or not all(once):
            raise InputError(f"names={list(names)!r} holds no name or an empty one: give at least one word for each")
        return cls(once, ((0, 0),) * len(once), reasoning="")

    def without(self, left_out: Collection[str], problem: str | None = None) -> ParsedAnswer:
        """The other names, and `problem`, which says why these are gone, where one of them was here."""
        kept = [i for i, name in enumerate(self.names) if name not in left_out]
        if len(kept) == len(self.names):
            return self
        names, spans = tuple(self.names[i] for i in kept), tuple(self.spans[i] for i in kept)
        problems = " ".join(filter(None, [self.problem, problem])) or None
        return ParsedAnswer(names, spans, self.reasoning, problems)


def parse_answer(text: str) -> ParsedAnswer:
    """Read the last answer line of `text`. Never raises; linear in the length of `text`."""
    begin, end, thought = visible(text)
    found = _find_answer(text, begin, end)
    if found is None:
        reasoning = text[begin:end].strip() or thought
        return ParsedAnswer((), (), reasoning, _why_no_answer(text, begin, end))
    line_start, body_start = found
    values, body_end, says_nothing = _read_body(text, body_start, end)
    named = [(name, span) for name, span in (read_name(text, v.start, v.end, quoted=v.quoted) for v in values) if name]
    usable = distinct((name, span) for name, span in named if is_usable(name))[:MAX_NAMES]
    says_nothing = says_nothing or (bool(named) and all(NOTHING.match(name) for name, _ in named))
    problem = None if usable or says_nothing else _NO_NAME
    reasoning = _without_fence(text[begin:line_start]) or thought or text[body_end:end].strip(" \n\t`]}.")
    names, spans = tuple(name for name, _ in usable), tuple(span for _, span in usable)
    return ParsedAnswer(names, spans, reasoning, problem)


def answer_is_complete(text: str) -> bool:
    """Whether `text` holds a `Targets: [...]` line up to its closing bracket, so that no more need come."""
    begin, end, _ = visible(text)
    heads = [head for head in _HEAD.finditer(text, begin, end) if _starts_line(text, head.start(), begin)]
    if not heads:
        return False
    start = _skip_fence(text, heads[-1].end(), end)
    if start >= end or text[start] not in "[":
        return False
    values, close = _scan_list(text, start, end)
    return close is not None and not any(value.quote_is_open for value in values)


# --- where the answer is ---

# Every pattern has bounded or disjoint repetitions: no text makes them backtrack.
_HEAD = re.compile(r"(?<!\w)targets?(?: objects?)?[*_`\"'”’ \t]{0,8}[:：](?:[*_ \t]|`(?!``)){0,8}", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:(?:therefore|thus|hence|so)[,，]?[ \t]{1,4})?(?:the[ \t]{1,4})?(?:final[ \t]{1,4})?"
    r"(?<!\w)answers?[ \t]{1,4}(?:is|are)[ \t]{0,4}(?:[:：][*_` \t]{0,8}|(?=[\[【［]))",
    re.IGNORECASE,
)
_OBJECT_LIST = re.compile(r"\[\s{0,40}\{")
_LIST_LINE = re.compile(r"^[ \t]{0,40}(?=[\[【［])", re.MULTILINE)
_DECORATION = re.compile(r"[\s>#*_`\-+•\d.){\"'“]*")
_FENCE = re.compile(r"\s*(?:```[a-z]{0,10}\s*)?", re.IGNORECASE)
_OPENING_FENCE = re.compile(r"```[a-z]{0,10}$", re.IGNORECASE)


def visible(text: str) -> tuple[int, int, str]:
    """Range of `text` outside its <think> part, and the thought (whose opening tag the prompt may hold)."""
    close = text.rfind("</think>")
    begin = close + len("</think>") if close >= 0 else 0
    thought = text[: max(close, 0)].replace("<think>", "").strip()
    unclosed = text.find("<think>", begin)
    if unclosed < 0:
        return begin, len(text), thought
    return begin, unclosed, thought or text[unclosed + len("<think>") :].strip()


def _find_answer(text: str, begin: int, end: int) -> tuple[int, int] | None:
    """(start of the answer line, start of its body) of the last answer in the strongest form present."""
    heads = list(_HEAD.finditer(text, begin, end))
    at_line_start = [head for head in heads if _starts_line(text, head.start(), begin)]
    for matches in (at_line_start, heads, list(_SENTENCE.finditer(text, begin, end))):
        if matches:
            head = matches[-1]
            start = _line_start(text, head.start(), begin) if matches is at_line_start else head.start()
            return start, head.end()
    for pattern in (_OBJECT_LIST, _LIST_LINE):
        matches = list(pattern.finditer(text, begin, end))
        if matches:
            start = matches[-1].start() if pattern is _OBJECT_LIST else matches[-1].end()
            return start, start
    return None


def _line_start(text: str, position: int, begin: int) -> int:
    return max(text.rfind("\n", max(begin, position - 40), position) + 1, begin)


def _starts_line(text: str, position: int, begin: int) -> bool:
    start = _line_start(text, position, begin)
    return position - start <= 40 and _DECORATION.fullmatch(text, start, position) is not None


def _skip_fence(text: str, start: int, end: int) -> int:
    fence = _FENCE.match(text, start, end)
    return fence.end() if fence else start


def _without_fence(reasoning: str) -> str:
    """`reasoning` without the code fence or brace that the answer line stood in."""
    return _OPENING_FENCE.sub("", reasoning.rstrip().removesuffix("{").rstrip()).strip()


def _why_no_answer(text: str, begin: int, end: int) -> str:
    if not text.strip():
        return "the answer is empty"
    if "<think>" in text[begin:]:
        return "the thought that <think> opens never ends, so there is no answer"
    return 'the answer has no "Targets:" line'


# --- what the answer holds ---

_OPENING, _CLOSING, _SEPARATORS = "[【［{", "]】］}", ",，、;；"
_CLOSING_QUOTES = dict(zip("\"'`“„‘「『«", ['"', "'", "`", '”"', '“”"', "’'", "」", "』", "»"], strict=True))
_QUOTED_LIMIT = 6 * MAX_NAME_LENGTH + 2  # a name in which JSON escapes every character
_NAME_KEYS = {"label", "labels", "name", "names", "object", "objects", "target", "targets", "category"}
_NO_NAME = 'the answer line holds no object name and is not "Targets: []"'
_BULLET = re.compile(r"[ \t]{0,16}(?:[-*•–+]|\d{1,3}[.)、])[ \t]{1,8}")
_BULLET_END = re.compile(r"[:：,，;；(（\n]|[ \t][-–—][ \t]")
_BEHIND_QUOTE = rf"[ \t*]{{0,8}}(?:[{re.escape(_SEPARATORS + _CLOSING)}:：.\n]|$)"
_QUOTE_END = {  # an escaped character, the end of the line, or a closing quote at a value's end
    opening: re.compile(rf"\\.|\n|[{closing}](?={_BEHIND_QUOTE})") for opening, closing in _CLOSING_QUOTES.items()
}
_COLON = re.compile(r"\s{0,8}[:：]")
_BARE_END = re.compile(rf"[{re.escape(_SEPARATORS + _OPENING + _CLOSING)}\n]")
_BARE_END_IN_OBJECT = re.compile(rf"[{re.escape(_SEPARATORS + _OPENING + _CLOSING)}:：\n]")
_PHRASE_END = re.compile(rf"[{_SEPARATORS}\n。！？]|[.!?](?=\s|$)|[ \t](?:and|or|&)[ \t]")


@dataclass(frozen=True)
class _Value:
    start: int
    end: int
    quoted: bool = False
    quote_is_open: bool = False


def _read_body(text: str, start: int, end: int) -> tuple[list[_Value], int, bool]:
    """(values, where the body ends, whether it says that nothing fits) of what follows an answer's head."""
    body = _skip_fence(text, start, end)
    if body >= end:
        return [], end, False
    if text[body] in _OPENING:
        values, close = _scan_list(text, body, end)
        if close is None:  # cut off: an empty list would be a guess
            close = _end_of_open_list(text, body, end)
            return _scan_list(text, body, close)[0], close, False
        return values, close, not values and not text[body:close].strip(" \n\t[]{}【】［］")
    line_end = _find_or(text, "\n", body, end)
    if NOTHING.match(text[body:line_end].lstrip(EDGES)):
        return [], line_end, True
    if "\n" in text[start:body]:
        bullets, bullets_end = _read_bullets(text, start, end)
        if bullets:
            return bullets, bullets_end, False
    return _read_phrase(text, body, line_end), line_end, False


def _scan_list(text: str, start: int, end: int) -> tuple[list[_Value], int | None]:
    """The names between the bracket at `start` and its partner, and the partner's position (None: missing).

    Within objects only the values of name-like keys count, so boxes and scores beside them are passed over.
    """
    values: list[_Value] = []
    enclosing: list[bool | None] = []  # innermost last: do values count here? None: in an object, by its key
    key = ""
    i = start
    while i < end:
        char = text[i]
        here = enclosing[-1] if enclosing else True
        counts = key in _NAME_KEYS if here is None else here
        if char in _OPENING:
            enclosing.append(None if char == "{" else counts)
            i += 1
        elif char in _CLOSING:
            enclosing.pop()
            if not enclosing:
                return values, i
            i += 1
        elif char.isspace() or char in _SEPARATORS:
            i += 1
        else:
            value, i = _read_value(text, i, end, in_object=here is None)
            colon = _COLON.match(text, i, end) if here is None else None
            if colon:
                key = text[value.start : value.end].strip().casefold()
                i = colon.end()
            elif counts:
                values.append(value)
    return values, None


def _read_value(text: str, i: int, end: int, in_object: bool = False) -> tuple[_Value, int]:
    """The quoted or bare value that starts at `i`, and the position behind it."""
    is_quote = text[i] in _CLOSING_QUOTES
    close = _closing_quote(text, i, end) if is_quote else None
    if close is not None:
        return _Value(i + 1, close, quoted=True), close + 1
    stop = (_BARE_END_IN_OBJECT if in_object else _BARE_END).search(text, i + 1, end)
    value_end = stop.start() if stop else end
    return _Value(i + is_quote, value_end, quote_is_open=is_quote), value_end


def _closing_quote(text: str, opening: int, end: int) -> int | None:
    """Position of the closing quote; one inside a word ('child's cup') does not close."""
    limit = min(end, opening + _QUOTED_LIMIT)
    for match in _QUOTE_END[text[opening]].finditer(text, opening + 1, limit):
        if match.group() == "\n":
            return None
        if not match.group().startswith("\\"):
            return match.start()
    return None


def _end_of_open_list(text: str, start: int, end: int) -> int:
    """Where a list that lacks its closing bracket stops: the first line that does not promise another one."""
    line_end = start
    while line_end < end:
        line_start, line_end = line_end, _find_or(text, "\n", line_end + 1, end)
        line = text[line_start:line_end].rstrip()
        if line and line[-1] not in _SEPARATORS + _OPENING:
            return line_end
    return end


def _read_bullets(text: str, start: int, end: int) -> tuple[list[_Value], int]:
    """One value from each bullet or numbered line; what follows a dash, colon or bracket explains it."""
    values = []
    line_start = _find_or(text, "\n", start, end) + 1
    while line_start < end:
        line_end = _find_or(text, "\n", line_start, end)
        bullet = _BULLET.match(text, line_start, line_end)
        if bullet and bullet.end() < line_end:
            value, _ = _read_value(text, bullet.end(), line_end)
            if not value.quoted:
                stop = _BULLET_END.search(text, bullet.end(), line_end)
                value = _Value(bullet.end(), stop.start() if stop else line_end)
            values.append(value)
        elif text[line_start:line_end].strip():
            break
        line_start = line_end + 1
    return values, min(line_start, end)


def _read_phrase(text: str, start: int, end: int) -> list[_Value]:
    """Values of one line without brackets: `cup, bottle and spoon. They ...`."""
    values = []
    i = start
    while i < end:
        if text[i].isspace() or text[i] in _SEPARATORS:
            i += 1
            continue
        close = _closing_quote(text, i, end) if text[i] in _CLOSING_QUOTES else None
        if close is not None:
            values.append(_Value(i + 1, close, quoted=True))
            i = close + 1
            continue
        stop = _PHRASE_END.search(text, i, end)
        if stop is None or stop.group() in tuple(".!?。！？"):
            values.append(_Value(i, stop.start() if stop else end))
            break
        values.append(_Value(i, stop.start()))
        i = stop.end()
    return values


def _find_or(text: str, mark: str, start: int, end: int) -> int:
    """Position of `mark` in [start, end), or `end`."""
    found = text.find(mark, start, end)
    return found if found >= 0 else end
