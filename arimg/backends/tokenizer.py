"""The VQ tokenizer with its decoder on another runtime: codes to pixels. It does not encode."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg.backends.host import Exported
from arimg.errors import InputError
from arimg.tokenizers.base import Encoded
from arimg.tokenizers.vq import VectorQuantizer, VQConfig, VQSpace


class ExportedTokenizer(Exported):
    """What VQTokenizer offers to a pipeline; subclasses name the runtime."""

    graph_name = "decoder"

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.quantize = VectorQuantizer(config)

    @property
    def stride(self) -> int:
        """Pixels per token side."""
        return self.config.stride

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.codebook_size

    def encode(self, images_B3HW: Tensor) -> Encoded:
        """Raises InputError: only the decoder is exported."""
        raise InputError("an exported tokenizer turns codes into pixels only; encode with the model that it was "
                         "exported from")

    def lookup(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """Quantised latents (B, C, h, w) of raster codes."""
        return self.quantize.lookup(codes_BL, grid)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """images_B3HW of quantised latents, unclamped."""
        images_B3HW: Tensor
        images_B3HW, = self.graph({"latents": latents_BChw.float()})
        return images_B3HW

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3HW of raster codes, unclamped."""
        return self.decode(self.lookup(codes_BL, grid))

    def space(self) -> VQSpace:
        """The codebook for decoders, float32."""
        return VQSpace(self.quantize.codebook().detach().float())


class OnnxTokenizer(ExportedTokenizer):
    """On ONNX Runtime."""

    runtime = "onnx"


class OpenvinoTokenizer(ExportedTokenizer):
    """On OpenVINO."""

    runtime = "openvino"
