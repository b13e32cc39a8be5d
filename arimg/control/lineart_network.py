"""The line-drawing generator of "Learning to generate line drawings that convey geometry and semantics"
(Chan, Durand and Isola, CVPR 2022): a residual generator with instance normalisation."""

from __future__ import annotations

from torch import Tensor, nn

BLOCKS = 3
WIDTH = 64


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv_block(x_BCHW)


class LineGenerator(nn.Module):
    """RGB in [0, 1] to a drawing in [0, 1] with **dark** lines on white. Sides of at least 8 pixels.

    State-dict keys (`model0` ... `model4`) are those of the released sk_model.pth. Instance normalisation makes the
    output almost the same for inputs in 0..255, which is what ControlAR feeds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, WIDTH, 7), nn.InstanceNorm2d(WIDTH), nn.ReLU())
        self.model1 = nn.Sequential(
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * WIDTH), nn.ReLU(),
            nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, stride=2, padding=1), nn.InstanceNorm2d(4 * WIDTH), nn.ReLU())
        self.model2 = nn.Sequential(*(ResidualBlock(4 * WIDTH) for _ in range(BLOCKS)))
        self.model3 = nn.Sequential(
            nn.ConvTranspose2d(4 * WIDTH, 2 * WIDTH, 3, stride=2, padding=1, output_padding=1),
            nn.InstanceNorm2d(2 * WIDTH), nn.ReLU(),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 3, stride=2, padding=1, output_padding=1),
            nn.InstanceNorm2d(WIDTH), nn.ReLU())
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(WIDTH, 1, 7), nn.Sigmoid())

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """drawing_B1HW; the two halvings round sides up to a multiple of 4, the surplus is cut off."""
        height, width = pixels_B3HW.shape[-2:]
        features = self.model2(self.model1(self.model0(pixels_B3HW)))
        return self.model4(self.model3(features))[..., :height, :width]
