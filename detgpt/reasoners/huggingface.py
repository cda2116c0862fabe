"""Any image-text-to-text checkpoint of transformers as a reasoner: LLaVA, Qwen-VL, InternVL, Gemma, our own.

The checkpoint's own chat template writes the prompt and decoding is plain greedy: the checkpoint's sampling
and penalties are left out, so that an answer does not depend on its neighbours in the batch and the
probabilities are the model's own. A row stops as soon as its answer line is complete.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from detgpt.answer import answer_is_complete, format_instruction
from detgpt.device import choose_device
from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.images import image_key
from detgpt.memory import explained_when_short_of_memory
from detgpt.reasoners import RawAnswer, Request, TokenSpan, check_prompt
from detgpt.reasoners.prefix import KeptPrefixes

ACCELERATE_PLACES = ("auto", "balanced", "balanced_low_0", "sequential")
MEMORY_REMEDIES = (
    'a smaller model, quantization="4bit" or "8bit", device_map="auto" to spread it over all devices, '
    "fewer or smaller images at a time, or kept_images=0"
)


class HuggingFaceReasoner:
    """A reasoner from a hub id or a local folder.

    device: "cpu", "cuda", "cuda:1" ...; the GPU where there is one. device_map: accelerate's placement over
    several devices, instead of `device`. dtype: a torch dtype or its name; float32 on the CPU, bfloat16
    elsewhere. quantization: None, "4bit" or "8bit" (bitsandbytes). kept_images: of this many images the latest
    prompt and answer are kept on the device, so that the next turn or instruction does not encode the image
    again (`detgpt.reasoners.prefix`); 0 keeps none. Remote code is never run and weights are read from
    safetensors only. Several threads may share one reasoner: they take turns on the model.

    prompt: "full" tells the model the three steps and the answer's form; "bare" sends the instruction as the user
    wrote it, for a model that was trained so. None: bare where the checkpoint's config says `detgpt_prompt: "bare"`.

    Raises `ModelError` when the checkpoint is missing or of the wrong kind, or memory is short (when loading or
    later), `MissingExtraError` without bitsandbytes, `InputError` for a wrong argument or a missing device.
    """

    def __init__(
        self,
        model_id_or_folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantization: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        kept_images: int = 4,
        prompt: str | None = None,
    ) -> None:
        if kept_images < 0:
            raise InputError(f"kept_images must be 0 or more, not {kept_images}")
        check_prompt(prompt)
        self.name = os.fspath(model_id_or_folder)
        device = choose_device(device)
        options: dict[str, Any] = {
            "dtype": _torch_dtype(dtype, device),
            "device_map": device_map,
            "quantization_config": _quantization_config(quantization),
            "attn_implementation": attn_implementation,
            "use_safetensors": True,
        }
        if quantization and device_map is None:
            options["device_map"] = {"": device}
        _check_device_map(device_map)
        self._processor = _load_processor(self.name, revision)
        _check_attention(self.name, revision, attn_implementation)
        with explained_when_short_of_memory(self.name, MEMORY_REMEDIES):
            self._model = _load_model(self.name, revision, {k: v for k, v in options.items() if v is not None})
            if options["device_map"] is None:
                self._model.to(device)
        self._model.eval()
        self.family: str = self._model.config.model_type
        self._prompt = prompt or getattr(self._model.config, "detgpt_prompt", "full")
        self._plain_greedy_decoding()
        self._prefixes = KeptPrefixes(self._model, kept_images)
        self._lock = threading.Lock()

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        """One answer per request, in order, from one batch through the model."""
        _check_max_new_tokens(max_new_tokens)
        return self._generate(requests, max_new_tokens) if requests else []

    def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
        """Generator of text pieces as they come; returns the `RawAnswer`. Closing it stops the model."""
        _check_max_new_tokens(max_new_tokens)
        return self._stream(request, max_new_tokens)

    def input_size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) in pixels to which the processor of a Qwen-VL checkpoint resizes `image`."""
        pixels = self._processor.image_processor
        encoded = pixels(images=[image], return_tensors="pt")
        if "image_grid_thw" not in encoded:
            raise InputError(f"the processor of {self.name!r} does not tell to which size it resizes an image")
        _, rows, columns = encoded["image_grid_thw"][0].tolist()
        return columns * pixels.patch_size, rows * pixels.patch_size

    def _stream(self, request: Request, max_new_tokens: int) -> Generator[str, None, RawAnswer]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        abandoned = threading.Event()
        with ThreadPoolExecutor(1, "detgpt-stream") as worker:
            answers = worker.submit(self._generate, [request], max_new_tokens, pieces.put, abandoned)
            answers.add_done_callback(lambda _: pieces.put(None))
            try:
                while (piece := pieces.get()) is not None:
                    yield piece
                return answers.result()[0]  # raises what the worker raised
            finally:
                abandoned.set()

    def _generate(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        on_text: Callable[[str], None] | None = None,
        abandoned: threading.Event | None = None,
    ) -> list[RawAnswer]:
        images = [image_key(request.image) for request in requests]
        with self._lock, torch.inference_mode():
            inputs = self._encode(requests)
            thinks = [self._opens_thought(ids) for ids in inputs["input_ids"]]
            tokenizer, end_ids = self._processor.tokenizer, self._end_ids
            writers = [_Writer(tokenizer, end_ids, inside_thought) for inside_thought in thinks]
            logprobs = _Logprobs()
            recorder = _Recorder(writers, logprobs, on_text, abandoned)
            if first := self._prefixes.rows_to_run_first(images):
                self._run([images[row] for row in first], self._encode([requests[row] for row in first]), 1)
            self._run(
                images,
                inputs,
                max_new_tokens,
                logits_processor=[logprobs],
                stopping_criteria=[recorder],
            )
            return recorder.answers()

    def _run(self, images: list[str], inputs: Any, max_new_tokens: int, **hooks: Any) -> None:
        with explained_when_short_of_memory(self.name, MEMORY_REMEDIES):
            try:
                arguments = self._prefixes.resume(images, inputs, max_new_tokens)
                sequences = self._model.generate(**arguments, max_new_tokens=max_new_tokens, **hooks)
                self._prefixes.keep(images, arguments, sequences)
            except Exception:
                self._prefixes.clear()  # if memory was short, the next call has more
                raise

    def _encode(self, requests: Sequence[Request]) -> Any:
        """Model inputs of the conversations, padded on the left: every row then continues at its end."""
        inputs = self._processor.apply_chat_template(
            [self._conversation(request) for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def _conversation(self, request: Request) -> list[dict[str, Any]]:
        """Chat messages; the image stands in the first."""
        texts = [text for turn in request.history for text in (turn.instruction, turn.answer)]
        texts.append(request.instruction)
        if self._prompt != "bare" and not request.verbatim:
            texts[0] = format_instruction(texts[0])
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [self._text(text)]}
            for role, text in zip(itertools.cycle(["user", "assistant"]), texts, strict=False)
        ]
        messages[0]["content"].insert(0, {"type": "image", "image": request.image})
        return messages

    def _text(self, text: str) -> dict[str, Any]:
        """A text part, without the tokens that only the template may write."""
        for token in self._control_tokens:
            text = text.replace(token, " ")
        return {"type": "text", "text": text}

    def _opens_thought(self, prompt_ids: torch.Tensor) -> bool:
        """Whether the template has opened the <think> that the model will close."""
        return self._processor.tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>")

    def _plain_greedy_decoding(self) -> None:
        tokenizer, theirs = self._processor.tokenizer, self._model.generation_config
        end = theirs.eos_token_id if theirs.eos_token_id is not None else tokenizer.eos_token_id
        self._end_ids = frozenset(end if isinstance(end, list) else [end])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._model.generation_config = GenerationConfig(
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id, bos_token_id=theirs.bos_token_id
        )
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(filter(None, [getattr(self._processor, "image_token", None)]))
        self._control_tokens = sorted(special, key=lambda token: (-len(token), token))


