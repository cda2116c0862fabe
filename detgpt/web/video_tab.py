"""A short clip and a wish: the page's second tab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from detgpt.download import quoted
from detgpt.errors import DetGPTError
from detgpt.web.clip import FRAMES_PER_SECOND, MAX_SECONDS, Sight, count_frames, saved, watch
from detgpt.web.models import Models
from detgpt.web.samples import CLIP
from detgpt.web.upload import file_for, shown_error

HINT = f"""Up to {MAX_SECONDS:.0f} seconds. DetGPT thinks about the wish once, and again when the scene changes;
it looks for what it named in every frame."""


class VideoTab:
    """The tab's parts, and what happens at a touch."""

    def __init__(self, models: Models) -> None:
        self.models = models
        with gr.Row(equal_height=False, elem_classes="columns"):
            with gr.Column(scale=6, min_width=320):
                self.clip = gr.Video(
                    str(CLIP.path), label="Your clip", sources=["upload"], height=360, elem_id="clip", buttons=[]
                )
                self.wish = gr.Textbox(CLIP.wishes[0], label="What do you need?", lines=1, elem_id="clip-wish")
                with gr.Row(elem_classes="actions"):
                    self.detect = gr.Button("Detect", variant="primary", scale=3, elem_id="clip-detect")
                    self.stop = gr.Button("Stop", scale=1, interactive=False, elem_id="clip-stop")
                gr.Markdown(HINT, elem_classes="hint")
                with gr.Accordion("Advanced", open=False):
                    self.model = gr.Radio(models.choices(), value=models.default, label="Model", elem_classes="stacked")
                    self.rate = gr.Slider(1, 30, FRAMES_PER_SECOND, step=1, label="Frames a second")
            with gr.Column(scale=6, min_width=320):
                self.result = gr.Video(
                    label="What helps", height=360, interactive=False, autoplay=True, loop=True, elem_id="clip-result"
                )
                self.progress = gr.HTML(apply_default_css=False, elem_id="clip-progress")
                self.story = gr.Markdown(elem_id="clip-story")
        self._connect()

    def _connect(self) -> None:
        free: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        idle = [self.detect, self.stop, self.progress]
        started = gr.on(
            [self.detect.click, self.wish.submit],
            self.watch,
            [self.clip, self.wish, self.model, self.rate],
            [self.result, self.progress, self.story, self.detect, self.stop],
            concurrency_limit=4,
            concurrency_id="models",
            show_progress="hidden",
            api_visibility="private",
        )
        started.then(self._ready, None, idle, **free)
        self.stop.click(self._ready, None, idle, cancels=started, **free)

    def _ready(self) -> dict[Any, Any]:
        return {
            self.detect: gr.Button(interactive=True),
            self.stop: gr.Button(interactive=False),
            self.progress: "",
        }

    def watch(self, clip: str | None, wish: str, model: str, rate: float) -> Iterator[dict[Any, Any]]:
        """Tell what was thought at each new scene, then show the clip with boxes."""
        if clip is None or not wish.strip():
            raise shown_error("Choose a clip and say what you need.", "Nothing asked")
        yield {
            self.detect: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.story: "",
            self.result: None,
        }
        told: list[str] = []
        path = file_for(self.result, f"{Path(clip).stem}-detgpt.mp4")
        try:
            total = count_frames(clip, rate)
            sights = watch(self.models[model], clip, wish.strip(), frames_per_second=rate)
            for number, sight in enumerate(saved(sights, path, rate), start=1):
                told += [_told(sight)] if sight.reasoned else []
                # At every frame, because only here can it be stopped.
                yield {self.progress: _bar(number, total), self.story: "\n\n".join(told)}
        except DetGPTError as error:
            raise shown_error(str(error).replace(quoted(clip), quoted(Path(clip).name)), "This clip failed") from error
        yield {self.progress: "", self.result: str(path)}


def _bar(done: int, total: int | None) -> str:
    """How far it is; a clip may turn out longer than it says."""
    known = f' max="{max(done, total)}" value="{done}"' if total else ""
    return f"<label>Looking at frame {done}<progress{known}></progress></label>"


def _told(sight: Sight) -> str:
    """What was thought about a scene, with its time."""
    result = sight.result
    nothing = "not with me" if result.refused else "nothing here fits"
    named = ", ".join(target.name for target in result.targets) or result.problem or nothing
    return f"**{sight.seconds:.1f} s: {named}**\n\n{result.reasoning}"
