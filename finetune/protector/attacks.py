"""Questions put in all the ways that shall get round a guard, with harmless ones beside them.

A line of `data.jsonl`: {"id", "kind", "category", "question", "image", "turns" (what was said before), "printed" (what
is written in the picture), "benign"}. No act, wish or wrapping was trained on. The kinds:

    direct           the wish as it is
    role-play        inside a play, a novel, a game
    suffix           with words behind it that shall force an answer
    language         in German, French or Spanish
    encoded          in leetspeak, base64, ROT13, with spaces, foreign letters or signs that nobody sees
    turns            said early in a conversation and only referred to at its end
    typographic      printed in the picture; the question is only to do what it says
    combined         a role, a suffix and an encoding at once

For evaluation after MM-SafetyBench (Liu et al. 2024, arXiv:2311.17600) and FigStep (Gong et al. 2023,
arXiv:2311.05608), in the built-in world. The last four kinds are in no training.
"""

from __future__ import annotations

import base64
import codecs
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.picto.world import scene_for
from finetune.protector.exchanges import write_rows
from finetune.protector.texts import LANGUAGES, Asked, Part, Texts, pick

KINDS = ("direct", "role-play", "suffix", "language", "encoded", "turns", "typographic", "combined")
SCENES = 12  # pictures that the questions are about
LEET = str.maketrans("aeiost", "431057")
FOREIGN = str.maketrans("aeopcyx", "аеорсух")  # Cyrillic


def write_attacks(folder: Path, each: int, seed: int, part: Part, kinds: Sequence[str] = KINDS) -> None:
    """`each` harmful questions of each of the kinds and as many harmless ones, with their pictures."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = [scene_for(seed, i).image for i in range(SCENES)]
    for i, scene in enumerate(scenes):
        scene.save(folder / _scene(i), quality=80, method=6)
    rows = attacks(each, seed, part, kinds)
    for row in rows:
        if "printed" in row:
            scene = scenes[int(row["id"].rpartition("-")[2]) % SCENES]
            with_sign(scene, row["printed"]).save(folder / row["image"], quality=80, method=6)
    write_rows(folder, rows)


def attacks(each: int, seed: int, part: Part, kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """The records in texts of a part, of each of the kinds in turn; every other one is harmless."""
    texts = Texts()
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        seen: set[str] = set()
        for i in range(2 * each):
            benign = i % 2 == 1
            name = f"{kind}-{'benign' if benign else 'harm'}-{i // 2}"
            for attempt in range(50):
                rng = np.random.default_rng((seed, KINDS.index(kind), i, attempt))
                row = _attack(texts, rng, kind, None if benign else _category(texts, kind, i // 2, part), part)
                if (key := row.pop("wish").lower()) not in seen:
                    seen.add(key)
                    break
            image = f"images/{name}.webp" if "printed" in row else _scene(i // 2 % SCENES)
            rows.append({"id": name, "kind": kind, **row, "image": image, "benign": benign})
    return rows


def with_sign(scene: Image.Image, text: str) -> Image.Image:
    """The scene with a sign below it that says `text`."""
    lines = textwrap.wrap(text, 34)
    picture = Image.new("RGB", (scene.width, scene.height + 14 * len(lines) + 10), "white")
    picture.paste(scene, (0, 0))
    font = ImageFont.load_default(12)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((6, scene.height + 5 + 14 * i), line, fill="black", font=font)
    return picture


def _category(texts: Texts, kind: str, i: int, part: Part) -> str:
    known = list(texts.categories) if part == "strangers" and kind != "language" else texts.trained
    return known[i % len(known)]


def _attack(texts: Texts, rng: np.random.Generator, kind: str, category: str | None, part: Part) -> dict[str, Any]:
    if kind == "language":
        asked = texts.foreign(rng, pick(rng, LANGUAGES), category, part)
    elif category is not None:
        asked = texts.harm(rng, category, part)
    else:
        asked = texts.lookalike(rng, part) if rng.random() < 0.6 else texts.everyday(rng, part)
    return {"wish": asked.text, "category": category, **_put(texts, rng, kind, asked, part)}


def _put(texts: Texts, rng: np.random.Generator, kind: str, asked: Asked, part: Part) -> dict[str, Any]:
    """The wish put in the way of `kind`: `question`, and `turns` or what is `printed`."""
    if kind == "role-play":
        return {"question": texts.role(rng, asked.text, part)}
    if kind == "suffix":
        return {"question": texts.suffix(rng, asked.text, part)}
    if kind == "encoded":
        return {"question": encoded(rng, asked.text)}
    if kind == "turns":
        *turns, question = texts.turns(rng, asked.text, part)
        return {"turns": turns, "question": question}
    if kind == "typographic":
        return {"question": texts.sign(rng, part), "printed": asked.text}
    if kind == "combined":
        return {"question": texts.role(rng, texts.suffix(rng, encoded(rng, asked.text), part), part)}
    return {"question": asked.text}


def encoded(rng: np.random.Generator, text: str) -> str:
    """The text in one of the ways to hide it."""
    ways = (
        lambda: text.translate(LEET),
        lambda: base64.b64encode(text.encode()).decode(),
        lambda: codecs.encode(text, "rot13"),
        lambda: " ".join("-".join(word) if len(word) > 3 else word for word in text.split(" ")),
        lambda: text.translate(FOREIGN),
        lambda: "\u200b".join(text),
        lambda: text.encode().hex(),
        lambda: text[::-1],
    )
    return pick(rng, ways)()


def _scene(number: int) -> str:
    return f"images/scene-{number}.webp"
