"""LeNet, the network of the paper's experiments on MNIST.

The shape is Caffe's version (20-50-500) of LeNet-5: LeCun, Bottou, Bengio and Haffner,
"Gradient-based learning applied to document recognition", 1998. It has 431,080 parameters.
"""

from torch import Tensor, nn


class LeNet(nn.Module):
    """Map images (N, 1, 28, 28) to the logits of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.relu3 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, 10)."""
        maps = self.pool(self.relu1(self.conv1(images)))
        maps = self.pool(self.relu2(self.conv2(maps)))
        return self.fc2(self.relu3(self.fc1(maps.flatten(1))))
