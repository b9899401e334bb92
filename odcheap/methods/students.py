"""The S students of one architecture."""

from collections.abc import Callable

from torch import Tensor, nn

from odcheap.methods import parallel
from odcheap.utils.errors import OptionError
from odcheap.utils.seeds import temporary_seed

MOST = 100  # more is a slip of the hand, and would be built until the memory is gone


class Students(nn.Module):
    """`num_stu` networks made by `build()`; student k's first weights depend on (seed, k) alone.

    `run` is one of the ways of `together`. Raises `OptionError` where `num_stu` is below 1 or absurd.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        num_stu: int,
        seed: int,
        run: Callable[..., parallel.Maps] = parallel.auto,
    ):
        super().__init__()
        if not isinstance(num_stu, int) or not 1 <= num_stu <= MOST:
            raise OptionError("num_stu", num_stu, f"must be a whole number, 1 or more, at most {MOST}")
        members = []
        for k in range(num_stu):
            with temporary_seed(seed, "student", k):
                members.append(build())
        self.members, self.run = nn.ModuleList(members), run

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_features(self) -> int:
        """Channels of one student's last feature map."""
        return self.members[0].num_features

    @property
    def num_classes(self) -> int:
        return self.members[0].num_classes

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """(N, C, H, W), or (S, N, C, H, W) with a view for each -> S last feature maps, logits (S, N, K)."""
        views = images if images.ndim == 5 else [images] * len(self)
        return self.run(list(self.members), list(views))
