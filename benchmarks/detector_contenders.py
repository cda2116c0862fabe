"""The contenders of `benchmarks.detector_cpu`: one class each, run in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PICTURE = Path(__file__).parent.parent / "examples" / "kitchen.png"
NAMES = ["cup", "bottle", "wooden chair", "table", "lamp", "red glass", "knife", "plate", "sink", "window"]
JOINT = NAMES[:3]


def random_model() -> Any:
    """A full-size Swin-T Grounding DINO with random weights, the same every time."""
    import torch
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    swin = SwinConfig(window_size=7, out_indices=[2, 3, 4])
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin, text_config=BertConfig()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Fresh weights neither move a box nor a sampling point nor let the text touch the image. These do.
            if name.endswith(("vision_param", "text_param")):
                weight.fill_(0.3)
            elif weight.dim() > 1 and ("bbox_embed" in name or "sampling" in name or "attention_weights" in name):
                weight.normal_(std=0.5 / weight.shape[1] ** 0.5)
    return model.eval()


def save_checkpoint(folder: Path, short_side: int) -> None:
    """The random model with a processor, saved as a user has his, and the text encoder apart for the original."""
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizer,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    vocab = [f"[unused{i}]" for i in range(30522)]
    words = sorted({word for name in NAMES for word in name.split()})
    vocab[2000 : 2000 + len(words)] = words
    for token, index in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}.items():
        vocab[index] = token
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(vocab)})
    random_model().save_pretrained(folder)
    size = {"shortest_edge": short_side, "longest_edge": short_side * 5 // 3}
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer).save_pretrained(folder)
    BertModel(BertConfig()).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")


def picture(short_side: int) -> Any:
    """A 4:3 picture of that size."""
    from PIL import Image

    return Image.open(PICTURE).convert("RGB").resize((short_side * 4 // 3, short_side))


def shifted(image: Any, pixels: int) -> Any:
    """Another picture of the same size: an equal one would be recognised."""
    from PIL import ImageChops

    return ImageChops.offset(image, pixels, 0)


def prompt(names: list[str]) -> str:
    return " ".join(f"{name} ." for name in names)


class Transformers:
    """As its documentation shows it."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).to(self.device)

    def raw(self, images: list[Any], names: list[str]) -> Any:
        import torch

        inputs = self.processor(images=images, text=[prompt(names)] * len(images), return_tensors="pt")
        with torch.no_grad():
            return self.model(**inputs.to(self.device)), inputs

    def joint(self, images: list[Any]) -> None:
        outputs, inputs = self.raw(images, JOINT)
        sizes = [image.size[::-1] for image in images]
        self.processor.post_process_grounded_object_detection(outputs, inputs["input_ids"], target_sizes=sizes)

    def one_name(self, images: list[Any]) -> None:
        self.raw(images, NAMES[:1])[0].pred_boxes.cpu()

    def numbers(self, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        output, _ = self.raw(images, JOINT)
        return output.logits[0].sigmoid().cpu().numpy(), output.pred_boxes[0].cpu().numpy()

    def numbers_on_one_thread(self, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.numbers(images)
        finally:
            torch.set_num_threads(threads)


class Pipeline:
    """transformers' `zero-shot-object-detection` pipeline; it runs once per label, so all names are one label."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import pipeline

        device = 0 if torch.cuda.is_available() else -1
        self.pipeline = pipeline("zero-shot-object-detection", model=str(folder), device=device)

    def joint(self, images: list[Any]) -> None:
        for image in images:
            self.pipeline(image, candidate_labels=[prompt(JOINT)])


class Original:
    """groundingdino-py through its own `predict`; built by our loader, as it fails to build on transformers 5."""

    def __init__(self, folder: Path) -> None:
        import groundingdino
        import torch
        from groundingdino.datasets import transforms

        from detgpt.detectors import groundingdino_py as ours

        config = Path(groundingdino.__file__).parent / "config" / "GroundingDINO_SwinT_OGC.py"
        self.model = ours._build(config, folder / "bert").eval()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        short_side = json.loads((folder / "processor_config.json").read_text())["image_processor"]["size"]
        self.transform = transforms.Compose(
            [
                transforms.RandomResize([short_side["shortest_edge"]], max_size=short_side["longest_edge"]),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def joint(self, images: list[Any]) -> None:
        from groundingdino.util.inference import predict

        for image in images:
            predict(self.model, self.transform(image, None)[0], prompt(JOINT), 0.25, 0.25, device=self.device)


class Ours:
    """Our detector. It forgets the images before each task but one, so that every call pays for all of its work."""

    def __init__(self, folder: Path, precision: str) -> None:
        from detgpt.detectors.grounding_dino import GroundingDinoDetector

        self.detector = GroundingDinoDetector(folder, precision=precision)

    def joint(self, images: list[Any]) -> None:
        self.forget()
        self.joint_again(images)

    def joint_again(self, images: list[Any]) -> None:
        self.detector.detect(images, [JOINT] * len(images), prompting="joint")

    def separate_1(self, images: list[Any]) -> None:
        self.separate(images, NAMES[:1])

    def separate_3(self, images: list[Any]) -> None:
        self.separate(images, NAMES[:3])

    def separate_10(self, images: list[Any]) -> None:
        self.separate(images, NAMES)

    def separate(self, images: list[Any], names: list[str]) -> None:
        self.forget()
        self.detector.detect(images, [names] * len(images))

    def forget(self) -> None:
        self.detector._images._values.clear()

    def numbers(self, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        from detgpt.detectors.spans import Prompt

        with torch.inference_mode():
            encoded = self.detector._encode(images[:1])
            (scores,) = self.detector._fuse(encoded, [0], [Prompt(prompt(JOINT), (), ())])
        return scores.probabilities, scores.boxes


CONTENDERS: dict[str, Callable[[Path], Any]] = {
    "transformers": Transformers,
    "transformers pipeline": Pipeline,
    "groundingdino-py": Original,
    "ours, exact": lambda folder: Ours(folder, "exact"),
    "ours, fast": lambda folder: Ours(folder, "fast"),
}


def work(contender: str, folder: Path, short_side: int, pipe: Any) -> None:
    """A contender's process: does what it is told, tells what came out and how many seconds it took."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = CONTENDERS[contender](folder)
    image = picture(short_side)
    made.joint([picture(max(240, short_side // 2))])  # the first call allocates and sets up
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        task, count = order
        if task == "memory":
            pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 0.0))  # KiB on Linux
        elif task == "flops":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                made.joint([image])
            pipe.send((counter.get_total_flops() / 1e9, 0.0))
        else:
            start = time.perf_counter()
            result = getattr(made, task)([shifted(image, i) for i in range(count)])
            pipe.send((result, time.perf_counter() - start))


class Process:
    """The near end of a contender's process."""

    def __init__(self, contender: str, folder: Path, short_side: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        arguments = (contender, folder, short_side, far)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        far.close()
        self.pipe.recv()

    def __call__(self, task: str, count: int = 1) -> tuple[Any, float]:
        self.pipe.send((task, count))
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()
