"""What goes in and out over HTTP, as pydantic models: they check requests and write the OpenAPI document.

The options of a request are the fields of `detgpt.pipeline.Options`; the answer is `Detections.to_dict()`; an error
is a problem document (RFC 9457).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import fields
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, get_type_hints

from anyio.to_thread import run_sync
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, create_model
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile

from detgpt.answer import MAX_NAMES
from detgpt.described import described
from detgpt.guards import Action, Place
from detgpt.names import MAX_NAME_LENGTH
from detgpt.pipeline import Options
from detgpt.results import Target

MAX_INSTRUCTION = 2_000  # characters

# ------------------------------------------------------------------------------------------------------- requests


def _from_base64(image: object) -> object:
    """Bytes from base64 or from a base64 data: URL; a file that was uploaded comes as bytes already."""
    if image is None or isinstance(image, bytes):
        return image
    try:
        text = re.sub(r"^data:[^,]{0,200};base64,", "", image, count=1, flags=re.IGNORECASE)  # type: ignore[call-overload]
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise PydanticCustomError("base64", "must be the base64 of an image file, or a base64 data: URL") from None


class _Wish(BaseModel):
    """One picture, and what to find in it."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[
        bytes | None,
        BeforeValidator(_from_base64),
        WithJsonSchema({"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}]}),
        Field(description="the image file: as a file part, or in JSON as base64 or a base64 data: URL"),
    ] = None
    image_url: Annotated[
        str | None,
        Field(max_length=2000, description="public web address of the image, where the server allows it"),
    ] = None
    instruction: Annotated[
        str | None,
        Field(max_length=MAX_INSTRUCTION, description="what you need, in words"),
    ] = None
    names: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]] | None,
        Field(min_length=1, max_length=MAX_NAMES, description="things to find without any reasoning"),
    ] = None

    @validator(mode="after")
    def _one_picture_one_wish(self) -> _Wish:
        if (self.image is None) == (self.image_url is None):
            raise PydanticCustomError("picture", "give one picture: image or image_url")
        if (self.instruction is None) == (self.names is None):
            raise PydanticCustomError("wish", "give one wish: instruction or names")
        return self

    def options(self) -> dict[str, Any]:
        """The options that were given, so that the model's own stay the defaults of the others."""
        given = self.model_dump(include={option.name for option in fields(Options)})
        return {name: value for name, value in given.items() if value is not None}


_RANGES: dict[type, dict[str, Any]] = {float: {"ge": 0, "le": 1, "allow_inf_nan": False}, int: {"ge": 1}}


def _option_fields() -> dict[str, Any]:
    """One optional field per field of `Options`, which also gives name, type and description."""
    helps = described(Options)
    types = get_type_hints(Options)
    return {
        option.name: (
            Annotated[types[option.name], Field(**_RANGES.get(types[option.name], {}))] | None,
            Field(None, description=helps[option.name]),
        )
        for option in fields(Options)
    }


DetectRequest = create_model("DetectRequest", __base__=_Wish, **_option_fields())


async def read(request: Request) -> _Wish:
    """The request's body, checked. Raises `RequestValidationError` or `HTTPException`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            body = await request.body()  # tens of megabytes of base64 would stop the event loop
            return await run_sync(partial(DetectRequest.model_validate_json, body, strict=True))
        if kind == "multipart/form-data":
            return DetectRequest.model_validate(await _form(request))
    except ValidationError as error:
        raise RequestValidationError(
            error.errors(include_url=False, include_context=False, include_input=False)
        ) from None
    raise HTTPException(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the request as multipart/form-data or as application/json"
    )


async def _form(request: Request) -> dict[str, Any]:
    """The parts of a form: files as bytes, `names` as a list, everything else as it was written."""
    async with request.form(max_files=1, max_fields=MAX_NAMES + len(DetectRequest.model_fields)) as form:
        parts: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name == "names":
                parts.setdefault("names", []).append(value)
            elif name in parts:
                raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, "only names may be given more than once")
            else:
                parts[name] = await value.read() if isinstance(value, UploadFile) else value
        return parts


def request_body() -> dict[str, Any]:
    """Both forms of a request, for the OpenAPI document."""
    schema = DetectRequest.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": "the image file"}
    upload = {**schema, "properties": {**schema["properties"], "image": file}}
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": upload}, "application/json": {"schema": schema}},
    }


# --------------------------------------------------------------------------------------------------------- answers


class Mask(BaseModel):
    """The pixels of a thing as COCO's uncompressed run lengths; see `detgpt.masks`."""

    size: tuple[int, int] = Field(description="height and width of the picture")
    counts: list[int] = Field(description="pixels outside, inside, outside … down one column after the other")


class Detection(BaseModel):
    """One box, in pixels of the picture: left, top, right, bottom."""

    label: str
    score: float
    xyxy: tuple[float, float, float, float]
    mask: Mask | None = Field(None, description="where masks were asked for")


class Judged(BaseModel):
    """What the guard found in the wish, the picture's writing or the answer, and what it did. See `detgpt.guards`."""

    harmful: bool
    category: str | None = Field(description="the kind of harm")
    score: float = Field(ge=0, le=1, description="how sure the guard is of harm")
    action: Action = Field(description="pass: the answer is the reasoner's own, byte for byte")
    where: Place | None = Field(description="what was harmful")
    text: str = Field(description="what may be shown: the answer, its rewriting, or a friendly refusal")
    reason: str


class Answer(BaseModel):
    """What fulfils the wish, where it is, and why. Nothing fits: no targets. See `Detections` in the library."""

    instruction: str | None
    reasoning: str
    targets: list[Target]
    unsure: list[Target] = Field([], description="named, but less sure than min_confidence asks, so not looked for")
    detections: list[Detection]
    image_wh: tuple[int, int]
    problem: str | None = Field(description="what was wrong with the model's answer, null when nothing was")
    answer: str = Field(description="the reasoner's whole text, or what the guard lets be said instead")
    guard: Judged | None = Field(None, description="what the guard found; null where it does not run or has not looked")


EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["reasoning", "detections", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}  # as OpenAPI 3.2 describes a server-sent event


class Problem(BaseModel):
    """What went wrong (RFC 9457, application/problem+json)."""

    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] = Field([], description="where fields of the request are wrong: field and message")


def problem(status: int, detail: str, errors: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """A problem document. Its type is left out, which stands for "about:blank": the status says it all."""
    document = {"title": HTTPStatus(status).phrase, "status": int(status), "detail": detail}
    return document if errors is None else {**document, "errors": errors}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors, for the OpenAPI document."""
    schema = Problem.model_json_schema()
    content = {"application/problem+json": {"schema": schema}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}
