"""The loop of the 2019 style, written anew as the benchmark's baseline: nothing else uses it.

Eager, float32, channels first, student after student; pictures augmented one by one by PIL on the CPU; loss and
accuracies read at every step, which makes a GPU wait.
"""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Pictures(Dataset):
    """uint8 (N, 3, H, W) as PIL pictures: padded by 4, cropped, flipped, made tensors and normalised one by one."""

    def __init__(self, images: Tensor, target: Tensor, mean: tuple[float, ...], std: tuple[float, ...]):
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.target = target
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[k]), int(self.target[k])


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def steps(
    method: nn.Module, pictures: Pictures, batch_size: int, lr: float, device: torch.device, workers: int
) -> Iterator[float]:
    """Takes one training step each time it is asked, and gives the loss."""
    loader = DataLoader(pictures, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    optimizer = torch.optim.SGD(method.parameters(), lr, momentum=0.9, weight_decay=2e-4)
    for images, target in endless(loader):
        images, target = images.to(device), target.to(device)
        optimizer.zero_grad()
        outputs = method(images)
        loss = method.loss(outputs, target)["loss"]
        loss.backward()
        optimizer.step()
        for logits in [*outputs["student_logits"], outputs["teacher_logits"]]:
            (logits.argmax(1) == target).float().mean().item()
        yield loss.item()
