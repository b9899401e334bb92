"""Running figures of an epoch: torchmetrics with one vectorised state for all members, summed over the processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Scores(Metric):
    """Top-1, top-5 and per-class recall of M members on the same images, micro-averaged fractions in [0, 1].

    Counts only, so they are exact however the images are divided among batches and processes.
    """

    full_state_update = False
    hits: Tensor
    hits5: Tensor
    seen: Tensor

    def __init__(self, members: int, classes: int):
        super().__init__()
        self.add_state("hits", torch.zeros(members, classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("hits5", torch.zeros(members, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Logits (M, N, K), target (N,)."""
        hit = (logits.argmax(-1) == target).long()
        self.hits.index_add_(1, target, hit)
        self.seen.index_add_(0, target, torch.ones_like(target))
        if logits.shape[-1] > 5:
            self.hits5 += (logits.topk(5, dim=-1).indices == target[:, None]).any(-1).sum(-1)

    def compute(self) -> dict[str, Tensor]:
        """`top1` and `top5` (M,) (nothing with 5 classes or fewer), `recall` (M, K), NaN without images."""
        total = self.seen.sum().double()
        return {
            "top1": self.hits.sum(1).double() / total,
            "top5": self.hits5.double() / total,
            "recall": self.hits.double() / self.seen,
        }


class Terms(Metric):
    """Means of named loss terms over the images of an epoch."""

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names
        self.add_state("total", torch.zeros(len(names), dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, terms: dict[str, Tensor], images: int) -> None:
        """Each term a mean over `images` images."""
        self.total += images * torch.stack([terms[name].detach() for name in self.names]).double()
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.total / self.images, strict=True))
