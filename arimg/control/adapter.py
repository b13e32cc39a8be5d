"""The control component of a pipeline: encoder and fusion, a map in, `inject_KBLD` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from arimg.control.encoder import ControlEncoder, EncoderConfig
from arimg.control.fusion import ControlFusion, at_scales
from arimg.errors import InputError
from arimg.weights import check_keys


@dataclass(frozen=True)
class ControlConfig(EncoderConfig):
    """An encoder and the model it feeds."""

    dim: int = 256          # D, width of the AR model
    points: int = 3         # K, number of injection points


class ControlAdapter(nn.Module):
    """ControlAR's control path. Weights of a pretrained encoder are loaded once and never initialised again."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ControlEncoder(config)
        self.fusion = ControlFusion(config.embed_dim, config.dim, config.points)

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Copy pretrained encoder weights (keys as `interop.controlar.encoder_state` gives them).

        Raises CheckpointError that names every missing, unexpected and misshapen key.
        """
        own = self.encoder.state_dict()
        wanted = {key: tensor for key, tensor in own.items() if key in state or not key.startswith("type_embed.")}
        check_keys(wanted, state, "encoder weights do not fit the control config",
                   "use the config of the model the file belongs to")
        self.encoder.load_state_dict({**own, **state})

    def type_id(self, name: str) -> int:
        """Index of a control type the adapter was trained on. Raises InputError for any other type."""
        if name not in self.config.types:
            raise InputError(f"control type {name!r}: this model was trained on {', '.join(self.config.types)}; "
                             "use one of these")
        return self.config.types.index(name)

    def tokens(self, maps_B3HW: Tensor, resample: str = "nearest", type_ids_B: Tensor | None = None) -> Tensor:
        """tokens_BLE of maps in [-1, 1]; see ControlEncoder.forward."""
        return self.encoder(maps_B3HW, resample, type_ids_B)

    def inject(self, maps_B3HW: Tensor, resample: str = "nearest", type_ids_B: Tensor | None = None,
               scales: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """inject_KBLD at strength 1: row j is added where token j is predicted. `combine` sets strength and window.
        `scales`: (h, w) of each, for models that predict several; None = the raster of the map's own tokens."""
        tokens_BLE = self.tokens(maps_B3HW, resample, type_ids_B)
        if scales is not None:
            grid = (maps_B3HW.shape[2] // self.config.stride, maps_B3HW.shape[3] // self.config.stride)
            tokens_BLE = at_scales(tokens_BLE, grid, scales)
        return self.fusion(tokens_BLE)
