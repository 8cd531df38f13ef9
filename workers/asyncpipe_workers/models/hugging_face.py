"""Any other decoder of transformers that has a pipeline plan: its own code, with our weights, products and cache.

Its model is built with empty parameters; of its layers only the stage's are kept, and their linears become ours. Attention
goes through transformers' registry of attention functions to the cache. A step is one row of tokens to it: which of them are
whose is known to the attention alone. Shapes: T rows of a step, D hidden, H heads, K head size.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from asyncpipe.errors import Invalid
from asyncpipe.model_shape import ModelShape
from asyncpipe_workers.attention import QKV, AttentionForm
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.units import StageUnits, Unit
from asyncpipe_workers.models.weights import Projection, Rows, Weights

NAME = "asyncpipe"  # of our attention, in transformers' registries
UNKNOWN_ATTENTION = ("s_aux", "sinks", "position_bias", "alibi", "indices")  # what an attention may ask for that ours lacks
PROBE_TOKENS = 3


class _Call(NamedTuple):
    """What an attention needs beside its queries, keys and values."""

    layout: StepLayout
    cache: KVCache
    first_layer: int
    max_context_len: int


_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("call")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceConfig(ModelShape):
    """`native` is transformers' own; `parts` are those of its base model, in order."""

    native: Any
    parts: tuple[str, ...]

    has_plain_attention = False  # nobody knows

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> HuggingFaceConfig:
        """Raises Invalid for a model that transformers does not know, or has no pipeline plan for."""
        from transformers import CONFIG_MAPPING

        shape = ModelShape.from_fields(fields)
        kind = str(fields.get("model_type"))
        if kind not in CONFIG_MAPPING:
            raise Invalid(f"model_type {kind!r} is not supported: this version of transformers has no pipeline plan for it")
        native = CONFIG_MAPPING[kind].from_dict(dict(fields))
        plan = getattr(native, "base_model_pp_plan", None)
        if not plan:
            raise Invalid(f"{fields.get('architectures')} is not supported: transformers has no pipeline plan for it")
        return cls(**dataclasses.asdict(shape), native=native, parts=tuple(plan))


def hugging_face_units(
    config: HuggingFaceConfig, *, first: int, last: int, separate: bool, logits_rows: int | None
) -> StageUnits:
    """Decoder layers [first, last) as one unit, with the embedding before the first layer and the head after the last."""
    is_last = last == config.num_layers
    layers = Unit("layers", functools.partial(_Layers, config=config, first=first, last=last), cache_layer=0)
    embedding = Unit("embedding", functools.partial(_Embedding, config=config)) if first == 0 else None
    if not is_last:
        return StageUnits(embedding, (layers,))
    return StageUnits(
        embedding,
        (layers,),
        Unit("head", lambda weights: _unchanged),  # the norm is the layers' end
        (Unit("logits", functools.partial(_logits, config=config)),),
    )


class _Embedding:
    """Tokens to what the model's `forward` takes as `inputs_embeds`."""

    def __init__(self, weights: Weights, config: HuggingFaceConfig) -> None:
        name = config.parts[0]
        self._module = getattr(_skeleton(config), name)
        _fill(self._module, f"{name}.", weights)
        _bring_buffers(self._module)

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        hidden_TD: torch.Tensor = self._module(token_ids_T)
        return hidden_TD


