"""A picture, a wish, and what fits it: the page's first tab."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from detgpt.errors import DetGPTError
from detgpt.images import load_image
from detgpt.pipeline import Options
from detgpt.results import Detections, Target
from detgpt.web.conversation import Conversation, floor
from detgpt.web.feedback import Answer, Clicks, Thumb
from detgpt.web.models import Models
from detgpt.web.samples import PICTURES, Sample
from detgpt.web.stage import CSS, JS, stage
from detgpt.web.upload import file_for, read_upload, shown_error

PREVIEW_SIDE = 2048  # pixels; the browser gets a smaller copy of a large picture, the models see the whole
WISH, NAMES = "Say what you need", "Name the things"
FIELD: dict[str, dict[str, Any]] = {
    WISH: {"label": "What do you need?", "placeholder": "I am thirsty"},
    NAMES: {"label": "What should be found?", "placeholder": "cup, bottle"},
}
PICTO_NOTE = (
    "The built-in model knows drawn pictograms, not photographs. For those choose another model under Advanced."
)
THUMBS: dict[Thumb | None, str] = {"up": "Like", "down": "Dislike"}  # in Gradio's words
THUMBS_NOTE = "A thumb under an answer stores it here with the picture and the wish, to train better models."
# Through the queue even where nothing is slow: only so does the page show an error in its own words.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUICK: dict[str, Any] = {**QUIET, "concurrency_limit": None}
DOWNLOAD = """(file) => {
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name;
    link.click();
}"""


CHOOSE = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) trigger("select", { file: button.dataset.file ?? null });
});"""


@dataclass(frozen=True)
class Visit:
    """One visitor's conversation, and where the browser finds its picture.

    answers: those that can be clicked on, by their place in the chat.
    """

    conversation: Conversation
    url: str
    is_sample: bool = False
    answers: Mapping[int, Answer] = field(default_factory=dict)

    def anew(self, model: str | None = None) -> Visit:
        """The same picture, nothing said."""
        return replace(self, conversation=self.conversation.anew(model), answers={})

    def html(self, options: Options) -> str:
        conversation = self.conversation
        title = Path(conversation.source).name
        return stage(self.url, conversation.picture.size, title, conversation.shown(options))


