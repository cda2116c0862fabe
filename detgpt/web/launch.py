"""The options of the page, and the server behind it.

python app.py --model base --host 0.0.0.0 --auth me:secret
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from detgpt import terminal
from detgpt.errors import InputError, MissingExtraError
from detgpt.models import PAIRS, resolve

VISITORS = 200  # whose pictures are kept in memory; past that the oldest are forgotten
MAX_UPLOAD = "200mb"


def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="The model at the start; see `detgpt models`.")] = "picto",
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server that runs the model's reasoner, by its name there.")
    ] = None,
    reasoner_key: Annotated[
        str | None, typer.Option(help="Key for that server.", envvar="DETGPT_REASONER_KEY", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Make a public link through Gradio's relay.")] = False,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASSWORD", help="Ask visitors for this login.")] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="Wishes that may wait; more are turned away.")] = 32,
    mcp: Annotated[bool, typer.Option("--mcp", help="Also be an MCP server, for agents.")] = False,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="Refuse or rewrite what would do harm.")] = True,
    guard_model: Annotated[
        str, typer.Option(help="picto, a guard's folder, or the address of a server that runs a guard model.")
    ] = "picto",
    guard_key: Annotated[
        str | None, typer.Option(help="Key for that server.", envvar="DETGPT_GUARD_KEY", show_default=False)
    ] = None,
    picture_text: Annotated[
        str | None, typer.Option(help="How the guard reads what is written in a picture: ocr, reasoner or off.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Give answers thumbs; store clicks and their pictures here.")
    ] = None,
) -> None:
    """Open a page in the browser: a picture, a wish, and what fits it.

    Visitors from this machine may choose any model. With --share or another --host they get the given one only,
    because the others would start a download; with --base-url too, for the server may not run the others.
    """
    login = _login(auth)
    with terminal.reporting(debug=False):
        server = base_url or resolve(model).base_url
        names = [model] if share or server or not _is_local(host) else [model, *PAIRS]
        loading: dict[str, Any] = {
            "device": device,
            **({"base_url": server, "api_key": reasoner_key} if server else {}),
            **({"guard": guard_model, "guard_key": guard_key} if guard else {}),
            **({"picture_text": picture_text} if picture_text else {}),
        }
        page: dict[str, Any] = {
            "host": host,
            "port": port,
            "share": share,
            "login": login,
            "queue_size": queue_size,
            "mcp": mcp,
            "feedback": feedback,
        }
        serve(names, **page, **loading)


def serve(
    names: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    login: tuple[str, str] | None = None,
    queue_size: int = 32,
    mcp: bool = False,
    feedback: Path | None = None,
    wait: bool = True,
    **loading: Any,
) -> Any:
    """Load the first model and serve the page; without `wait` give back the running `gr.Blocks`.

    feedback: the folder that clicks on thumbs go to, see `detgpt.web.feedback`; None: there are no thumbs.
    loading: further arguments of `DetGPT.from_pretrained` for every model, such as `device`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401

        if mcp:
            import mcp as _  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "gradio", "demo") from error
    from detgpt.web.feedback import Clicks
    from detgpt.web.models import Models
    from detgpt.web.page import LOOK, build

    clicks = Clicks(feedback) if feedback else None
    models, first = Models(names, **loading), resolve(names[0])
    parts = [first.detector] if loading.get("base_url") else [first.reasoner, first.detector]
    with terminal.loading(names[0], parts, debug=False):
        models[names[0]]
    page = build(models, clicks)
    page.queue(max_size=queue_size)
    try:
        page.launch(
            server_name=host,
            server_port=port or None,
            share=share,
            auth=login,
            mcp_server=mcp,
            max_file_size=MAX_UPLOAD,
            state_session_capacity=VISITORS,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            pwa=False,
            prevent_thread_lock=not wait,
            **LOOK,
        )
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}. Choose another --host or --port.") from error
    return page


def _login(auth: str | None) -> tuple[str, str] | None:
    if auth is None:
        return None
    user, colon, password = auth.partition(":")
    if not (user and colon and password):
        raise typer.BadParameter("give a name and a password, as in --auth me:secret")
    return user, password


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
