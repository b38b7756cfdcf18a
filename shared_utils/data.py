"""Data sets by name, and the handful of things every experiment does to them.

    train = load_images("mnist", "train", "data")          # Images: x uint8 (60000, 1, 28, 28), y int64 (60000,)
    train, val = train_val_split(train)
    for batch in minibatches(len(train), 64, rng):          # index arrays, one epoch
        x, y = train.x[batch], train.y[batch]

Real sets come through torchvision, which downloads them when they are missing; each file's checksum is tested at
every load. Shapes: N images, C channels, H W pixels.
"""

import contextlib
import hashlib
import http.client
import io
import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared_utils import embedded
from shared_utils.cli import STAND_INS, UserError
from shared_utils.runs import replacing

_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_FASHION_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
# name -> torchvision class, folder below the root, checksums
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", _MNIST_MD5),
    "fashion": ("FashionMNIST", "FashionMNIST/raw", _FASHION_MD5),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR10_MD5),
}
# name -> address, md5 of the edition that the published results were measured on
_TEXTS = {
    "hound_of_the_baskervilles": (
        "https://www.gutenberg.org/files/2852/2852-0.txt",
        "4d217a6e4b4811839da84e8ce6c0d608",
    ),
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "6fb458f1232090904fb40fe944165e91",
    ),
    "war_and_peace": (
        "https://www.gutenberg.org/files/2600/2600-0.txt",
        "6e3e23d9f84939af0d342a69a3beb133",
    ),
}
_BOOKS = {"books": tuple(_TEXTS), "shakespeare": ("shakespeare",)}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Images:
    """Labelled images. x: uint8 (N, C, H, W), y: int64 (N,), classes: a name per label, title: for figures."""

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    title: str = ""

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index) -> "Images":
        """The images at `index` (a slice or an array of positions)."""
        return replace(self, x=self.x[index], y=self.y[index])


def load_images(name: str, split: str, root: str | Path = "data", shape: tuple[int, int, int] | None = None) -> Images:
    """The `train` or `test` images of a set: mnist, fashion, cifar10, digits, shapes, or a folder's path.

    shape: the (C, H, W) the caller needs. A folder's images are converted to it; another set that has a different one
        is refused.
    Errors: `UserError` when the set is unknown, missing and cannot be downloaded, damaged, or of another shape.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    if name in _TORCHVISION:
        images = _load_torchvision(name, split, Path(root))
    elif name in ("digits", "shapes"):
        images = Images(*getattr(embedded, name)(split))
    elif Path(name).is_dir():
        return _load_folder(Path(name), split, shape)
    else:
        known = ", ".join([*_TORCHVISION, "digits", "shapes"])
        raise UserError(f"--dataset {name}: neither a known set ({known}) nor a folder")
    if shape is not None and images.x.shape[1:] != tuple(shape):
        found, wanted = ("×".join(map(str, s)) for s in (images.x.shape[1:], shape))
        raise UserError(f"--dataset {name} has images of {found} (channels×height×width); this script needs {wanted}")
    return images


def load_text(name: str, root: str | Path = "data") -> dict[str, str]:
    """Title → text of a set: books, shakespeare, pydocs, or a folder of UTF-8 `*.txt`.

    Project Gutenberg's header and footer are cut off.
    Errors: `UserError` when it is unknown, missing and cannot be downloaded, damaged, empty or not UTF-8.
    """
    if name in _BOOKS:
        return {title: _load_book(title, Path(root)) for title in _BOOKS[name]}
    if name == "pydocs":
        return {"pydocs": embedded.pydocs()}
    if not Path(name).is_dir():
        raise UserError(f"--dataset {name}: neither a known text ({', '.join(_BOOKS)}, pydocs) nor a folder of *.txt")
    texts = {path.stem: _body(_read_text(path)) for path in sorted(Path(name).glob("*.txt"))}
    if not texts:
        raise UserError(f"--dataset {name}: the folder has no *.txt file")
    return texts


def downsample(x: np.ndarray) -> np.ndarray:
    """Halve height and width by the mean of each 2×2 block: (N, C, H, W) → float32 (N, C, H/2, W/2), in x's units."""
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"needs (N, C, H, W) with even H and W, got {x.shape}")
    rows = x[:, :, ::2].astype(np.float32) + x[:, :, 1::2]  # (N, C, H/2, W)
    return (rows[..., ::2] + rows[..., 1::2]) / 4  # (N, C, H/2, W/2)


def binarize(x: np.ndarray) -> np.ndarray:
    """1 where x, in grey levels of 255, is above 128, else 0; uint8, shaped like x."""
    return (x > 128).astype(np.uint8)