class PictureTab:
    """The tab's parts, and what happens at a touch. Every visitor has a `Visit` of their own.

    clicks: where thumbs up and down go; None: answers have none.
    """

    def __init__(self, models: Models, clicks: Clicks | None = None) -> None:
        self.models = models
        self.clicks = clicks
        first = _sample_visit(PICTURES[0], models.default)
        self.visit = gr.State(first)
        self.thumbs = gr.State({})  # by the id of the answer
        with gr.Row(equal_height=False, elem_classes="columns"):
            with gr.Column(scale=7, min_width=320):
                self._lay_out_picture(first)
            with gr.Column(scale=5, min_width=320):
                self._lay_out_talk(models.options(models.default))
        self._connect()

    # ----------------------------------------------------------------------------------------------- layout

    def _lay_out_picture(self, first: Visit) -> None:
        with gr.Column(visible=False, elem_id="picker") as self.picker:
            sources: Any = ["upload", "webcam", "clipboard"]
            self.upload = gr.Image(label="Your picture", sources=sources, height=420, elem_id="upload")
            self.back = gr.Button("Back to the picture", size="sm", elem_id="back")
        with gr.Column(elem_id="viewer") as self.viewer:
            own: Any = {"apply_default_css": False}
            self.stage = gr.HTML(first.html(Options()), css_template=CSS, js_on_load=JS, elem_id="stage", **own)
            self.note = gr.Markdown(PICTO_NOTE, visible=False, elem_id="note")
        self.strip = gr.HTML(_strip(), js_on_load=CHOOSE, elem_id="strip", **own)

    def _lay_out_talk(self, options: Options) -> None:
        self.mode = gr.Radio([WISH, NAMES], value=WISH, label="How to ask", show_label=False, elem_id="mode")
        self.wish = gr.Textbox(PICTURES[0].wishes[0], **FIELD[WISH], lines=1, max_lines=4, elem_id="wish")
        with gr.Row(elem_classes="actions"):
            self.detect = gr.Button("Detect", variant="primary", scale=3, min_width=120, elem_id="detect")
            self.anew = gr.Button("New conversation", scale=2, min_width=170, visible=False, elem_id="anew")
        self.tries = gr.Dataset(
            components=["textbox"],
            samples=[[wish] for wish in PICTURES[0].wishes],
            label="For example",
            elem_id="tries",
        )
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            height=None,
            max_height=460,
            buttons=[],
            visible=False,
            elem_id="chat",
        )
        gr.Markdown(THUMBS_NOTE, visible=self.clicks is not None, elem_id="thumbs-note", elem_classes="hint")
        with gr.Accordion("Take it with you", open=False, visible=False, elem_id="take") as self.take:
            with gr.Row():
                self.png = gr.Button("Save PNG", size="sm", elem_id="png")
                self.json = gr.Button("Save JSON", size="sm", elem_id="json")
            self.code = gr.Code(
                language="python",
                interactive=False,
                wrap_lines=True,
                label="The same in Python",
                buttons=["copy"],
                elem_id="code",
            )
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.model = gr.Radio(
                self.models.choices(), value=self.models.default, label="Model", elem_id="model", elem_classes="stacked"
            )
            self.sure = gr.Slider(
                0,
                0.95,
                options.min_confidence,
                step=0.05,
                label="Leave out what it is less sure of",
                elem_id="sure",
            )
            self.least = gr.Slider(
                label="Least score of a box",
                info="As the detector gives it; a calibrated model shows how often such a box is right.",
                elem_id="least",
                **_score_scale(options),
            )
            self.merge = gr.Slider(
                0.05,
                1,
                options.nms_threshold,
                step=0.05,
                label="Boxes are one thing from this overlap",
                elem_id="merge",
            )
        self.file = gr.DownloadButton(visible=False)

    # ----------------------------------------------------------------------------------------------- events

    def _connect(self) -> None:
        thresholds = [self.visit, self.least, self.merge, self.sure]
        answer = [self.stage, self.note, self.anew, self.take, self.code]
        fresh = [self.visit, self.chat, self.detect, *answer]
        asking: dict[str, Any] = {
            "fn": self.ask,
            "inputs": [self.visit, self.chat, self.mode, self.wish, self.least, self.merge, self.sure],
            "outputs": [*fresh, self.wish],
            "concurrency_limit": 4,
            "concurrency_id": "models",
            **QUIET,
        }
        asked = [
            gr.on([self.detect.click, self.wish.submit], **asking),
            self.tries.click(lambda sample: (WISH, sample[0]), self.tries, [self.mode, self.wish], **QUICK).then(
                **asking
            ),
        ]
        for event in asked:  # also after a failure
            event.then(_ready, None, self.detect, **QUICK)
        moved: Any = [self.least.change, self.merge.change, self.sure.change]
        gr.on(moved, self.show, thresholds, answer, trigger_mode="always_last", **QUICK)

        opening = [*fresh, self.wish, self.tries, self.picker, self.viewer]
        opened = self.upload.change(
            self.open_upload,
            [self.upload, self.visit],
            [*opening, self.upload],
            preprocess=False,
            cancels=asked,
            **QUICK,
        )
        opened.failure(lambda: None, None, self.upload, **QUICK)
        self.strip.select(self.choose, self.visit, opening, cancels=asked, **QUICK)
        self.back.click(lambda: self._picking(False), None, [self.picker, self.viewer], **QUICK)
        self.anew.click(self.start_anew, self.visit, fresh, cancels=asked, **QUICK)
        self.model.input(self.choose_model, [self.visit, self.model], [*fresh, *thresholds[1:]], cancels=asked, **QUICK)
        self.mode.change(lambda mode: gr.Textbox(**FIELD[mode]), self.mode, self.wish, **QUICK)
        if self.clicks:
            self.chat.like(self.click, [self.visit, self.chat, self.thumbs], [self.chat, self.thumbs], **QUICK)
        for button, save in ((self.png, self.save_png), (self.json, self.save_json)):
            saved = button.click(save, thresholds, self.file, **QUICK)
            saved.success(None, self.file, None, js=DOWNLOAD, **QUICK)

    def ask(
        self, visit: Visit, said: list[Any], mode: str, text: str, least: float, merge: float, sure: float
    ) -> Iterator[dict[Any, Any]]:
        """Write the reasoning into the conversation as it comes, then show the boxes."""
        text = text.strip()
        if not text:
            raise shown_error("Write it into the field, then press Detect.", FIELD[mode]["label"])
        conversation, written = visit.conversation, ""
        said = [*said, {"role": "user", "content": text}]
        yield {self.chat: gr.Chatbot(said, visible=True), self.detect: gr.Button("Looking …", interactive=False)}
        try:
            model = self.models[conversation.model]
            if mode == NAMES:
                conversation = conversation.look_for(model, [name for name in text.split(",") if name.strip()])
            else:
                for event in conversation.ask(model, text):
                    if isinstance(event, Conversation):
                        conversation = event
                    else:
                        written += event
                        yield {self.chat: [*said, {"role": "assistant", "content": written}]}
        except DetGPTError as error:
            raise shown_error(error) from error
        answers = dict(visit.answers)
        if mode == WISH:
            *history, turn = conversation.turns
            answers[len(said)] = Answer(turn, tuple(history), conversation.model)
        visit = replace(visit, conversation=conversation, answers=answers)
        shown = conversation.shown(self._options(visit, least, merge, sure))
        answer = {"role": "assistant", "content": _in_words(shown)}
        yield {self.visit: visit, self.chat: [*said, answer], self.wish: "", **self.show(visit, least, merge, sure)}

    def show(self, visit: Visit, least: float, merge: float, sure: float) -> dict[Any, Any]:
        """The boxes over the thresholds, and the Python call that gives them."""
        conversation, options = visit.conversation, self._options(visit, least, merge, sure)
        own = self.models.options(conversation.model)
        settings = {"box_threshold": least, "nms_threshold": merge, "min_confidence": sure}
        answered = conversation.found is not None
        return {
            self.stage: visit.html(options),
            self.note: gr.Markdown(visible=conversation.model == "picto" and not visit.is_sample),
            self.anew: gr.Button(visible=answered),
            self.take: gr.Accordion(visible=answered),
            self.code: conversation.python({name: to for name, to in settings.items() if to != getattr(own, name)}),
        }

    def _options(self, visit: Visit, least: float, merge: float, sure: float) -> Options:
        own = self.models.options(visit.conversation.model)
        return own.updated({"box_threshold": least, "nms_threshold": merge, "min_confidence": sure})

    def _unasked(self, visit: Visit) -> dict[Any, Any]:
        """The picture of a conversation that has not begun."""
        own = self.models.options(visit.conversation.model)
        return {
            self.visit: visit,
            self.chat: gr.Chatbot([], visible=False, feedback_value=[]),
            self.detect: _ready(),
            **self.show(visit, own.box_threshold, own.nms_threshold, own.min_confidence),
        }

    def open_upload(self, payload: dict[str, Any] | None, visit: Visit) -> dict[Any, Any]:
        """A visitor's own picture, and with it a new conversation."""
        upload = read_upload(payload)
        if upload is None:  # the field was emptied, by hand or after its picture was taken
            return {self.visit: visit}
        preview = upload.image.copy()
        preview.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        path = file_for(self.upload, "preview.jpg")
        preview.save(path, quality=90)
        opened = Visit(Conversation(upload.image, upload.name, visit.conversation.model), _url(path))
        general = list(dict.fromkeys(sample.wishes[0] for sample in PICTURES))
        return {**self._open(opened, "", general), self.upload: None}

    def choose(self, visit: Visit, choice: gr.EventData) -> dict[Any, Any]:
        """A bundled picture with its best wish, and with it a new conversation; or the field for one's own."""
        if choice.file is None:
            return {self.visit: visit, **self._picking(True)}
        (sample,) = [sample for sample in PICTURES if sample.file == choice.file]
        return self._open(_sample_visit(sample, visit.conversation.model), sample.wishes[0], sample.wishes)

    def _open(self, visit: Visit, wish: str, tries: list[str] | tuple[str, ...]) -> dict[Any, Any]:
        suggested = gr.Dataset(samples=[[wish] for wish in tries])
        return {**self._unasked(visit), **self._picking(False), self.wish: wish, self.tries: suggested}

    def _picking(self, picking: bool) -> dict[Any, Any]:
        return {self.picker: gr.Column(visible=picking), self.viewer: gr.Column(visible=not picking)}

    def start_anew(self, visit: Visit) -> dict[Any, Any]:
        return self._unasked(visit.anew())

    def choose_model(self, visit: Visit, model: str) -> dict[Any, Any]:
        """Another model starts a new conversation with its own thresholds; it loads at the next wish."""
        own = self.models.options(model)
        scales = {
            self.least: gr.Slider(**_score_scale(own)),
            self.merge: own.nms_threshold,
            self.sure: own.min_confidence,
        }
        return {**self._unasked(visit.anew(model)), **scales}

    def click(self, visit: Visit, said: list[Any], thumbs: dict[str, str | None], liked: gr.LikeData) -> dict[Any, Any]:
        """Keep a thumb up or down, or that it was taken back."""
        assert self.clicks is not None, "without it no thumbs are shown"
        answer = visit.answers.get(liked.index) if isinstance(liked.index, int) else None
        if answer is None:
            raise shown_error("Only answers to wishes are stored.", "Not stored")
        thumb: Thumb | None = "up" if liked.liked is True else "down" if liked.liked is False else None
        try:
            self.clicks.add(visit.conversation.picture, answer, thumb)
        except DetGPTError as error:
            raise shown_error(error, "Not stored") from error
        thumbs = {**thumbs, answer.id: THUMBS.get(thumb)}
        # In the order of the answers, and all of them: at a new one the browser forgets what it was not told.
        answers = [visit.answers.get(place) for place, message in enumerate(said) if message["role"] == "assistant"]
        shown = [thumbs.get(answer.id) if answer else None for answer in answers]
        return {self.thumbs: thumbs, self.chat: gr.Chatbot(feedback_value=shown)}

    def save_png(self, visit: Visit, least: float, merge: float, sure: float) -> str:
        path, result = self._to_save(visit, least, merge, sure, "png")
        result.draw().save(path)
        return str(path)

    def save_json(self, visit: Visit, least: float, merge: float, sure: float) -> str:
        path, result = self._to_save(visit, least, merge, sure, "json")
        path.write_text(result.to_json(indent=2), encoding="utf-8")
        return str(path)

    def _to_save(self, visit: Visit, least: float, merge: float, sure: float, suffix: str) -> tuple[Path, Detections]:
        result = visit.conversation.shown(self._options(visit, least, merge, sure))
        assert result is not None, "the buttons appear with the first answer"
        return file_for(self.file, f"{Path(visit.conversation.source).stem}-detgpt.{suffix}"), result


