"""A COCO-format annotation (COCO, LVIS, Objects365): every picture with its boxes, to train a detector.

SOURCE is the file, or a folder with annotations.json. The pictures lie in --images, else in images/ beside it.
"""

from __future__ import annotations

from detgpt.evaluation.coco import find_image, read_annotations
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.coco import ANNOTATIONS_FILE, image_folder
from finetune.data.convert import Converted
from finetune.data.detections import coco_row

USES = frozenset({"images"})


def convert(source: Source) -> Converted:
    file = source.path / ANNOTATIONS_FILE if source.path.is_dir() else source.path
    annotations = read_annotations(file)
    folder = source.images or image_folder(file.parent)
    rows = [coco_row(picture, str(find_image(folder, picture.file_name))) for picture in annotations.pictures]
    return Converted.of(rows, *annotations.notes)