class _Logprobs(LogitsProcessor):
    """Changes no score and remembers those of the step at hand: no (steps, batch, vocabulary) tensor is kept.

    A class, because at every step transformers looks the signature of `__call__` up, which takes half a millisecond
    for a method in its place.
    """

    scores: torch.Tensor  # (batch, vocabulary)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.scores = scores
        return scores

    def of(self, new_ids: torch.Tensor) -> torch.Tensor:
        """Natural log-probabilities of `new_ids` (batch, 1)."""
        return self.scores.gather(-1, new_ids) - self.scores.logsumexp(-1, keepdim=True)


class _Recorder(StoppingCriteria):
    """Follows `generate` step by step: hands each new token to its row's writer and says which rows are done."""

    def __init__(
        self,
        writers: list[_Writer],
        logprobs: _Logprobs,
        on_text: Callable[[str], None] | None,
        abandoned: threading.Event | None,
    ) -> None:
        self._writers = writers
        self._logprobs = logprobs
        self._on_text = on_text or (lambda piece: None)
        self._abandoned = abandoned

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        new_ids = input_ids[:, -1:]
        logprobs = self._logprobs.of(new_ids)
        steps = zip(self._writers, new_ids[:, 0].tolist(), logprobs[:, 0].tolist(), strict=True)
        for writer, token_id, logprob in steps:
            if not writer.done:  # a finished row gets padding
                writer.add(token_id, logprob, self._on_text)
        given_up = self._abandoned is not None and self._abandoned.is_set()
        done = [given_up or writer.done for writer in self._writers]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def answers(self) -> list[RawAnswer]:
        for writer in self._writers:
            writer.flush(self._on_text)
        return [RawAnswer(writer.text, tuple(writer.tokens), writer.done) for writer in self._writers]


