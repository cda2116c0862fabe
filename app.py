"""A page in the browser: a picture, a wish, and what fits it.

    python app.py --model picto --host 127.0.0.1 --port 7860

Needs the extra: pip install 'detgpt[demo]'
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from detgpt import Detections, DetGPT, DetGPTError

EXAMPLES = sorted(Path(__file__).with_name("examples").glob("*.png"))
WISHES = ["I am thirsty", "It is raining", "My finger is bleeding", "I want to write something down"]
HEADER = """# DetGPT
Say what you need, and see what in the picture helps."""
PICTO_NOTE = "This model knows pictograms only. For photographs start the page with `--model base`."
COLUMNS = ["target", "score", "confidence", "x0", "y0", "x1", "y1"]


def build(model: DetGPT, note: str = "") -> gr.Blocks:
    """The page around a loaded model."""

    def answer(picture: Any, wish: str, box_threshold: float) -> Iterator[tuple[Any, str, list[list[Any]]]]:
        """Drawn picture, reasoning and table, again and again while the answer is being written."""
        if picture is None or not wish.strip():
            raise gr.Error("Choose a picture and say what you need.", print_exception=False)
        written = ""
        try:
            for event in model.stream(picture, wish, box_threshold=box_threshold):
                if isinstance(event, Detections):
                    yield event.draw(), _said(event), _rows(event)
                else:
                    written += event
                    yield gr.skip(), written, []
        except DetGPTError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="DetGPT") as page:
        gr.Markdown(HEADER)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(type="pil", label="Picture", height=380)
                wish = gr.Textbox(label="What do you need?", placeholder=WISHES[0], submit_btn="Detect")
                gr.Examples(WISHES, wish, label="For example")
                if EXAMPLES:
                    gr.Examples([str(path) for path in EXAMPLES], picture, label="Pictures")
                with gr.Accordion("Settings", open=False):
                    threshold = gr.Slider(0, 1, model.options.box_threshold, step=0.05, label="Least score of a box")
            with gr.Column():
                drawn = gr.Image(label="What fits", format="png", height=380, interactive=False)
                reasoning = gr.Textbox(label="Why", lines=3, max_lines=12, interactive=False)
                table = gr.Dataframe(headers=COLUMNS, label="Boxes", interactive=False)
        gr.Markdown(note)
        wish.submit(answer, [picture, wish, threshold], [drawn, reasoning, table], api_name="detect")
    return page


def _said(result: Detections) -> str:
    """The reasoning, and in words what the boxes do not show."""
    if result.problem:
        gr.Warning(f"The answer could not be read: {result.problem}")
    missed = ", ".join(target.name for target in result.targets if not target.found)
    notes = [
        "" if result.targets or result.problem else "Nothing here fits.",
        f"Not found in the picture: {missed}." if missed else "",
    ]
    return "\n\n".join(filter(None, [result.reasoning, *notes]))


def _rows(result: Detections) -> list[list[Any]]:
    confidences = {target.name: target.confidence for target in result.targets}
    rows = []
    for box, score, label in result:
        confidence = confidences[label]
        sureness = "" if confidence is None else f"{confidence:.2f}"
        rows.append([label, f"{score:.2f}", sureness, *(round(edge) for edge in box.tolist())])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="picto", help="model pair or folder; `detgpt models` lists them")
    parser.add_argument("--device", help="where to run, such as cpu or cuda")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's relay")
    args = parser.parse_args()
    try:
        model = DetGPT.from_pretrained(args.model, device=args.device)
    except DetGPTError as error:
        parser.exit(1, f"error: {error}\n")
    page = build(model, PICTO_NOTE if args.model == "picto" else "")
    page.launch(server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
