"""The baseline of the benchmark: a training loop in the style of 2019, which is used for nothing else.

It runs in eager mode, in float32, with contiguous (channels-first) tensors, one student after the other. Pillow
augments the images one by one on the CPU. Loss and accuracies are read after every step, so that every step waits for
the GPU.
"""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from odcheap.methods.base import Method


class PillowImages(Dataset):
    """A map-style data set of images that are padded by 4 pixels, cropped, flipped and normalized one by one.

    Args:
        images: (N, 3, H, W), uint8.
        target: Labels (N,).
        mean: The mean of each channel of images in [0, 1].
        std: The standard deviation of each channel, for the same images.
    """

    def __init__(self, images: Tensor, target: Tensor, mean: tuple[float, ...], std: tuple[float, ...]):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
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
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.target[index])


def train_steps(
    method: Method, images: PillowImages, batch_size: int, lr: float, device: torch.device, workers: int
) -> Iterator[float]:
    """Trains without an end, and yields the loss of each training step.

    Args:
        method: The networks to train and their loss, a `Method`.
        images: The training images.
        batch_size: The number of images in a batch.
        lr: The learning rate.
        device: The device on which the method is.
        workers: The number of processes that load and augment images; 0 for none.
    """
    loader = DataLoader(images, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    optimizer = torch.optim.SGD(method.parameters(), lr, momentum=0.9, weight_decay=2e-4)
    while True:
        for batch, target in loader:
            batch, target = batch.to(device), target.to(device)
            optimizer.zero_grad()
            outputs = method(batch)
            loss = method.loss(outputs, target)["loss"]
            loss.backward()
            optimizer.step()
            # The 2019 reference code printed accuracies during the training; reading them waits for the GPU.
            for logits in [*outputs["student_logits"], outputs["teacher_logits"]]:
                if logits is not None:
                    (logits.argmax(1) == target).float().mean().item()
            yield loss.item()
