"""Whether the networks of a pipeline belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arimg.checkpoints import SECOND
from arimg.errors import CheckpointError
from arimg.models.base import order_of
from arimg.tokenizers.base import TokenSpace


def check_fit(tokenizer: Any, transformer: Any, control: Any, decoders: Mapping[str, Any]) -> None:
    """Raises CheckpointError when a part is none of its kind, or parts belong to different models. `decoders`: networks
    of single decoders, by name."""
    kinds = [("tokenizer", tokenizer, "space"), ("transformer", transformer, "null"), ("control", control, "inject"),
             *((SECOND + name, network, "inject_points") for name, network in decoders.items())]
    for name, part, method in kinds:
        if part is not None and not hasattr(part, method):
            raise CheckpointError(f"the {name} of the pipeline is of class {type(part).__name__}, which is none; "
                                  f"put another network into the folder {name}")
    faults, space = [], tokenizer.space()
    ours, theirs = getattr(tokenizer, "token_channels", None), getattr(transformer, "channels", None)
    if ours != theirs:
        faults.append(f"numbers per token: {ours} in the tokenizer, {theirs} in the transformer (None: it has codes)")
    elif space is not None and tokenizer.vocab_size != transformer.vocab_size:
        faults.append(f"the tokenizer has {tokenizer.vocab_size} codes, the transformer {transformer.vocab_size}")
    scales, own = None if space is None else space.scales, _scales(transformer)
    if scales != own:
        faults.append(f"the tokenizer has {_described(scales)}, the transformer {_described(own)}")
    if control is not None:
        if control.config.stride != tokenizer.stride:
            faults.append(f"pixels per token: {control.config.stride} in the control component, {tokenizer.stride} in "
                          "the others")
        faults += _control_faults("the others", transformer, control)
    for name, network in decoders.items():
        faults += _second_faults(SECOND + name, network, transformer, space)
        faults += [] if control is None else _control_faults(SECOND + name, network, control)
    if faults:
        raise CheckpointError(f"the parts of the pipeline belong to different models: {'; '.join(faults)}")


def _control_faults(name: str, network: Any, control: Any) -> list[str]:
    pairs = (("width", control.config.dim, network.config.dim),
             ("injection points", control.config.points, network.inject_points))
    return [f"{what}: {ours} in the control component, {theirs} in {name}" for what, ours, theirs in pairs
            if ours != theirs]


def _second_faults(name: str, network: Any, transformer: Any, space: TokenSpace | None) -> list[str]:
    """What a decoder's own network does not share with the transformer."""
    if order_of(network) != order_of(transformer):
        return [f"{name} is of class {type(network).__name__}, which is for other models than "
                f"{type(transformer).__name__}"]
    pairs = [("codes", getattr(network.config, "vocab_size", None), getattr(transformer, "vocab_size", None)),
             ("numbers per token", getattr(network, "channels", None), getattr(transformer, "channels", None)),
             ("scales", _scales(network), _scales(transformer))]
    if space is not None:
        pairs.append(("channels of a code", getattr(network, "latent_dim", None), space.codebook_VC.shape[1]))
    return [f"{what}: {ours} in {name}, {theirs} in the others" for what, ours, theirs in pairs if ours != theirs]


def _scales(network: Any) -> tuple[tuple[int, int], ...] | None:
    scales: tuple[tuple[int, int], ...] | None = network.config.scales if order_of(network) == "scales" else None
    return scales


def _described(scales: tuple[tuple[int, int], ...] | None) -> str:
    return "one scale" if scales is None else "scales " + ", ".join(f"{height}x{width}" for height, width in scales)
