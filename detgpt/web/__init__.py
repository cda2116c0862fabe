"""The page in the browser: `python app.py`, or `detgpt demo`.

    launch.py        the options, and the server
    models.py        the models that a visitor may choose, each loaded once
    page.py          the page: header, tabs, look
    picture_tab.py   a picture, a wish, and what fits it; a conversation
    stage.py         the picture with its boxes as HTML (stage.css, stage.js)
    conversation.py  what a visitor has asked about a picture, without Gradio
    feedback.py      thumbs up and down, kept in a folder, without Gradio
    video_tab.py     the same for a clip
    clip.py          boxes in every frame, reasons at every new scene, without Gradio
    api.py           the endpoints for programs and agents

Importing this package is cheap: gradio loads when the page is built.
"""

from __future__ import annotations

from detgpt.web.launch import demo

__all__ = ["demo"]
