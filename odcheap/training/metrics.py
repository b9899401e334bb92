"""Running figures of an epoch, as torchmetrics: exact sums over all images and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RunningSums(Metric):
    """Sums that can be saved in the middle of an epoch, over all processes, and continued by the first of them."""

    full_state_update = False

    def summed_state(self) -> dict[str, Tensor]:
        """Returns the sums over all processes, on the CPU; every process must call it."""
        self._update_count = max(1, self._update_count)  # torchmetrics warns of an empty sum, which is meant here
        with self.sync_context():
            state = {name: value for name, value in self.metric_state.items() if isinstance(value, Tensor)}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_summed_state(self, state: dict[str, Tensor]) -> None:
        """Continues from what `summed_state` returned; one process only, since the others' sums are added."""
        for name, value in state.items():
            setattr(self, name, value.to(self.device))
        self._update_count = 1


class MemberScores(RunningSums):
    """Accuracy of M networks on the same images, as micro-averaged fractions in [0, 1].

    One state for all networks, so that a batch costs a few kernels and not a few for each of them. Only counts are
    kept: the figures are exact however the images are divided among batches and processes.

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
            cell = target * classes + predicted  # (M, N): the entry of its matrix that an image adds to
            self.confusion.view(len(logits), -1).scatter_add_(1, cell, torch.ones_like(cell))

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures.

        Returns:
            `top1` and `top5` (M,), the latter of no meaning with 5 classes or fewer; `recall` (M, K), NaN for a class
            without images; `confusion` (M, K, K) counts, true classes by predicted ones, (0, K, K) where not counted.
        """
        total = self.seen.sum().double()
        return {
            "top1": self.hits.sum(1).double() / total,
            "top5": self.top5_hits.double() / total,
            "recall": self.hits.double() / self.seen,
            "confusion": self.confusion,
        }


class TermMeans(RunningSums):
    """Means of named loss terms over the images of an epoch."""

    total: Tensor
    images: Tensor

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names
        self.add_state("total", torch.zeros(len(names), dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: dict[str, Tensor], images: int) -> None:
        """Adds a batch: each term is a mean over so many images."""
        self.total += images * torch.stack([terms[name].detach() for name in self.names]).double()
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        """Returns the means by the terms' names."""
        return dict(zip(self.names, self.total / self.images, strict=True))
