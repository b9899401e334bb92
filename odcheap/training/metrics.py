"""Metrics of an epoch: they are exact sums over all images and processes, and can be saved within the epoch."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RunningSums(Metric):
    """A metric whose states are sums.

    A checkpoint contains the sums over all processes. After loading, only process 0 continues with them, and all other
    processes start at zero.
    """

    full_state_update = False

    def reset(self) -> None:
        super().reset()
        self._update_count = 1  # an epoch may have no step that counts, about which torchmetrics would warn

    def summed_state(self) -> dict[str, Tensor]:
        """Returns the states, by name, summed over all processes, on the CPU; every process must call this."""
        self._update_count = max(1, self._update_count)  # without updates torchmetrics warns, but a sum of 0 is correct
        with self.sync_context():
            state = {name: value for name, value in self.metric_state.items() if isinstance(value, Tensor)}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_summed_state(self, state: dict[str, Tensor]) -> None:
        """Sets the states to those that `summed_state` returned; only one process may call this.

        Otherwise the sums of all processes, which are added up in the end, would contain them several times.
        """
        for name, value in state.items():
            setattr(self, name, value.to(self.device))
        self._update_count = 1


class MemberScores(RunningSums):
    """Accuracies of M networks on the same images, as micro-averaged fractions in [0, 1].

    The states are counts, so the results do not depend on how the images are divided among batches and processes.

    Args:
        members: The number of networks, M.
        classes: The number of classes, K.
        with_confusion: Whether confusion matrices are counted too.

    Example:
        >>> scores = MemberScores(members=1, classes=3)
        >>> scores.update(torch.eye(3)[None], torch.tensor([0, 1, 1]))
        >>> round(scores.compute()["top1"].item(), 4)
        0.6667
    """

    # All networks share these states, so that the number of GPU kernels of an update does not grow with M.
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
        """Adds a batch.

        Args:
            logits: The logits of all networks, (M, N, K).
            target: Labels (N,).
        """
        predicted, classes = logits.argmax(-1), logits.shape[-1]
        self.hits.index_add_(1, target, (predicted == target).long())
        self.seen.index_add_(0, target, torch.ones_like(target))
        if classes > 5:
            self.top5_hits += (logits.topk(5, dim=-1).indices == target[:, None]).any(-1).sum(-1)
        if len(self.confusion):
            cell = target * classes + predicted  # (M, N): the matrix entry that counts the image
            self.confusion.view(len(logits), -1).scatter_add_(1, cell, torch.ones_like(cell))

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics of all networks over the images so far, by name.

        Returns:
            `top1` and `top5`: the accuracy of each network, (M,); `top5` has no meaning with 5 classes or fewer.
            `recall`: the recall of each class, (M, K); NaN for a class without images. `confusion`: the number of
            images, (M, K, K), by true class (second dimension) and predicted class (third); (0, K, K) if not counted.
        """
        total = self.seen.sum().double()
        return {
            "top1": self.hits.sum(1).double() / total,
            "top5": self.top5_hits.double() / total,
            "recall": self.hits.double() / self.seen,
            "confusion": self.confusion,
        }


class TermMeans(RunningSums):
    """The mean of each loss term over the images of an epoch; the names are those of the first batch.

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
        """Adds a batch.

        Args:
            terms: The loss terms by name, each a mean over the images of the batch.
            images: The number of images in the batch.
        """
        self.names = self.names or list(terms)
        batch = images * torch.stack([terms[name].detach() for name in self.names]).double()
        self.total = self.total + batch if len(self.total) else batch
        self.images += images

    def compute(self) -> dict[str, float]:
        """Returns the mean of each loss term over the images so far.

        Returns:
            A dict from the name of a term to its mean; empty before the first batch.
        """
        means = (self.total / self.images).tolist()
        return dict(zip(self.names, means, strict=True)) if means else {}
