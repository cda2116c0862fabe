"""A tiny pair of real models, built once and saved to folders as users have them.

The reasoner has learned a few answers by heart; the detector is random, so it boxes anything, anywhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

LEARNED = {"drink": 'A desk.\nTargets: ["cup"]', "swim": "Only a desk.\nTargets: []"}


@pytest.fixture(scope="session")
def tiny_reasoner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that gives the answers of `LEARNED`."""
    import test_reasoners as builders

    folder = tmp_path_factory.mktemp("pair") / "reasoner"
    processor = builders.tiny_processor()
    model = builders.tiny_model(processor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "LEARNED", LEARNED)
        builders.learn_by_heart(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Grounding DINO whose vocabulary holds cup, bottle and a few more words."""
    import test_grounding_dino as builders

    folder = tmp_path_factory.mktemp("pair") / "detector"
    builders.save_checkpoint(folder, "grounding-dino")
    return folder


@pytest.fixture(scope="session")
def tiny_segmenter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAM 2."""
    import test_masks as builders

    folder = tmp_path_factory.mktemp("segmenter")
    builders.save_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pair_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_reasoner_folder: Path, tiny_detector_folder: Path
) -> Path:
    """Both in one folder with its `detgpt.json`, whose options ask the detector for every box."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(tiny_reasoner_folder, folder / "reasoner")
    shutil.copytree(tiny_detector_folder, folder / "detector")
    described = {"reasoner": "reasoner", "detector": "detector", "options": {"box_threshold": 0.0}}
    (folder / "detgpt.json").write_text(json.dumps(described))
    return folder
