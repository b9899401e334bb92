"""Metrics of an epoch: exact sums over all images and processes, which can be saved in the middle of the epoch."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RunningSums(Metric):
    """A metric whose states are sums. They are saved as the sums over all processes, and process 0 continues them."""

    full_state_update = False

    def reset(self) -> None:
        super().reset()
        self._update_count = 1  # an epoch may have no step that counts, about which torchmetrics would warn

    def summed_state(self) -> dict[str, Tensor]:
        """Returns the sums over all processes, on the CPU; every process must call it."""
        self._update_count = max(1, self._update_count)  # without updates torchmetrics warns, but a sum of 0 is correct
        with self.sync_context():
            state = {name: value for name, value in self.metric_state.items() if isinstance(value, Tensor)}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_summed_state(self, state: dict[str, Tensor]) -> None:
        """Continues from the result of `summed_state`. Only one process may load it, since sums are added up later."""
        for name, value in state.items():
            setattr(self, name, value.to(self.device))
        self._update_count = 1


class MemberScores(RunningSums):
    """Accuracy of M networks on the same images, as micro-averaged fractions in [0, 1].

    All networks share one state, so that a batch takes a few kernels in all and not a few for each network. Only
    counts are kept, so the figures do not depend on how the images are divided among batches and processes.

    Args:
        members: Number of networks, M.
        classes: Number of classes, K.
        with_confusion: Whether confusion matrices are counted too.

    Example:
        >>> scores = MemberScores(members=1, classes=3)
        >>> scores.update(torch.eye(3)[None], torch.tensor([0, 1, 1]))
        >>> round(scores.compute()["top1"].item(), 4)
        0.6667
    """

    hits: Tensor
    top5_hits: Tensor
    seen: Tensor
    confusion: Tensor

    def __init__(self, members: int, classes: int, with_confusion: bool = False):
        super().__init__()
        rows = members if with_confusion else 0
        self.add_state("hits", torch.zeros(members, classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("top5_hits", torch.zeros(members, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(rows, classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch: logits (M, N, K), labels (N,)."""
        predicted, classes = logits.argmax(-1), logits.shape[-1]
        self.hits.index_add_(1, target, (predicted == target).long())
        self.seen.index_add_(0, target, torch.ones_like(target))
        if classes > 5:
            self.top5_hits += (logits.topk(5, dim=-1).indices == target[:, None]).any(-1).sum(-1)
        if len(self.confusion):
            cell = target * classes + predicted  # (M, N): the matrix entry that counts the image
            self.confusion.view(len(logits), -1).scatter_add_(1, cell, torch.ones_like(cell))

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures.

        Returns:
            `top1` and `top5` (M,); `top5` means nothing with 5 classes or fewer. `recall` (M, K), NaN for a class
            without images. `confusion` counts (M, K, K), true classes by predicted ones; (0, K, K) if not counted.
        """
        total = self.seen.sum().double()
        return {
            "top1": self.hits.sum(1).double() / total,
            "top5": self.top5_hits.double() / total,
            "recall": self.hits.double() / self.seen,
            "confusion": self.confusion,
        }


class TermMeans(RunningSums):
    """Means of named loss terms over the images of an epoch. The batches bring the names.

    Example:
        >>> means = TermMeans()
        >>> means.update({"ce": torch.tensor(1.0)}, images=3)
        >>> means.update({"ce": torch.tensor(2.0)}, images=1)
        >>> means.compute()
        {'ce': 1.25}
    """

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.add_state("total", torch.zeros(0, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: dict[str, Tensor], images: int) -> None:
        """Adds a batch, of which each term is the mean over so many images."""
        self.names = self.names or list(terms)
        batch = images * torch.stack([terms[name].detach() for name in self.names]).double()
        self.total = self.total + batch if len(self.total) else batch
        self.images += images

    def compute(self) -> dict[str, float]:
        """Returns the means by the terms' names, without any entry before the first batch."""
        means = (self.total / self.images).tolist()
        return dict(zip(self.names, means, strict=True)) if means else {}