class _Writer:
    """One row's text as it grows, and the characters that each token wrote.

    A token's text depends on its neighbours (leading spaces, letters of several bytes), so tokens are decoded
    together with the piece before them, and tokens that end within a letter wait for the rest of it.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], inside_thought: bool) -> None:
        self.text = ""
        self.tokens: list[TokenSpan] = []
        self.done = False
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._thought_prefix = "<think>" if inside_thought else ""
        self._written: list[int] = []  # the last piece's ids: context for decoding what follows
        self._waiting: list[int] = []
        self._waiting_logprobs: list[float] = []

    def add(self, token_id: int, logprob: float, on_text: Callable[[str], None]) -> None:
        if token_id in self._end_ids:
            self.done = True
            self.flush(on_text)
        elif token_id not in self._special_ids:
            self._waiting.append(token_id)
            self._waiting_logprobs.append(logprob)
            piece = self._new_text()
            if piece and not piece.endswith("\ufffd"):
                self._write(piece, on_text)
                self.done = "]" in piece and answer_is_complete(self._thought_prefix + self.text)

    def flush(self, on_text: Callable[[str], None]) -> None:
        """Write what still waits: a letter that never got its last byte."""
        if self._waiting:
            self._write(self._new_text(), on_text)

    def _new_text(self) -> str:
        before = self._decode(self._written)
        return self._decode(self._written + self._waiting)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _write(self, piece: str, on_text: Callable[[str], None]) -> None:
        start, end = len(self.text), len(self.text) + len(piece)
        self.tokens += [TokenSpan(start, end, min(logprob, 0.0)) for logprob in self._waiting_logprobs]
        self.text += piece
        self._written, self._waiting, self._waiting_logprobs = self._waiting, [], []
        on_text(piece)


def _check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def _torch_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f'dtype {dtype!r} is no floating-point type of torch: try "float32" or "bfloat16"')
    return found


def _quantization_config(quantization: str | None) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    if quantization not in ("4bit", "8bit"):
        raise InputError(f'quantization must be "4bit", "8bit" or None, not {quantization!r}')
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantization")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _check_device_map(device_map: str | dict[str, Any] | None) -> None:
    """That this machine has the devices, before anything is downloaded for them."""
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in named:
        if device not in (None, "disk", *ACCELERATE_PLACES):
            choose_device(torch.device(device) if isinstance(device, int) else device)


def _check_attention(name: str, revision: str | None, attn_implementation: str | None) -> None:
    """That the model can run so, before its weights are downloaded: it is built without memory."""
    if attn_implementation is None:
        return
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    try:
        with torch.device("meta"):
            AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"{name!r} cannot run with attn_implementation={attn_implementation!r}: {error}\n"
            'Try "sdpa", or leave it out.'
        ) from error


def _load_processor(name: str, revision: str | None) -> Any:
    """The checkpoint's processor, after everything that can be known to be wrong without reading weights."""
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise ModelError(f"there is no model folder {name!r}: give a folder that exists or a hub id 'owner/model'")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"the folder {name!r} has no config.json: give a folder written by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ModelError(
                f"{name!r} is a {config.model_type} model, which does not answer in text about images: "
                "give an image-text-to-text checkpoint such as LLaVA or Qwen-VL"
            )
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except ImportError as error:  # some families' processors need a package of their own
        raise ModelError(f"{name!r} needs one more package: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} cannot be loaded: {error}\nCheck the name, the files and the network.") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{name!r} has no image processor or no tokenizer: add these files to it")
    if not processor.chat_template:
        raise ModelError(f"{name!r} has no chat template: add chat_template.jinja, or take the chat checkpoint")
    return processor


def _load_model(name: str, revision: str | None, options: dict[str, Any]) -> Any:
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name, revision=revision, trust_remote_code=False, output_loading_info=True, **options
        )
        model, report = loaded
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights of {name!r} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):  # they would stay random, and the answers gibberish
        raise ModelError(
            f"{name!r} lacks {len(missing)} of its weights, such as {missing[0]}: "
            "merge the trained part into its base model, or download the checkpoint again"
        )
    return model