def channel_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel of uint8 images (N, C, H, W), in units of [0, 1]; two float64 (C,)."""
    counts = np.stack([np.bincount(x[:, c].ravel(), minlength=256) for c in range(x.shape[1])])  # (C, 256), exact
    weights, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = weights @ levels
    return mean, np.sqrt(weights @ levels**2 - mean**2)


def stratified_order(y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random permutation of the positions in y whose every prefix has the classes in the proportions of the whole.

    A prefix is therefore a stratified subset, a longer prefix contains it, and prefix and rest are a stratified split.
    """
    shuffled = rng.permutation(len(y))
    _, labels, counts = np.unique(y[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(y), dtype=np.int64)
    rank[by_class] = np.arange(len(y)) - np.repeat(starts, counts)  # 0, 1, 2, … within each class
    return shuffled[np.argsort((rank + 0.5) / counts[labels], kind="stable")]


def split_positions(y: np.ndarray, n_val: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The fixed split as two sorted arrays of positions in y, for training and for validation.

    It is stratified and the same whatever the seed of the run. n_val: validation images, a sixth by default (10,000 of
    MNIST's 60,000). Errors: `UserError` when either part would be empty.
    """
    n_val = len(y) // 6 if n_val is None else n_val
    if not 0 < n_val < len(y):
        raise UserError(f"cannot hold out {n_val} of {len(y)} images for validation")
    order = stratified_order(y, np.random.default_rng(0))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def train_val_split(images: Images, n_val: int | None = None) -> tuple[Images, Images]:
    """The images of the fixed split (`split_positions`): for training and for validation."""
    train, val = split_positions(images.y, n_val)
    return images[train], images[val]


def subset(images: Images, n: int, rng: np.random.Generator) -> Images:
    """n images, stratified, in random order. Errors: `UserError` when there are fewer."""
    if n > len(images):
        raise UserError(f"asked for {n} images, there are {len(images)}")
    return images[stratified_order(images.y, rng)[:n]]


def per_class(images: Images, n: int, rng: np.random.Generator) -> Images:
    """Exactly n images of each class, in random order. Errors: `UserError` that names the class that has fewer."""
    counts = np.bincount(images.y, minlength=len(images.classes))
    if counts.min() < n:
        short = int(counts.argmin())
        raise UserError(f"asked for {n} images of each class; class {images.classes[short]} has {counts[short]}")
    shuffled = rng.permutation(len(images))
    chosen = [shuffled[images.y[shuffled] == label][:n] for label in range(len(images.classes))]
    return images[rng.permutation(np.concatenate(chosen))]


def minibatches(
    n: int, batch_size: int, rng: np.random.Generator | None = None, drop_last: bool = False
) -> Iterator[np.ndarray]:
    """One epoch of index arrays over n items, shuffled when a generator is given; each item exactly once.

    drop_last: leave out a last batch that is not full.
    """
    order = np.arange(n) if rng is None else rng.permutation(n)
    end = n - n % batch_size if drop_last else n
    for start in range(0, end, batch_size):
        yield order[start : start + batch_size]


def endless_minibatches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Full batches of `minibatches`, epoch after epoch, each shuffled anew; batches of n where batch_size is above n.

    `islice(endless_minibatches(…), updates)` gives the batches of so many updates.
    """
    while True:
        yield from minibatches(n, min(n, batch_size), rng, drop_last=True)


def _load_torchvision(name: str, split: str, root: Path) -> Images:
    from torchvision import datasets

    class_name, folder, md5 = _TORCHVISION[name]
    missing = [file for file in md5 if not (root / folder / file).is_file()]
    if missing:
        _download(name, getattr(datasets, class_name), root, folder)
    for file, expected in md5.items():
        _check_md5(root / folder / file, hashlib.md5((root / folder / file).read_bytes()).hexdigest(), expected)
    found = getattr(datasets, class_name)(root, train=split == "train", download=False)
    x = np.asarray(found.data)
    x = x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))  # (N, C, H, W)
    title = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}[name]
    classes = tuple("0123456789") if name == "mnist" else tuple(found.classes)  # torchvision says "0 - zero"
    return Images(x, np.asarray(found.targets, dtype=np.int64), classes, title)


def _download(name: str, dataset: type, root: Path, folder: str) -> None:
    try:
        with network_timeout(), contextlib.redirect_stdout(io.StringIO()):
            dataset(root, download=True)
    except Exception as error:  # a broken download raises anything from URLError to tarfile.ReadError
        raise UserError(
            f"{name} is not in {root / folder} and torchvision could not download it ({error}); "
            f"put its files there, or use --dataset {STAND_INS[name]}, which needs no download"
        ) from None


