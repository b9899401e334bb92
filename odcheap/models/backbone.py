"""The interface of networks that can be trained as students."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """A classification network in two parts: `features` computes the last feature map, `head` the logits.

    A new backbone is a subclass with both methods, and a YAML file in `conf/backbone`. The constructor of the subclass
    takes `conv` (a `BlockType`) and `num_classes`.

    Attributes:
        num_features: The number of channels of the last feature map, C.
        num_classes: The number of classes, K.
        classifier: The name of the layer that computes the logits.
        native_size: The side, in pixels, of the images for which the network was designed.
        standard_note: One sentence about how the network with standard convolutions (block_type=Standard) differs from
            this one in more than the convolution; None if only the convolution differs.

    Shape:
        (N, 3, H, W) -> logits (N, K).
    """

    num_features: int
    num_classes: int
    classifier: str
    native_size: int
    standard_note: str | None = None

    def features(self, x: Tensor) -> Tensor:
        """Returns the last feature map (N, C, h, w) of images (N, 3, H, W)."""
        raise NotImplementedError

    def head(self, features: Tensor) -> Tensor:
        """Returns the logits (N, K) of the last feature map (N, C, h, w)."""
        raise NotImplementedError

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the last feature map (N, C, h, w) and the logits (N, K) of images (N, 3, H, W)."""
        features = self.features(x)
        return features, self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
