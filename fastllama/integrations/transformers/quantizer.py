"""`quantization_config=FastLlamaConfig(...)` for transformers' from_pretrained: quantizes linear layers on loading.

transformers 5 passes each weight as it is read, so that peak memory is the quantized model and one weight; 4.57 loads
the whole model first. Models are saved as compressed-tensors, which load without this package: with a quantization
method of our own in config.json, transformers would use random weights and only log a line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastllama.errors import brief, check_choice, check_shape
from fastllama.integrations.transformers.linears import HF_LINEARS
from fastllama.integrations.transformers.trouble import DTYPES
from fastllama.io.packed import compressed_tensors
from fastllama.io.packed.compressed_tensors import Scheme
from fastllama.kernels.reference.int4 import GROUPS
from fastllama.layers.quantized import QuantizedLinear
from fastllama.quant.rounding import round_to_nearest

METHOD = "fastllama"  # in transformers' registries; never written to files
_STREAMS = hasattr(HfQuantizer, "get_quantize_ops")  # from transformers 5 on

AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)  # allows this module to be reloaded
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)


@register_quantization_config(METHOD)
class FastLlamaConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes the linear layers of a model, by rounding to nearest.

    scheme: "int4", "int8" or "w8a8" (which also rounds activations to 8 bits at each call).
    group_size: of "int4", the columns per scale: 32, 64 or 128. A layer whose columns it does not divide uses the next
    smaller of these that does, or whole rows. The 8-bit schemes have one scale per row.
    modules_to_not_convert: names of modules, or their last parts ("k_proj", "layers.0"), whose linear layers are not
    quantized. The output head, and all else outside the model's body, never is.
    """

    _described: dict[str, Any] | None = None

    def __init__(
        self, scheme: str, group_size: int = max(GROUPS), modules_to_not_convert: Iterable[str] | None = None
    ) -> None:
        check_choice("scheme", scheme, HF_LINEARS)
        check_choice("group_size", group_size, GROUPS)
        if scheme != "int4" and group_size != max(GROUPS):
            raise ValueError(
                f"group_size is {group_size} for scheme {scheme!r}, which has one scale per row; legal: leave it out"
            )
        names = modules_to_not_convert
        listed = isinstance(names, Iterable) and not isinstance(names, str)
        if names is not None and not (listed and all(isinstance(name, str) for name in names)):
            raise TypeError(f"modules_to_not_convert is {brief(names)}; legal: a list of names of modules, or None")
        self.quant_method = METHOD  # type: ignore[assignment]  # any registered string
        self.scheme, self.group_size = scheme, group_size
        self.modules_to_not_convert = None if names is None else list(names)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> FastLlamaConfig | tuple[FastLlamaConfig, dict[str, Any]]:
        own = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(own, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json: compressed-tensors' configuration, where a model was quantized with this."""
        return super().to_dict() if self._described is None else copy.deepcopy(self._described)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same, for transformers 4.57 to print."""
        return self.to_dict()

    def of(self, model: nn.Module) -> FastLlamaConfig:
        """A copy that describes a model quantized with this, in its current state."""
        other = copy.copy(self)
        schemes = {name: Scheme.of(layer) for name, layer in _quantized(model)}
        dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        other._described = compressed_tensors.to_config(schemes, dense)
        return other


@register_quantizer(METHOD)
class FastLlamaQuantizer(HfQuantizer):
    """The quantizer that from_pretrained calls while loading a model, and save_pretrained while saving one."""

    quantization_config: FastLlamaConfig

    def __init__(self, quantization_config: FastLlamaConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._targets: frozenset[str] = frozenset()  # names of linear layers to quantize
        self._misfits: set[str] = set()  # of those, the ones with another shape in the files
        self._missing: set[str] = set()  # names missing in the files, by transformers' count

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map is {brief(device_map)}; legal beside a FastLlamaConfig: accelerators alone, or the CPU "
                "alone, as quantized weights are not offloaded"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        asked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(asked, torch.dtype) and asked not in DTYPES:  # 4.57 passes names, "auto" and None, too
            raise ValueError(f"dtype is {dtype}; legal beside a FastLlamaConfig: {', '.join(map(str, DTYPES))}")
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Choose the layers to quantize. They stay nn.Linear on meta: loaded weights are cast to their dtype."""
        kept = self.quantization_config.modules_to_not_convert or []
        names = [name for name, _ in model.named_modules()]
        for each in kept:
            if not any(_is_part(each, name) for name in names):
                raise ValueError(
                    f"modules_to_not_convert has {each!r}, which is not a module of a {type(model).__name__}; legal: "
                    "names as in model.named_modules(), or parts of them"
                )
        head, body = model.get_output_embeddings(), model.base_model
        inside = {id(module) for module in body.modules()}
        for each in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):  # the model's own code relies on it
            kept = [*kept, *(getattr(model, each, None) or ())]
        self._targets = frozenset(
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear
            and module is not head
            and id(module) in inside
            and not any(_is_part(each, name) for each in kept)
        )
        if not self._targets:
            raise ValueError(
                f"quantization_config is {self.quantization_config.scheme!r} for a {type(model).__name__} in which no "
                "layer is left to convert; legal: a model with nn.Linear that are not in modules_to_not_convert"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether to call `convert` with a loaded tensor."""
        module, _, name = param_name.rpartition(".")
        if not _STREAMS or name != "weight" or module not in self._targets or module in self._misfits:
            return False
        return type(model.get_submodule(module)) is nn.Linear

    def get_quantize_ops(self) -> FastLlamaQuantizer:
        """An object with `convert`, as transformers' ConversionOps; 4.57 has no such class to inherit from."""
        return self

    def convert(
        self,
        input_dict: Mapping[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Replace an nn.Linear whose weight has been loaded by a quantized layer.

        Returns tensors still to be loaded unchanged: none, or a weight of another shape, which transformers then
        reports.
        """
        (values,) = input_dict.values()
        weight = values[0] if isinstance(values, list) else values
        module = full_layer_name.rpartition(".")[0]
        if weight.shape != model.get_submodule(module).weight.shape:
            self._misfits.add(module)
            return {full_layer_name: weight}
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
            self._missing = missing_keys  # loading continues to remove names from it
        self._replace(model, module, weight)
        return {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantize the weights that were not passed to `convert`, and set the entry of config.json.

        Raises ValueError for a weight of another shape than its layer's, which transformers 5.17 accepts.
        """
        for name in sorted(self._targets):
            layer = model.get_submodule(name)
            if type(layer) is nn.Linear:
                check_shape(f"{name}.weight", layer.weight, (layer.out_features, layer.in_features))
                self._replace(model, name, layer.weight.detach())
            elif layer.bias is not None and f"{name}.bias" in self._missing:
                layer.bias.data.zero_()  # transformers would initialise an nn.Linear's bias, but not this layer's
        self._missing = set()
        self._describe(model)
        for part in _parts(model):
            if next(_quantized(part), None) is not None:  # it may be saved separately
                part.hf_quantizer = self
        return model

    @torch.no_grad()
    def _replace(self, model: nn.Module, name: str, weight: Tensor) -> None:
        config, linear = self.quantization_config, model.get_submodule(name)
        rounded = round_to_nearest(weight, config.scheme, config.group_size if config.scheme == "int4" else None)
        bias: Any = linear.bias  # may be on meta, and is then loaded into the new layer
        layer: Any = HF_LINEARS[config.scheme].of(rounded, bias)
        layer._is_hf_initialized = True
        _put(model, name, layer)

    def _describe(self, model: Any) -> None:
        self.quantization_config = model.config.quantization_config = self.quantization_config.of(model)
        for part in _parts(model):
            if part.config is not model.config:  # a part that was saved separately: the entry belongs to the whole
                vars(part.config).pop("quantization_config", None)

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict for save_pretrained, as compressed-tensors; config.json, written next, declares that.

        The tensors of quantized layers are copies on the CPU. args: transformers 4.57 passes safe_serialization.
        """
        self._describe(model)
        found = model.state_dict()
        for name, layer in _quantized(model):
            for each in ("packed", "scales", "zeros"):
                found.pop(f"{name}.{each}", None)
            weight = layer.quantized_rows(0, layer.out_features)
            found |= {key: tensor.cpu() for key, tensor in compressed_tensors.to_tensors(name, weight).items()}
        return found, {}

    @torch.no_grad()
    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Convert back to nn.Linear, with dequantized weights rounded to dtype.

        dtype: a name where save_pretrained wrote it into the model's configuration; None is the model's dtype.
        """
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name, layer in list(_quantized(model)):
            with torch.device("meta"):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight = nn.Parameter(layer.weight.to(target))
            linear.register_parameter("bias", layer.bias)
            _put(model, name, linear)
        for part in _parts(model):
            vars(part).pop("hf_quantizer", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


def _parts(model: nn.Module) -> Iterator[Any]:
    """The transformers models within a model, each of which save_pretrained may save separately."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, layer.train(owner.get_submodule(child).training))


def _is_part(part: str, name: str) -> bool:
    """Whether `part` is a sequence of whole components of a module's name: "layers.0" of "model.layers.0.mlp"."""
    return f".{part}." in f".{name}."
