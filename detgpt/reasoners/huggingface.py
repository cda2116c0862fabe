"""Any image-text-to-text checkpoint of transformers as a reasoner: LLaVA, Qwen-VL, InternVL, Gemma, our own.

The checkpoint's own chat template writes the prompt and decoding is plain greedy: the checkpoint's sampling
and penalties are left out, so that an answer does not depend on its neighbours in the batch and the
probabilities are the model's own. A row stops as soon as its answer line is complete.
"""

from __future__ import annotations

import importlib.util
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
    SuppressTokensLogitsProcessor,
)

from detgpt.device import choose_device
from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.images import image_key
from detgpt.memory import explained_when_short_of_memory
from detgpt.reasoners import RawAnswer, Request, chat, check_prompt
from detgpt.reasoners.drafts import PROMPT, Drafts
from detgpt.reasoners.prefix import KeptPrefixes, remembers_tokens_only
from detgpt.reasoners.recording import Recorder, Writer

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

    assistant: a smaller checkpoint of the same family that drafts the answers, or "prompt", which drafts them from the
    prompt's own words. The model reads several drafted tokens at once and keeps those that it would have written, so
    the text is the same. Only for single requests and streams, which then keep no images; a batch runs as it does
    without. `acceptance` says how much of the drafts was kept.

    prompt: "full" tells the model the three steps and the answer's form; "bare" sends the instruction as the user
    wrote it, for a model that was trained so. None: bare where the checkpoint's config says `detgpt_prompt: "bare"`.

    Raises `ModelError` when the checkpoint is missing or of the wrong kind, or memory is short (when loading or
    later), `MissingExtraError` without bitsandbytes, `InputError` for a wrong argument or a missing device.
    """

    _drafts: Drafts | None

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
        assistant: str | os.PathLike[str] | None = None,
        prompt: str | None = None,
    ) -> None:
        if kept_images < 0:
            raise InputError(f"kept_images must be 0 or more, not {kept_images}")
        check_prompt(prompt)
        name = os.fspath(model_id_or_folder)
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
        options = {option: value for option, value in options.items() if value is not None}
        processor = load_processor(name, revision)
        _check_attention(name, revision, attn_implementation)
        self._take(_load_placed(name, revision, options, device), processor, name, kept_images)
        if prompt is not None:
            self._bare = prompt == chat.BARE
        if assistant is not None:
            self._drafts = self._load_drafts(os.fspath(assistant), options)

    @classmethod
    def of(cls, model: Any, processor: Any, name: str, *, kept_images: int = 0) -> HuggingFaceReasoner:
        """A reasoner of a loaded model and its processor, such as one in training, whose weights may change between
        requests where no images are kept.

        The model answers as it is (call its `eval` before), and its `generation_config` becomes plain greedy decoding.
        Raises `ModelError` for a processor without an image processor, a tokenizer or a chat template.
        """
        _check_processor(processor, name)
        reasoner = cls.__new__(cls)
        reasoner._take(model, processor, name, kept_images)
        return reasoner

    def _take(self, model: Any, processor: Any, name: str, kept_images: int) -> None:
        self.name = name
        self._model, self._processor = model, processor
        self.family: str = model.config.model_type
        self._bare = chat.is_bare(model.config)
        self._plain_greedy_decoding()
        self._prefixes = KeptPrefixes(model, kept_images)
        self._drafts = None
        self._lock = threading.Lock()

    def _load_drafts(self, assistant: str, options: dict[str, Any]) -> Drafts:
        """Raises `ModelError` for an assistant that reads other prompts, and a model that cannot take a token back."""
        if not remembers_tokens_only(self._model.config):
            raise ModelError(f"{self.name!r} cannot take back a token that it has read: leave the assistant out")
        if assistant == PROMPT:
            return Drafts(None)
        _check_same_prompts(self._processor, load_processor(assistant, None), assistant)
        model = _load_placed(assistant, None, options, self._model.device)
        model.generation_config = self._model.generation_config
        return Drafts(model)

    @property
    def acceptance(self) -> float | None:
        """Of the tokens that the assistant has drafted so far, the share that the model kept; None without drafts."""
        return self._drafts.acceptance if self._drafts else None

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
        images = [image_key(request.image) if request.image else None for request in requests]
        with self._lock, torch.inference_mode():
            inputs = self._encode(requests)
            thinks = [self._opens_thought(ids) for ids in inputs["input_ids"]]
            tokenizer, end_ids = self._processor.tokenizer, self._end_ids
            writers = [Writer(tokenizer, end_ids, inside_thought) for inside_thought in thinks]
            recorder = Recorder(writers, on_text, abandoned)
            hooks = {"logits_processor": [self._no_pictures, recorder.logprobs], "stopping_criteria": [recorder]}
            if self._drafts and len(requests) == 1:
                arguments = {**inputs, **self._drafts.arguments(inputs), **hooks}
                with explained_when_short_of_memory(self.name, MEMORY_REMEDIES):
                    self._model.generate(**arguments, max_new_tokens=max_new_tokens)
                self._drafts.count(recorder.drafted, recorder.accepted)
                return recorder.answers()
            if first := self._prefixes.rows_to_run_first(images):
                self._run([images[row] for row in first], self._encode([requests[row] for row in first]), 1)
            self._run(images, inputs, max_new_tokens, **hooks)
            return recorder.answers()

    def _run(self, images: list[str | None], inputs: Any, max_new_tokens: int, **hooks: Any) -> None:
        with explained_when_short_of_memory(self.name, MEMORY_REMEDIES):
            try:
                arguments = self._prefixes.resume(images, inputs, max_new_tokens)
                sequences = self._model.generate(**arguments, max_new_tokens=max_new_tokens, **hooks)
                self._prefixes.keep(images, arguments, sequences)
            except Exception:  # whatever it was: if memory was short, the next call has more
                self._prefixes.clear()
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
        texts[0] = chat.worded(texts[0], bare=request.verbatim or self._bare)
        return chat.conversation(texts, request.image, self._control_tokens)

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
        # An answer holds no picture; a draft from the prompt would.
        pictures = [getattr(self._model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        self._no_pictures = SuppressTokensLogitsProcessor(list(filter(None, pictures)), device=self._model.device)
        self._control_tokens = chat.control_tokens(self._processor)


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


def load_processor(name: str, revision: str | None) -> Any:
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
    _check_processor(processor, name)
    return processor


def _check_processor(processor: Any, name: str) -> None:
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{name!r} has no image processor or no tokenizer: add these files to it")
    if not processor.chat_template:
        raise ModelError(f"{name!r} has no chat template: add chat_template.jinja, or take the chat checkpoint")


def _check_same_prompts(processor: Any, other: Any, name: str) -> None:
    """That both make the same tokens and pixels of a prompt: an assistant gets those of the model."""
    content = [{"type": "image", "image": Image.new("RGB", (96, 64))}, {"type": "text", "text": "I am thirsty: Café?"}]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = [{"role": "user", "content": content}]
    prompt, others = (p.apply_chat_template(messages, **options) for p in (processor, other))
    same = prompt.keys() == others.keys() and all(torch.equal(prompt[key], others[key]) for key in prompt)
    if not same or processor.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ModelError(
            f"the assistant {name!r} reads a prompt as other tokens or pixels than the model: "
            'give a smaller checkpoint of the same family, or "prompt"'
        )


def _load_placed(name: str, revision: str | None, options: dict[str, Any], device: torch.device) -> Any:
    """The checkpoint on `device`, or where the option `device_map` says."""
    with explained_when_short_of_memory(name, MEMORY_REMEDIES):
        model = load_model(name, revision, options)
        if "device_map" not in options:
            model.to(device)
    return model.eval()


def load_model(
    name: str, revision: str | None, options: dict[str, Any], auto_class: Any = AutoModelForImageTextToText
) -> Any:
    """The checkpoint with all of its weights."""
    try:
        loaded: Any = auto_class.from_pretrained(
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
