"""ResNet-20, the small residual network of He et al. 2016 (section 4.2), for images of one channel.

Three stages of three blocks, 16, 32 and 64 channels wide; a shortcut that changes shape is a 1×1
convolution. On 28×28 images it has 272,186 parameters and takes 31 million multiply-accumulates.
"""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
BLOCKS = 3


class Block(nn.Module):
    """Two convolutions with batch norms, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        conv = nn.Identity() if same else _conv(inputs, outputs, 1, stride)
        self.shortcut = conv if same else nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the block's width, smaller by its stride."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        return F.relu(branch + self.shortcut(maps))


class ResNet20(nn.Module):
    """Map images (N, 1, H, W) to the logits of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv(1, WIDTHS[0], 3)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[Block] = []
        inputs = WIDTHS[0]
        for width in WIDTHS:
            for place in range(BLOCKS):
                stride = 2 if place == 0 and inputs != width else 1
                blocks.append(Block(inputs, width, stride))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, 10)."""
        maps = self.blocks(F.relu(self.bn(self.conv(images))))
        return self.fc(maps.mean((2, 3)))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
