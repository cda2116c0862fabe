"""The pictures in `examples/`: scenes whose seeds no training bank and no evaluation split uses.

python -m finetune.picto.examples
"""

from __future__ import annotations

from pathlib import Path

from finetune.picto.knowledge import load_knowledge
from finetune.picto.scenes import make_scene

FOLDER = Path(__file__).parent.parent.parent / "examples"
EXAMPLES = {"kitchen": 207268, "workshop": 6107, "park": 31588, "desk": 6858}


def main() -> None:
    for name, seed in EXAMPLES.items():
        scene = make_scene((5000, seed), (960, 720), load_knowledge().classes)
        scene.image.save(FOLDER / f"{name}.png", optimize=True)
        print(name, *scene.names, sep=", ")


if __name__ == "__main__":
    main()
