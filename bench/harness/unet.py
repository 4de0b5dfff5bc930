"""A small U-Net: the architecture whose way up is made of transposed convolutions and batch norms."""

import torch
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Twice: convolution, batch norm, ReLU in place. Keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Upsample(nn.Sequential):
    """Transposed convolution, batch norm, ReLU in place. Keeps the channels, doubles height and width.

    Args:
        channels: Number of channels in and out.
        groups: 1 for a dense transposed convolution, `channels` for a depthwise one.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1, groups=groups),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Three levels down, three up, with skip connections: 17 pairs of a convolution and a batch norm.

    The transposed convolutions on the way up are dense, grouped and depthwise, in this order.

    Args:
        in_channels: Channels of the image.
        classes: Channels of the output.
        width: Channels of the first level; each further level has twice as many. A multiple of 4.
    """

    def __init__(self, in_channels: int = 3, classes: int = 2, width: int = 16) -> None:
        super().__init__()
        level1, level2, level3, bottom = width, 2 * width, 4 * width, 8 * width
        self.down1 = DoubleConv(in_channels, level1)
        self.down2 = DoubleConv(level1, level2)
        self.down3 = DoubleConv(level2, level3)
        self.pool = nn.MaxPool2d(kernel_size=2)
        self.bottom = DoubleConv(level3, bottom)
        self.upsample3 = Upsample(bottom, groups=1)
        self.up3 = DoubleConv(bottom + level3, level3)
        self.upsample2 = Upsample(level3, groups=4)
        self.up2 = DoubleConv(level3 + level2, level2)
        self.upsample1 = Upsample(level2, groups=level2)
        self.up1 = DoubleConv(level2 + level1, level1)
        self.head = nn.Conv2d(level1, classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Computes one score per class and pixel.

        Args:
            image: Of shape (N, in_channels, H, W), with H and W multiples of 8.

        Returns:
            Scores of shape (N, classes, H, W).
        """
        features1 = self.down1(image)
        features2 = self.down2(self.pool(features1))
        features3 = self.down3(self.pool(features2))
        features = self.bottom(self.pool(features3))
        features = self.up3(torch.cat([self.upsample3(features), features3], dim=1))
        features = self.up2(torch.cat([self.upsample2(features), features2], dim=1))
        features = self.up1(torch.cat([self.upsample1(features), features1], dim=1))
        scores: Tensor = self.head(features)
        return scores
