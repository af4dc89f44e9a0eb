"""ImageNet's classes in turn; its images are files that a suite names (`tcbench.data.images`)."""

from tcbench.data.source import NamedImages


class ImageNet(NamedImages):
    """1000 classes, numbered in their folders' order."""

    name = "imagenet"
    conditioning = "class"
