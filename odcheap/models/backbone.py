"""The interface of networks that can be trained as students."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """A classification network in two parts: `features` gives its last feature map, `head` the logits.

    A new backbone is a subclass with both methods, whose constructor takes `conv` (a `BlockType`) and `num_classes`,
    and a YAML file in `conf/backbone`.

    Attributes:
        num_features: Channels of the last feature map, C.
        num_classes: Number of classes, K.
        classifier: Name of the layer that gives the logits.
        native_size: Side in pixels of the images for which the network is made.
        standard_note: A sentence on how the standard network of the same name differs from this one beyond the
            convolution; None if only the convolution differs.

    Shape:
        (N, 3, H, W) -> logits (N, K).
    """

    num_features: int
    num_classes: int
    classifier: str
    native_size: int
    standard_note: str | None = None

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the last feature map (N, C, h, w)."""
        raise NotImplementedError

    def head(self, features: Tensor) -> Tensor:
        """(N, C, h, w) -> logits (N, K)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