class _Layers:
    """Decoder layers [first, last), and after the last one of all what follows them."""

    def __init__(self, weights: Weights, config: HuggingFaceConfig, first: int, last: int) -> None:
        self._model = _skeleton(config)
        self._first = first
        self._config = config
        names = config.parts
        stack = next((name for name in names if isinstance(getattr(self._model, name, None), nn.ModuleList)), None)
        if stack is None:
            raise Invalid(f"{config.native.architectures} is not supported: its pipeline plan names no stack of layers")
        setattr(self._model, names[0], nn.Identity())
        own = getattr(self._model, stack)[first:last]
        setattr(self._model, stack, nn.ModuleList())
        after = names[names.index(stack) + 1 :] if last < config.num_layers else ()
        for name in after:
            setattr(self._model, name, nn.Identity())
        self._model.config.num_hidden_layers = last - first
        if first > 0:
            self._check_input_is_kept(after)
        setattr(self._model, stack, own)
        for index, layer in enumerate(own):
            _fill(layer, f"{stack}.{first + index}.", weights)
        for name, module in self._model.named_children():
            if name != stack:
                _fill(module, f"{name}.", weights)
        _bring_buffers(self._model)

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        token = _call.set(_Call(layout, cache, self._first, self._config.max_context_len))
        try:
            return self._run(hidden_TD, layout.positions_T)
        finally:
            _call.reset(token)

    def _run(self, hidden_TD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        output = self._model(inputs_embeds=hidden_TD[None], position_ids=positions_T[None], use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _check_input_is_kept(self, after: tuple[str, ...]) -> None:
        """Some models do something to embeddings in `forward`, which a later stage's input must not see again."""
        replaced = {name: getattr(self._model, name) for name in self._config.parts[2:] if name not in after}
        for name in replaced:
            setattr(self._model, name, nn.Identity())
        probe_TD = torch.linspace(-1, 1, PROBE_TOKENS * self._config.hidden_size).view(PROBE_TOKENS, -1)
        with torch.inference_mode():
            is_kept = torch.equal(self._run(probe_TD, torch.arange(PROBE_TOKENS)), probe_TD)
        for name, module in replaced.items():
            setattr(self._model, name, module)
        if not is_kept:
            name = type(self._model).__name__
            raise Invalid(f"{name} changes its embeddings before its layers, so that it runs on one stage only: use --stages 1")


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _logits(weights: Weights, config: HuggingFaceConfig) -> Projection:
    """With what some families do to them."""
    native, of = config.native, (config.vocab_size, config.hidden_size)
    name = f"{config.parts[0]}.weight" if native.tie_word_embeddings else "lm_head.weight"
    project = weights.head(name, 0, config.vocab_size, of=of)
    factor = getattr(native, "logit_scale", None) or 1 / (getattr(native, "logits_scaling", None) or 1)
    softcap = getattr(native, "final_logit_softcapping", None)

    def logits(x_RD: torch.Tensor) -> torch.Tensor:
        logits_RV = project(x_RD) * factor
        return logits_RV if softcap is None else torch.tanh(logits_RV / softcap) * softcap

    return logits


# --- the model without its numbers ------------------------------------------------------------------------------------


def _skeleton(config: HuggingFaceConfig) -> Any:
    """The base model; its parameters are empty, its buffers are there."""
    from transformers import AutoModel

    _register()
    native = copy.deepcopy(config.native)  # the model keeps it, and changes it
    with _empty_parameters():
        return AutoModel.from_config(native, attn_implementation=NAME).eval()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters that are made within have a shape and nothing else."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(module: nn.Module, prefix: str, weights: Weights) -> None:
    """Its parameters, by their names in the checkpoint; linears become ours."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            rows = [Rows(f"{prefix}{name}", child.out_features)]
            setattr(module, name, _Linear(weights.linear(rows, child.in_features, bias=child.bias is not None)))
        else:
            _fill(child, f"{prefix}{name}.", weights)
    for name, parameter in list(module.named_parameters(recurse=False)):
        tensor = weights.tensor(f"{prefix}{name}", tuple(parameter.shape))
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _bring_buffers(module: nn.Module) -> None:
    """To where the parameters are: else some would go there in every step."""
    module.to(next(module.parameters()).device)


class _Linear(nn.Module):
    def __init__(self, project: Projection) -> None:
        super().__init__()
        self._project = project

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._project(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


# --- attention --------------------------------------------------------------------------------------------------------


@functools.cache
def _register() -> None:
    """Without a function for masks, as which transformers makes none: who sees whom is the cache's to know."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: Any,
    query_1HTK: torch.Tensor,
    key_1GTK: torch.Tensor,
    value_1GTK: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions are called."""
    call = _call.get()
    if found := [name for name in UNKNOWN_ATTENTION if others.get(name) is not None]:
        raise Invalid(f"{type(module).__name__} needs {found[0]}, which is not supported")
    size = query_1HTK.shape[-1]
    if value_1GTK.shape[-1] != size:
        raise Invalid(f"{type(module).__name__} has keys of {size} numbers and values of {value_1GTK.shape[-1]}: not supported")
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1) for x in (query_1HTK, key_1GTK, value_1GTK))
    if scaling is not None and not math.isclose(scaling, 1 / math.sqrt(size)):
        q_THK = q_THK * (scaling * math.sqrt(size))
    window = None if sliding_window is None or sliding_window >= call.max_context_len else sliding_window
    layer = module.layer_idx - call.first_layer
    return call.cache.attend(layer, QKV(q_THK, k_TGK, v_TGK), call.layout, AttentionForm(window, softcap))[None], None
