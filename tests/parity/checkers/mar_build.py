"""What the checkers of MAR's fixtures share: models from a fixture's config, and its recorded random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.config import from_dict
from arimg.interop.mar import infer_mar_config, mar_config_from_original
from arimg.models.base import Condition
from arimg.models.diffusion_head import DiffusionHead, HeadConfig
from arimg.models.mar import MARConfig, MARTransformer
from arimg.noise import CounterNoise, Purpose


def build_mar(config: Mapping[str, Any], state: dict[str, Tensor]) -> MARTransformer:
    """The model of the original's arguments; what its shapes tell agrees with them."""
    built = from_dict(MARConfig, mar_config_from_original(config))
    model = MARTransformer(built)
    model.load_state_dict(state)
    inferred = infer_mar_config(state, built.latent_channels, built.encoder_heads)
    for name, value in inferred.items():
        if name == "head":
            assert all(getattr(built.head, key) == entry for key, entry in value.items()), value
        elif name == "mlp_ratio":       # shapes tell the whole number that the original rounds down to
            assert int(built.encoder_dim * value) == int(built.encoder_dim * built.mlp_ratio), value
        elif name != "decoder_heads":
            assert getattr(built, name) == value, (name, value)
    return model.eval()


def build_head(config: Mapping[str, Any], state: dict[str, Tensor]) -> DiffusionHead:
    """The head alone; keys with or without the full model's prefix."""
    state = {key.removeprefix("diffloss."): tensor for key, tensor in state.items()
             if key.startswith(("net.", "diffloss."))}
    channels = config["vae_embed_dim"] * config["patch_size"] ** 2
    head = DiffusionHead(HeadConfig(width=config["diffloss_w"], layers=config["diffloss_d"],
                                    steps=config["num_sampling_steps"]), channels, config["decoder_embed_dim"])
    head.load_state_dict(state)
    return head.eval()


def unpatched(tokens_BLC: Tensor, model: MARTransformer) -> Tensor:
    """latents_BChw of tokens, as the tokenizer takes them apart."""
    side = model.config.grid
    return F.pixel_shuffle(tokens_BLC.mT.unflatten(2, (side, side)), model.config.patch)


class Recorded(CounterNoise):
    """Random numbers by image (its seed) and position. `orders_BL`: the released order, whose first entries stay masked
    longest; `noise_BLSC`: as Head.sample takes it; `other`: (purpose, draw) -> values by image and position."""

    def __init__(self, orders_BL: Tensor, noise_BLSC: Tensor, other: dict[tuple[Purpose, int], Tensor]) -> None:
        object.__setattr__(self, "orders_BL", orders_BL)
        object.__setattr__(self, "noise_BLSC", noise_BLSC)
        object.__setattr__(self, "other", other)

    def uniform(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """See CounterNoise."""
        if purpose is Purpose.ORDER:
            length = self.orders_BL.shape[1]
            place_BL = self.orders_BL.argsort(dim=1)        # place of each position in the released order
            return ((length - place_BL[seeds_B[:, None], positions_BW]) / (length + 1))[..., None]
        return self.other[purpose, draw][seeds_B[:, None], positions_BW][..., None]

    def normal(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """See CounterNoise."""
        table = self.noise_BLSC if purpose is Purpose.HEAD else self.other[purpose, draw]
        values = table[seeds_B[:, None], positions_BW].flatten(2)
        assert values.shape[-1] == count, (values.shape, count)
        return values


def request_of(model: MARTransformer, labels_B: Tensor | None, noise: Recorded, cfg: float, temperature: float,
               steps: int) -> DecodeRequest:
    """One run; without labels the null class."""
    batch = len(noise.orders_BL)
    condition = Condition(class_ids_B=torch.zeros(batch, dtype=torch.int64) if labels_B is None else labels_B)
    if labels_B is None:
        condition = model.null(condition)
    side = model.config.grid
    return DecodeRequest(condition, (side, side), torch.arange(batch), guidance=Guidance(cfg),
                         sampling=Sampling(temperature), steps=steps, noise=noise)
