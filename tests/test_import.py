"""Importing is cheap, and the public names are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import detgpt

HEAVY = [
    "torch",
    "torchvision",
    "transformers",
    "huggingface_hub",
    "gradio",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "openai",
    "cv2",
    "onnxruntime",
    "pandas",
    "rapidocr",
    "supervision",
    "ray",
]


@pytest.mark.parametrize(
    "code",
    [
        "import detgpt",
        "import detgpt; [getattr(detgpt, name) for name in detgpt.__all__]",
        "import detgpt.models",
        "import detgpt.cli",
        "import sys; sys.argv = ['detgpt', 'detect', '--help']; from detgpt.cli import main; main()",
    ],
    ids=["import detgpt", "every public name", "the models", "the command line", "detgpt detect --help"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    report = f"import atexit, sys; atexit.register(lambda: print(*set(sys.modules) & set({HEAVY}), file=sys.stderr))"
    ran = subprocess.run([sys.executable, "-c", f"{report}\n{code}"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.split() == []


def test_every_public_name_exists() -> None:
    assert sorted(set(detgpt.__all__)) == detgpt.__all__ == dir(detgpt)
    for name in detgpt.__all__:
        assert getattr(detgpt, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'detekt'"):
        _ = detgpt.detekt
