"""The endpoints for programs and agents: Gradio's API, and the tools of the MCP server.

from gradio_client import Client, handle_file
Client("http://127.0.0.1:7860").predict(handle_file("kitchen.png"), "I am thirsty", api_name="/detect")
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from detgpt.errors import DetGPTError
from detgpt.results import Detections
from detgpt.web.models import Models
from detgpt.web.upload import read_upload, shown_error


def connect_api(models: Models) -> None:
    """Add the endpoints `/detect` and `/detect_names` to the page, without anything to see."""

    def detect(image: dict[str, Any] | None, wish: str, box_threshold: float, model: str, min_confidence: float) -> str:
        """Find the things in a picture that fulfil a wish, and say why. The wish is any need in plain words
        ("I am thirsty", "something sharp", "my finger is bleeding"): DetGPT reasons about what helps and
        gives boxes for it. Nothing fitting is an answer too: an empty list of targets.

        Args:
            image: the picture, as a web address or a data: URL.
            wish: what is needed, in plain words; not the names of things, for these there is detect_names.
            box_threshold: least score of a box, from 0 to 1; lower gives more and less certain boxes.
            model: the model that answers. picto knows drawn pictograms only; the others know photographs.
            min_confidence: leave out things that the model is less sure of, from 0 to 1; 0 leaves out nothing.

        Returns:
            JSON: reasoning; targets (name, confidence, found); unsure (what was left out); detections (label, score,
            xyxy in pixels); problem.
        """
        query = {"box_threshold": box_threshold, "min_confidence": min_confidence}
        return _answer(models, model, image, instruction=wish, **query)

    def detect_names(image: dict[str, Any] | None, names: str, box_threshold: float, model: str) -> str:
        """Find the things with these names in a picture, without any reasoning.

        Args:
            image: the picture, as a web address or a data: URL.
            names: names of things, separated by commas, such as "cup, bottle".
            box_threshold: least score of a box, from 0 to 1; lower gives more and less certain boxes.
            model: the model that answers. picto knows drawn pictograms only; the others know photographs.

        Returns:
            JSON: targets (name, found); detections (label, score, xyxy in pixels).
        """
        wanted = [name for name in names.split(",") if name.strip()]
        return _answer(models, model, image, names=wanted, box_threshold=box_threshold)

    with gr.Row(visible=False):
        image = gr.Image(label="image")
        wish, names = gr.Textbox(label="wish"), gr.Textbox(label="names")
        own = models.options(models.default)
        threshold = gr.Slider(0, 1, own.box_threshold, label="box_threshold")
        model = gr.Dropdown(list(models.names), value=models.default, label="model")
        sure = gr.Slider(0, 1, own.min_confidence, label="min_confidence")
        answer = gr.Textbox(label="answer")
        for endpoint, asked in ((detect, [wish, threshold, model, sure]), (detect_names, [names, threshold, model])):
            gr.Button().click(
                endpoint,
                [image, *asked],
                answer,
                api_name=endpoint.__name__,
                preprocess=False,  # see read_upload
                concurrency_limit=4,
                concurrency_id="models",
            )


def _answer(models: Models, model: str, image: dict[str, Any] | None, **query: Any) -> str:
    upload = read_upload(image)
    if upload is None:
        raise shown_error("There is no image: give a picture.")
    try:
        result: Detections = models[model].detect(upload.image, **query)
    except DetGPTError as error:
        raise shown_error(error) from error
    return result.to_json()
