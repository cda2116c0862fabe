"""What `detect` costs beside a plain script around the same two models, and what encoding an image once saves.

    python -m benchmarks.pipeline            # --quick: under a minute; --size large: a 4B language model, for a GPU

Writes `benchmarks/results/pipeline.json` and `pipeline.md` (--quick only prints). Two pairs are measured, one of them
with `--only`, which leaves the other's numbers as they were: the built-in model, and a LLaVA with a full-size image
tower whose weights are random; its answer is dictated, so that it has a usual length, and everything else is computed
as it would be. The ways of use take turns, so that what else slows the machine for a while slows them all. The plain
script calls the same model objects through transformers' own functions: chat template, `generate`, the detector's
processor, one joint prompt, its post-processing. "Full length" is that script without an end: `--full-length` tokens,
whatever the model says.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from PIL import Image, ImageOps
from transformers import AutoProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import detgpt
from detgpt.answer import parse_answer

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
REASONER = ROOT / "weights" / "picto" / "reasoner"
WISHES = ["I am thirsty", "I want to read", "I am hungry", "I need to write a letter", "I want to sit down"]
# Every token of it occurs once: the one before says which comes next.
ANSWER = 'I see a table with an apple and one bottle of milk in the kitchen, so this fits best.\nTargets: ["cup"]'

# Image tower and language model by the sizes of CLIP ViT-B/32 and ViT-L/14-336, SmolLM2-135M (in "small" 8 of its
# 30 layers) and Qwen3-4B.
VIT_B = {"image_size": 224, "patch_size": 32, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_B |= {"hidden_size": 768, "intermediate_size": 3072}
VIT_L = {"image_size": 336, "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_L |= {"hidden_size": 1024, "intermediate_size": 4096}
LM_135M = {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
LM_135M |= {"hidden_size": 576, "intermediate_size": 1536}
LM_4B = {"model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
LM_4B |= {"hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128}
SIZES = {"small": (VIT_B, {**LM_135M, "num_hidden_layers": 8}), "medium": (VIT_L, LM_135M), "large": (VIT_L, LM_4B)}


def save_random_llava(folder: Path, size: str, device: str) -> Path:
    """A checkpoint of that size with the built-in model's tokenizer and template, so its prompts are as short."""
    vision, language = SIZES[size]
    processor = AutoProcessor.from_pretrained(REASONER)
    edge, patch = vision["image_size"], vision["patch_size"]
    processor.image_processor.size = processor.image_processor.crop_size = {"height": edge, "width": edge}
    processor.patch_size = patch
    processor.vision_feature_select_strategy = "default"  # CLIP's class token is left out
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**cast(dict[str, Any], vision)),
        text_config={**language, "vocab_size": len(processor.tokenizer)},
        image_token_index=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=(edge // patch) ** 2,
        detgpt_prompt="bare",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def dictate(model: Any, tokenizer: Any) -> None:
    """Make the model write `ANSWER` whatever it is asked, after all its work."""
    ids = [*tokenizer.encode(ANSWER, add_special_tokens=False), tokenizer.eos_token_id]
    following = torch.full((len(tokenizer),), ids[0])
    following[ids[:-1]] = torch.tensor(ids[1:])
    following = following.to(model.device)

    def write(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        output.logits[:, -1].scatter_(1, following[kwargs["input_ids"][:, -1:]], 1e4)

    model.register_forward_hook(write, with_kwargs=True)


class ForwardClock:
    """Adds up the seconds within a model, entered by whichever of its large parts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._inside = 0
        for name, module in model.named_modules():
            if name.count(".") <= 2:
                module.register_forward_pre_hook(self._enter, prepend=True)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        if not self._inside:
            self._start = now()
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1
        if not self._inside:
            self.seconds += now() - self._start


def now() -> float:
    """Seconds, after the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


SECONDS = ("seconds", "reasoner_seconds", "detector_seconds", "rest_seconds")  # in all, within each model, outside both


class Subject:
    """A pair of models, and the ways to use it that are compared."""

    def __init__(self, model: detgpt.DetGPT, full_length: int) -> None:
        self.model = model
        self.reasoner, self.processor = model.reasoner._model, model.reasoner._processor  # type: ignore[attr-defined]
        self.detector, self.finder = model.detector.model, model.detector.processor  # type: ignore[attr-defined]
        self.clocks = ForwardClock(self.reasoner), ForwardClock(self.detector)
        self.full_length = full_length

    def detect(self, image: Image.Image, wish: str) -> detgpt.Detections:
        """Ours, about an image never seen before."""
        self.forget()
        return self.model.detect(image, wish)

    def forget(self) -> None:
        self.model.reasoner._prefixes.clear()  # type: ignore[attr-defined]

    @torch.inference_mode()
    def script(self, image: Image.Image, wish: str, **lengths: int) -> str:
        """What one writes by hand with transformers; returns the reasoner's text."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": wish}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.reasoner.device, dtype=self.reasoner.dtype)
        ids = self.reasoner.generate(**inputs, **(lengths or {"max_new_tokens": 512}))
        text = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if names := list(parse_answer(text).names):
            inputs = self.finder(images=image, text=[names], return_tensors="pt").to(self.detector.device)
            outputs = self.detector(**inputs)
            self.finder.post_process_grounded_object_detection(
                outputs, inputs["input_ids"], threshold=0.25, text_threshold=0.25, target_sizes=[image.size[::-1]]
            )
        return text

    def full(self, image: Image.Image, wish: str) -> str:
        return self.script(image, wish, min_new_tokens=self.full_length, max_new_tokens=self.full_length)

    def measure(self, work: Callable[[], Any]) -> tuple[float, ...]:
        """The `SECONDS` of `work`."""
        self.forget()
        before = [clock.seconds for clock in self.clocks]
        start = now()
        work()
        total = now() - start
        reasoner, detector = (clock.seconds - b for clock, b in zip(self.clocks, before, strict=True))
        return total, reasoner, detector, total - reasoner - detector


def measure(subject: Subject, images: list[Image.Image], repeats: int) -> dict[str, dict[str, float]]:
    """The median run of every way of use, by its name."""
    model, (picture, *_) = subject.model, images
    eight = [(image, WISHES[i % len(WISHES)]) for i, image in enumerate(images)]
    five = [(picture, wish) for wish in WISHES]

    def conversation(kept: bool) -> None:
        chat = model.chat(picture)
        for wish in WISHES[:3]:
            if not kept:
                subject.forget()
            chat.ask(wish)

    ways: dict[str, Callable[[], Any]] = {
        "one: detect": lambda: model.detect(*eight[0]),
        "one: plain script": lambda: subject.script(*eight[0]),
        "one: full length": lambda: subject.full(*eight[0]),
        "eight images: detect_batch": lambda: model.detect_batch(eight),
        "eight images: detect, one by one": lambda: [model.detect(*item) for item in eight],
        "eight images: plain script": lambda: [subject.script(*item) for item in eight],
        "five instructions: detect_batch": lambda: model.detect_batch(five),
        "five instructions: detect, one by one": lambda: [model.detect(*item) for item in five],
        "five instructions: detect, each as if new": lambda: [subject.detect(*item) for item in five],
        "five instructions: plain script": lambda: [subject.script(*item) for item in five],
        "three turns: chat": lambda: conversation(kept=True),
        "three turns: chat, each as if new": lambda: conversation(kept=False),
    }
    said = model.detect(*eight[0]).answer.strip()  # also warms up
    if said != subject.script(*eight[0]).strip():
        raise RuntimeError("the plain script's answer is another: these times would not compare")
    subject.full(*eight[0])
    rounds = [{name: subject.measure(work) for name, work in ways.items()} for _ in range(repeats)]
    runs = {name: sorted(ran[name] for ran in rounds) for name in ways}
    return {name: dict(zip(SECONDS, ran[len(ran) // 2], strict=True)) for name, ran in runs.items()}


RATIOS = [  # what is divided by what, and the goal
    ("plain script / detect, one image", "one: plain script", "one: detect", ""),
    ("full length / detect, one image", "one: full length", "one: detect", ""),
    ("eight images one by one / in a batch", "eight images: detect, one by one", "eight images: detect_batch", "≥ 2"),
    ("eight images by the script / in a batch", "eight images: plain script", "eight images: detect_batch", ""),
    (
        "five instructions each as if new / in a batch",
        "five instructions: detect, each as if new",
        "five instructions: detect_batch",
        "≥ 2",
    ),
    (
        "five instructions each as if new / one by one",
        "five instructions: detect, each as if new",
        "five instructions: detect, one by one",
        "",
    ),
    (
        "five instructions by the script / in a batch",
        "five instructions: plain script",
        "five instructions: detect_batch",
        "",
    ),
    ("three turns each as if new / a chat", "three turns: chat, each as if new", "three turns: chat", ""),
]


def tables(measured: dict[str, Any]) -> str:
    """The ratios, and how the time divides within each model; the seconds themselves are in the JSON file."""
    every = {pair: found["ways"] for pair, found in measured.items()}
    head = "| | goal |" + "".join(f" {pair} |" for pair in every)
    lines = [head, "|---|---|" + "---|" * len(every)]
    for name, above, below, goal in RATIOS:
        cells = [f"{ways[above]['seconds'] / ways[below]['seconds']:.2f}" for ways in every.values()]
        lines.append(f"| {name} | {goal} | " + " | ".join(cells) + " |")
    for way, goal in (("one: detect", "≤ 5%"), ("one: plain script", "")):
        cells = [f"{ways[way]['rest_seconds'] / ways[way]['seconds']:.1%}" for ways in every.values()]
        lines.append(f"| outside the models' forward passes, {way} | {goal} | " + " | ".join(cells) + " |")
    for pair, found in measured.items():
        setting = "{machine}, {threads} threads, {repeats} runs, {full_length} tokens at full length".format(**found)
        lines += ["", f"{pair} ({setting}):", "", "| | times `detect` | reasoner | detector | rest |"]
        lines.append("|---|---|---|---|---|")
        for name, way in found["ways"].items():
            shares = [f"{way[f'{part}_seconds'] / way['seconds']:.0%}" for part in ("reasoner", "detector", "rest")]
            times = way["seconds"] / found["ways"]["one: detect"]["seconds"]
            lines.append(f"| {name} | {times:.2f} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


class Pair(str, Enum):
    built_in = "built-in"
    llava = "llava"


def main(
    repeats: Annotated[int, typer.Option(help="Runs of every way; the median counts.")] = 3,
    size: Annotated[str, typer.Option(help=f"Of the random reasoner: {', '.join(SIZES)}.")] = "medium",
    full_length: Annotated[int, typer.Option(help="Tokens of an answer that nobody stops.")] = 128,
    only: Annotated[Pair | None, typer.Option(help="Measure this pair; else both.")] = None,
    quick: Annotated[bool, typer.Option(help="The small reasoner, one run, nothing written.")] = False,
) -> None:
    """Measure and write the tables."""
    if quick:
        repeats, size, full_length = 1, "small", 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "full_length": full_length,
    }
    built_in = detgpt.DetGPT.from_pretrained("picto", device=device)
    measured: dict[str, Any] = {}
    if only in (None, Pair.built_in):
        ways = measure(Subject(built_in, full_length), pictures(), repeats)
        measured["built-in"] = {**setting, "ways": ways}
    if only in (None, Pair.llava):
        with tempfile.TemporaryDirectory() as folder:
            save_random_llava(Path(folder), size, device)
            model = detgpt.DetGPT(folder, built_in.detector, device=device)
            dictate(model.reasoner._model, model.reasoner._processor.tokenizer)  # type: ignore[attr-defined]
            ways = measure(Subject(model, full_length), pictures(), repeats)
            measured[f"LLaVA, {size}"] = {**setting, "ways": ways}
    if quick:
        print(tables(measured))
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "pipeline.json"
    measured = {**json.loads(file.read_text()), **measured} if only and file.exists() else measured
    file.write_text(json.dumps(measured, indent=2) + "\n")
    (RESULTS / "pipeline.md").write_text(tables(measured) + "\n")
    print(tables(measured))


def pictures() -> list[Image.Image]:
    """Eight of one size."""
    files = [ROOT / "examples" / f"{scene}.png" for scene in ("kitchen", "desk", "park", "workshop")]
    scenes = [Image.open(file).convert("RGB") for file in files]
    return [*scenes, *(ImageOps.mirror(scene) for scene in scenes)]


if __name__ == "__main__":
    typer.run(main)