def _ready() -> gr.Button:
    return gr.Button("Detect", interactive=True)


def _in_words(result: Detections | None) -> str:
    """The answer of a conversation: the reasoning, and what the boxes cannot say."""
    assert result is not None, "asked, so answered"
    found = [_how_sure(target) for target in result.targets if target.found]
    missed = [target.name for target in result.targets if not target.found]
    problem = result.problem and result.problem.rstrip(".")
    if problem and not result.targets:
        conclusion = f"**I cannot use my own answer:** {problem}. Please say it in other words."
    elif not result.targets:
        conclusion = "**Nothing that I am sure of.**" if result.unsure else "**Nothing here fits.**"
    elif not found:
        conclusion = f"**Nothing here fits:** I looked for {_listed(missed, 'and')}, but found none."
    else:
        conclusion = f"**Found:** {_listed(found, 'and')}." + (f" I see no {_listed(missed, 'or')}." if missed else "")
    left_out = f"Not all of my answer could be used: {problem}." if problem and result.targets else None
    unsure = f"Left out: {_listed(list(map(_how_sure, result.unsure)), 'and')}." if result.unsure else None
    return "\n\n".join(filter(None, [result.reasoning, conclusion, unsure, left_out]))


def _how_sure(target: Target) -> str:
    return target.name if target.confidence is None else f"{target.name} ({target.confidence:.0%} sure)"


def _listed(names: list[str], conjunction: str) -> str:
    *first, last = names
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def _sample_visit(sample: Sample, model: str) -> Visit:
    conversation = Conversation(load_image(sample.path), f"examples/{sample.file}", model)
    return Visit(conversation, _url(sample.path), is_sample=True)


def _strip() -> str:
    """Small pictures to choose from; the first choice is one's own."""
    samples = [
        f'<button type="button" data-file="{sample.file}" aria-label="Example: {Path(sample.file).stem}">'
        f'<img src="{_url(sample.path)}" alt=""></button>'
        for sample in PICTURES
    ]
    own = '<button type="button" class="own"><b aria-hidden="true">+</b>Your own</button>'
    return f'<div class="strip" role="group" aria-label="Choose a picture">{own}{"".join(samples)}</div>'


def _url(path: str | Path) -> str:
    return f"gradio_api/file={quote(str(path))}"  # relative, so that it also holds behind a proxy


def _score_scale(options: Options) -> dict[str, Any]:
    return {"minimum": floor(options), "maximum": 0.95, "value": options.box_threshold, "step": 0.01}
