"""Models ready to be attacked or read: by a spec (``load``), or the user's own objects (``wrap``).

Architectures are never named here. The blocks are the list of modules as long as the config says
the model is deep, the decoder is the model without its head, and the embedding is what the model
itself returns. ``core/weights.py`` opens the files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.cast import SETTINGS, attach, load_cast
from core.errors import AttackPlaneError
from core.fingerprint import at_cached_commit, fingerprint_of_parameters, identity
from core.products import use_faster_products
from core.served import Server
from core.specs import ModelSpec, parse_spec, require_weights
from core.weights import default_device, entrance, is_offloaded, load_base, merged_adapter


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
    def positions(self) -> int | None:
        """The most tokens that the model was made for; None where its config says no number."""
        known = getattr(self.config, "max_position_embeddings", None)
        return known if isinstance(known, int) and known > 0 else None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks: the shallowest module list as long as the model is deep."""
        return blocks_of(self.model, self.spec)

    @cached_property
    def offloaded(self) -> bool:
        """Whether weights lie on disk or beside their device, and come when they are needed."""
        return is_offloaded(self.model)

    @property
    def shared_out(self) -> bool:
        """Whether its parts lie on several devices."""
        return self.offloaded or len(set(getattr(self.model, "hf_device_map", {}).values())) > 1

    @property
    def side_by_side(self) -> bool:
        """Whether two batches run faster beside each other than one after the other."""
        return self.device.type == "cpu" and torch.get_num_threads() > 1 and not self.offloaded

    @property
    def hook(self) -> str | None:
        """What acts on this model besides its weights, or None. It must see whole prompts."""
        return getattr(self.model, "attack_plane_hook", None)

    @cached_property
    def embedding_table(self) -> torch.Tensor:
        """(vocabulary, d_model): what the embedding layer returns per id, its scaling included."""
        embedding = self.model.get_input_embeddings()
        if type(embedding).forward is nn.Embedding.forward and not embedding.weight.is_meta:
            return embedding.weight
        with torch.no_grad():
            return embedding(torch.arange(embedding.weight.shape[0], device=self.device))

    def weights_changed(self) -> None:
        """Forget what was made from the weights; call it after every training step."""
        vars(self).pop("embedding_table", None)

    @cached_property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def takes_logits_to_keep(self) -> bool:
        """Whether the model can apply its head at the last positions only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def last_logits(self, keep: int, **inputs: Any) -> torch.Tensor:
        """(batch, keep, vocabulary) float32 logits of the last ``keep`` positions.

        They come from the model's own head.
        """
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
            f"{self.spec}: {type(self.model).__name__}, {self.n_layers} layers, d_model "
            f"{self.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {template}"
            + (f"; {self.hook}" if self.hook else "")
        )


def blocks_of(model: Any, spec: str) -> nn.ModuleList:
    """The transformer blocks of a model.

    Raises:
        AttackPlaneError: there is no list of modules as long as the model is deep.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [
        (name.count("."), name, module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not candidates:
        raise AttackPlaneError(
            "cannot find the transformer blocks",
            where=spec,
            got=f"no list of {depth} modules in {type(model).__name__}",
            remedy="only decoder-only transformers are served",
        )
    return min(candidates, key=lambda item: item[:2])[2]


def load(
    spec: str | ModelSpec, device: torch.device | str | dict[str, str] | None = None
) -> LoadedModel:
    """Load a model for reading and attacking: frozen, in evaluation mode, adapter merged.

    Args:
        spec: ``embedded``, ``ORG/NAME[@REVISION]`` of the hub, a folder or a GGUF file, each with
            ``+ADAPTER_FOLDER`` and ``?dtype=bfloat16`` or ``?load=4bit``. No code from a folder
            runs.
        device: for example ``"cuda:1"``; None takes CUDA, else MPS, else the CPU. A device, or
            ``"disk"``, for each part by its name shares the model out, as ``?device_map=auto`` does
            by itself.

    Raises:
        AttackPlaneError: unknown spec, unreachable or broken files, weights that are missing,
            unexpected or wrongly shaped, code in the folder, not decoder-only, missing extra.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    require_weights(parsed)
    places = device if isinstance(device, dict) else parsed.device_map
    one = default_device() if device is None or isinstance(device, dict) else torch.device(device)
    model, tokenizer = load_base(parsed, one, places)
    if parsed.adapter and is_offloaded(model):
        raise AttackPlaneError(
            "an adapter cannot be merged into weights that lie on disk or beside their device",
            where=f"model spec {parsed.text!r}",
            remedy="merge it on a machine that holds the model, and name the merged folder",
        )
    if parsed.adapter and (Path(parsed.adapter) / SETTINGS).is_file():
        cast = load_cast(Path(parsed.adapter))
        attach(model, cast, blocks_of(model, parsed.text), parsed.text)
    else:
        model = merged_adapter(parsed, model)
    return frozen(parsed, model, tokenizer)


def frozen(spec: ModelSpec, model: Any, tokenizer: Any) -> LoadedModel:
    """A model as ``load_base`` gives it, in evaluation mode with frozen parameters."""
    model.eval().requires_grad_(False)
    use_faster_products(model)
    precision = spec.load or str(model.dtype).removeprefix("torch.")
    commit = getattr(model.config, "_commit_hash", None)
    own = identity(spec, precision, commit=commit)
    assert own is not None  # it is known where the precision is
    return LoadedModel(spec.text, model, tokenizer, entrance(model), own)


def wrap(model: Any, tokenizer: Any, name: str = "wrapped") -> LoadedModel:
    """A model of the caller's own: what ``AutoModelForCausalLM`` and ``AutoTokenizer`` gave.

    Both are left as they were found: training mode, gradients, hooks, tokenizer. A peft model is
    read with its active adapter. ``fingerprint`` is made from samples of the weights as they are
    now. Where training goes on, wrap anew, or say ``weights_changed`` to what was built.

    Args:
        model: a decoder-only language model, on any device.
        tokenizer: its fast tokenizer.
        name: what results call the model.

    Raises:
        AttackPlaneError: not a decoder-only language model, not a fast tokenizer, or an adapter
            that learns a prompt.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise AttackPlaneError(
            "an adapter that learns a prompt or a prefix cannot be read",
            where="wrap",
            got=type(model).__name__,
            remedy="give an adapter that changes weights, such as LoRA",
        )
    if not hasattr(inner, "config") or inner.get_output_embeddings() is None:
        raise AttackPlaneError(
            "not a language model with a head",
            where="wrap",
            got=type(model).__name__,
            remedy="give what AutoModelForCausalLM.from_pretrained returns",
        )
    if inner.config.is_encoder_decoder:
        raise AttackPlaneError("not a decoder-only model", where="wrap", got=type(inner).__name__)
    if not getattr(tokenizer, "is_fast", False):
        raise AttackPlaneError(
            "not a fast tokenizer",
            where="wrap",
            got=type(tokenizer).__name__,
            remedy="give what AutoTokenizer.from_pretrained returns",
        )
    device = next(inner.parameters()).device
    return LoadedModel(name, inner, tokenizer, device, fingerprint_of_parameters(inner))


@contextmanager
def evaluating(loaded: LoadedModel) -> Iterator[None]:
    """While open, every module is in evaluation mode; afterwards each is as it was."""
    training = [module for module in loaded.model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ModelHandle:
    """A model that is named now and loaded when it is first needed.

    A stage whose results are all there asks for ``fingerprint`` alone, which reads samples of the
    files and no weights.

    Args:
        spec: a model spec.
        on_load: told of the model as soon as it is loaded.
        load_by: what loads it.
    """

    def __init__(
        self,
        spec: str,
        on_load: Callable[[LoadedModel], None] | None = None,
        *,
        have: LoadedModel | None = None,
        load_by: Callable[[ModelSpec], LoadedModel] = load,
    ) -> None:
        self._parsed = None if have else parse_spec(spec)
        self.spec = self._parsed.text if self._parsed else spec
        self._on_load, self._load_by = on_load, load_by
        if have:
            self.loaded = have

    @cached_property
    def server(self) -> Server | None:
        """Whom to ask for replies, where the model is a served one: its weights are not here."""
        served = self._parsed is not None and self._parsed.kind == "served"
        return Server(self._parsed.base) if self._parsed and served else None

    @cached_property
    def loaded(self) -> LoadedModel:
        assert self._parsed is not None
        known = "fingerprint" in vars(self)  # of a commit of the hub: that one is loaded
        model = self._load_by(at_cached_commit(self._parsed) if known else self._parsed)
        if vars(self).get("fingerprint", model.fingerprint) != model.fingerprint:
            raise AttackPlaneError(
                "the model's files changed while it was in use",
                where=self.spec,
                remedy="run the same command again, or name a revision with @",
            )
        if self._on_load:
            self._on_load(model)
        return model

    def release(self) -> None:
        """Let the weights go; they are loaded anew if they are asked for again."""
        if self._parsed is not None:
            vars(self).pop("loaded", None)

    @cached_property
    def fingerprint(self) -> str:
        """As ``LoadedModel.fingerprint``."""
        return self.known_fingerprint() or self.loaded.fingerprint

    def known_fingerprint(self) -> str | None:
        """The fingerprint, or None where it takes loading the weights to know it."""
        if self.server:
            return self.server.fingerprint
        if "loaded" in vars(self):
            return self.loaded.fingerprint
        if "fingerprint" in vars(self):
            return self.fingerprint
        assert self._parsed is not None
        return identity(self._parsed)


OpenModel = Callable[[str], ModelHandle]
"""Names a model by its spec; stages take one, so that a caller may share or watch what is
loaded."""


def handle_of(loaded: LoadedModel) -> ModelHandle:
    """A handle of a model that is loaded already."""
    return ModelHandle(loaded.spec, have=loaded)
