"""The whole page: its header, its tabs, and its look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

from detgpt.web.api import connect_api
from detgpt.web.feedback import Clicks
from detgpt.web.models import Models
from detgpt.web.picture_tab import PictureTab
from detgpt.web.samples import FOLDER
from detgpt.web.video_tab import VideoTab

HEADER = """<header>
<h1>DetGPT</h1>
<p>Say what you need. See what in the picture helps.</p>
</header>"""
HOUR = 3600
INK, PAPER = "#1d1d1f", "#f5f5f7"
# Grey, so that the only colours are those of the picture and its boxes. Gradio serves the typefaces itself: the
# page asks nobody else for anything.
THEME = gr.themes.Base(
    primary_hue="neutral",
    neutral_hue="neutral",
    radius_size="lg",
    font=[LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[LocalFont("IBM Plex Mono"), "ui-monospace", "monospace"],
).set(
    button_primary_background_fill=INK,
    button_primary_background_fill_hover="#3a3a3d",
    button_primary_text_color="white",
    button_primary_background_fill_dark=PAPER,
    button_primary_background_fill_hover_dark="white",
    button_primary_text_color_dark=INK,
    button_primary_border_color="transparent",
    button_primary_border_color_dark="transparent",
    button_large_text_weight="700",
    button_small_text_weight="400",
    button_secondary_background_fill="transparent",
    button_secondary_background_fill_dark="transparent",
    button_secondary_border_color="*border_color_primary",
    button_border_width="1px",
    button_border_width_dark="1px",
    slider_color=INK,
    slider_color_dark=PAPER,
    block_label_text_color="*body_text_color",
)
LOOK: dict[str, Any] = {
    "theme": THEME,
    "css_paths": Path(__file__).with_name("page.css"),
    "footer_links": ["api", "gradio"],
}


def build(models: Models, clicks: Clicks | None = None) -> gr.Blocks:
    """The page around the models on offer, and where its thumbs go; `launch(**LOOK)` gives it its look."""
    gr.set_static_paths([FOLDER])
    with gr.Blocks(title="DetGPT", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.HTML(HEADER, apply_default_css=False, elem_id="header")
        with gr.Tab("Picture"):
            PictureTab(models, clicks)
        with gr.Tab("Video"):
            VideoTab(models)
        connect_api(models)
    return page