@contextlib.contextmanager
def network_timeout(seconds: float = 30) -> Iterator[None]:
    """Downloads inside give up when nothing arrives for `seconds`; urllib alone would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_md5(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{path} is damaged: md5 {found}, expected {expected}; delete it to have it downloaded again")


def _load_folder(folder: Path, split: str, shape: tuple[int, int, int] | None) -> Images:
    layout = f"--dataset {folder}: needs train/<class>/*.png and test/<class>/*.png"
    if not (folder / "train").is_dir() or not (folder / split).is_dir():
        raise UserError(layout)
    classes = tuple(_class_folders(folder / "train"))
    if len(classes) < 2:
        raise UserError(f"{layout}; train/ has {len(classes)} class folder(s), at least two are needed")
    strangers = sorted(set(_class_folders(folder / split)) - set(classes))
    if strangers:
        raise UserError(f"--dataset {folder}: {split}/{strangers[0]} is a class that train/ does not have")
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / split / name).glob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    empty = set(range(len(classes))) - {label for _, label in files}
    if not files or (split == "train" and empty):
        where = f"{split}/{classes[min(empty)]}" if empty else split
        raise UserError(f"--dataset {folder}: {where} has no image ({', '.join(IMAGE_SUFFIXES)})")
    x = [read_image(path, shape) for path, _ in files]
    for (path, _), image in zip(files, x, strict=True):
        if image.shape != x[0].shape:
            raise UserError(f"{path} is {image.shape}, {files[0][0]} is {x[0].shape} (channels, height, width)")
    images = Images(np.stack(x), np.array([label for _, label in files], dtype=np.int64), classes, folder.name)
    return images[stratified_order(images.y, np.random.default_rng(0))]  # "the first hundred" are of all classes


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_image(path: str | Path, shape: tuple[int, int, int] | None = None, channels: int | None = None) -> np.ndarray:
    """An image file as uint8 (C, H, W), turned as its EXIF tag says; transparency becomes white.

    Grey stays one channel, anything else becomes RGB. shape: converted and resized (bilinear) to this (C, H, W).
    channels: converted to 1 or 3, the size kept. Errors: `UserError` when the file is missing or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            grey = image.mode in ("1", "L", "LA", "La", "I", "I;16", "F")
            if image.mode == "I;16" or (image.mode == "I" and image.getextrema()[1] > 255):
                image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))  # 16 bits
            if "A" in image.getbands() or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            channels = shape[0] if shape else channels or (1 if grey else 3)
            image = image.convert("L" if channels == 1 else "RGB")
            if shape and image.size != (shape[2], shape[1]):
                image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "it is no image that can be read"
        raise UserError(f"{path}: {reason}") from None
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_files(paths: list[str]) -> list[Path]:
    """The files named, a folder standing for its images in order. Errors: `UserError` for a folder without one."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            inside = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            found = sorted(p for p in inside if not p.name.startswith("."))
        if not found:
            raise UserError(f"{path} has no image ({', '.join(IMAGE_SUFFIXES)})")
        files += found
    return files


def _load_book(title: str, root: Path) -> str:
    address, expected = _TEXTS[title]
    path = root / "texts" / f"{title}.txt"
    noted = path.with_suffix(".md5")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(address, timeout=30) as answer:
                content = answer.read()
            # Project Gutenberg revises its files: what came has its checksum noted, so that later damage is found.
            if hashlib.md5(content).hexdigest() != expected and b"*** START OF TH" not in content:
                raise OSError(f"it sent {len(content)} bytes that are not the book")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{path} is missing and {address} could not be read ({error}); put the file there, "
                "or use --dataset pydocs, which needs no download"
            ) from None
        for target, data in ((noted, hashlib.md5(content).hexdigest().encode()), (path, content)):
            with replacing(target) as beside:
                beside.write_bytes(data)
    found = hashlib.md5(path.read_bytes()).hexdigest()
    if found != expected and noted.is_file():
        expected = noted.read_text(encoding="ascii", errors="replace").strip()
        print(f"note: {path} is a later edition than the one the published results were measured on")
    _check_md5(path, found, expected)
    return _body(_read_text(path))


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _body(text: str) -> str:
    """The text between Project Gutenberg's header and footer, or all of it where there are none."""
    start = re.search(r"^\*\*\* ?START OF .*\n", text, re.MULTILINE)
    text = text[start.end() if start else 0 :]
    end = re.search(r"^(End of (the )?Project Gutenberg|\*\*\* ?END OF )", text, re.MULTILINE)
    return text[: end.start() if end else None].strip() + "\n"
