"""The evaluation splits of the built-in guard: texts that no training saw.

    python -m finetune.protector.splits finetune/protector/splits
    python -m finetune.protector.splits build/more --each 100 --kind direct --kind role-play

    test, strangers               exchanges about the kinds of harm that training knows, and harmless ones
    categories                    exchanges about kinds of harm that no training knows, and harmless ones
    attacks, strangers-attacks    questions put in all the ways that shall get round a guard, see
                                  `finetune.protector.attacks`; those of strangers also about unknown kinds of harm

Half of the harmless questions sound like harm. The same seed gives the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.protector.attacks import KINDS, write_attacks
from finetune.protector.data import exchanges
from finetune.protector.exchanges import write_rows
from finetune.protector.texts import Part

FOLDER = Path(__file__).parent / "splits"
SEED = 1001
COUNTS = {"test": 800, "strangers": 400, "categories": 400}  # exchanges
ATTACKS: dict[str, Part] = {"attacks": "test", "strangers-attacks": "strangers"}
EACH = 30  # attacks of a kind, and as many harmless ones


def main(
    folder: Annotated[Path, typer.Argument(help="Where the splits go.")] = FOLDER,
    each: Annotated[int, typer.Option(help="Attacks of a kind, and as many harmless ones.")] = EACH,
    kind: Annotated[list[str], typer.Option(help="Of attacks; several, all if not said.")] = list(KINDS),  # noqa: B006
) -> None:
    """Write the splits."""
    if unknown := set(kind) - set(KINDS):
        raise typer.BadParameter(f"there is no attack {', '.join(sorted(unknown))}: give of {', '.join(KINDS)}")
    for name, count in COUNTS.items():
        write_rows(folder / name, exchanges(name, count, SEED, set()))
    for name, part in ATTACKS.items():
        write_attacks(folder / name, each, SEED, part, kind)


if __name__ == "__main__":
    typer.run(main)
