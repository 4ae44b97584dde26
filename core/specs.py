"""Model specs: the one way in which a model is named, in commands, sweeps, run folders and the API.

embedded                 SmolLM2-135M-Instruct, fetched once from the Python package index
ORG/NAME[@REVISION]      a model of the Hugging Face hub
FOLDER                   a local folder in Hugging Face format
FILE.gguf                a GGUF file, converted once to float32 safetensors in the cache folder
ANY+ADAPTER              any of them with a LoRA adapter folder, merged into the weights, or with a
                         folder of `train cast`, a hook at inference time
ANY?dtype=bfloat16       another precision (float32, bfloat16, float16)
ANY?load=4bit            4-bit weights by bitsandbytes (CUDA; extra `quantised`)
ANY?device_map=auto      layers over several GPUs, what does not fit on the CPU and on disk
                         (transformers' own sharding; balanced and sequential too)
http://HOST/v1#MODEL     a served model, as a target (``core/served.py``; extra `servers`)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import AttackPlaneError
from core.served import is_served, parse_server

FORMS = (
    "embedded, ORG/NAME[@REVISION], a folder, a .gguf file; each optionally +ADAPTER_FOLDER, "
    "then ?dtype=float32|bfloat16|float16, ?load=4bit or ?device_map=auto; as a target "
    "http://HOST/v1#MODEL too"
)
ADAPTERS = ("adapter_config.json", "cast.json")
"""Files by which a folder is known as a LoRA adapter or as a CAST hook."""
OPTIONS = {
    "dtype": ("float32", "bfloat16", "float16"),
    "load": ("4bit",),
    "device_map": ("auto", "balanced", "sequential"),
}
"""What may stand behind the ``?`` of a spec."""


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec.

    ``kind`` is embedded, hub, folder, gguf or served; ``base`` its name, path or address.
    """

    text: str
    kind: str
    base: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    load: str | None = None
    device_map: str | None = None


def parse_spec(text: str) -> ModelSpec:
    """Parse one spec. An unknown form is an error that names the forms.

    Local paths are looked up on disk.
    """

    def fault(what: str, got: object) -> AttackPlaneError:
        return AttackPlaneError(
            what, where=f"model spec {text!r}", got=got, remedy=f"forms: {FORMS}"
        )

    if is_served(text):
        named = parse_server(text)
        return ModelSpec(named.text, "served", text.strip())
    rest, mark, query = text.strip().partition("?")
    options: dict[str, str] = {}
    for pair in query.split("&") if mark else ():
        key, _, value = pair.partition("=")
        if value not in OPTIONS.get(key, ()):
            raise fault("unknown option", pair or "nothing between ?, & and the end")
        if key in options:
            raise fault("an option that is given twice", key)
        options[key] = value
    base, plus, adapter = (rest, "", "") if Path(rest).is_dir() else rest.partition("+")
    if plus and not any((Path(adapter) / name).is_file() for name in ADAPTERS):
        raise fault(f"no LoRA adapter in that folder (no {' or '.join(ADAPTERS)})", adapter)

    def spec(kind: str, name: str, revision: str | None = None) -> ModelSpec:
        return ModelSpec(
            text.strip(),
            kind,
            name,
            revision,
            adapter or None,
            options.get("dtype"),
            options.get("load"),
            options.get("device_map"),
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


def require_weights(spec: ModelSpec) -> None:
    """Refuse a served model where weights are read."""
    if spec.kind == "served":
        raise AttackPlaneError(
            "the weights of a served model are not here, and this needs them",
            where=f"model spec {spec.text!r}",
            remedy="transfer, sweep, evaluate and pair take it as a target; here name a folder or "
            "ORG/NAME",
        )


def canonical_name(spec: str) -> str:
    """A file name for a spec."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in spec).strip("_.") or "model"


def short_spec(spec: str) -> str:
    """A spec for a title or a class name: an adapter's folder by its last part.

    A checkpoint ``step-N`` keeps the name of its training.
    """
    base, plus, adapter = spec.partition("+")
    if not plus:
        return base
    path = Path(adapter)
    training = f"{path.parent.name}/" if path.name.startswith("step-") and path.parent.name else ""
    return f"{base}+{training}{path.name}"
