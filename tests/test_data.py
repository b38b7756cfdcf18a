"""Data sets: embedded ones, the learner's own folder, damage, downloads that fail, splits and batches."""

import hashlib
import shutil
import socket

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from shared_utils import data, embedded
from shared_utils.cli import UserError
from shared_utils.data import Images, load_images, load_text
from shared_utils.runs import ROOT

REAL = ROOT / "data"
needs_mnist = pytest.mark.skipif(not (REAL / "MNIST/raw").is_dir(), reason="data/ holds no MNIST")
needs_cifar10 = pytest.mark.skipif(not (REAL / "cifar-10-batches-py").is_dir(), reason="data/ holds no CIFAR-10")
needs_texts = pytest.mark.skipif(not (REAL / "texts").is_dir(), reason="data/ holds no texts")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# --- embedded -----------------------------------------------------------------------------------------------------


def test_digits_are_real_and_shaped_like_mnist():
    train, test = load_images("digits", "train", shape=(1, 28, 28)), load_images("digits", "test")
    assert (train.x.shape, test.x.shape) == ((1437, 1, 28, 28), (360, 1, 28, 28))
    assert train.x.dtype == np.uint8
    assert train.y.dtype == np.int64
    assert train.x.max() == 255
    assert train.x[:, :, :4].max() == 0  # the frame that MNIST has
    assert "stand-in" in train.title
    for image, source in zip(train.x[:10, 0, 4:24, 4:24], load_digits().images[:10], strict=True):
        enlarged = np.kron(source, np.ones((5, 5))), np.kron(image, np.ones((2, 2)))  # both 40 × 40
        assert np.corrcoef(enlarged[0].ravel(), enlarged[1].ravel())[0, 1] > 0.9
    assert np.array_equal(train.y[:10], load_digits().target[:10])


def test_shapes_are_the_same_bytes_for_the_same_seed():
    x, y, classes, _ = embedded.shapes("train", seed=1, n=200)
    again, _, _, _ = embedded.shapes("train", seed=1, n=200)
    assert (x.shape, x.dtype, len(classes)) == ((200, 3, 32, 32), np.uint8, 10)
    assert x.tobytes() == again.tobytes()
    assert np.array_equal(np.bincount(y), [20] * 10)
    for other in (embedded.shapes("train", seed=2, n=200), embedded.shapes("test", seed=1, n=200)):
        assert other[0].tobytes() != x.tobytes()


def test_a_linear_classifier_fails_on_shapes():
    from sklearn.linear_model import LogisticRegression

    (x, y, *_), (x_test, y_test, *_) = embedded.shapes("train", n=2000), embedded.shapes("test", n=500)
    flat, flat_test = (a.reshape(len(a), -1) / 255 - 0.5 for a in (x, x_test))
    model = LogisticRegression(max_iter=50, C=0.01).fit(flat, y)
    assert model.score(flat_test, y_test) < 0.6


@pytest.mark.slow
def test_a_small_cnn_passes_95_percent_on_shapes():
    nn = torch.nn
    torch.manual_seed(0)
    (x, y, *_), (x_test, y_test, *_) = embedded.shapes("train"), embedded.shapes("test")
    blocks = [
        layer
        for c_in, c_out in ((3, 32), (32, 64), (64, 64))
        for layer in (nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2))
    ]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 16, 10))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    x, y, x_test = torch.from_numpy(x) / 255 - 0.5, torch.from_numpy(y), torch.from_numpy(x_test) / 255 - 0.5
    for _ in range(6):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(x_test).argmax(1).numpy() == y_test).mean()
    assert accuracy > 0.95


def test_pydocs_is_english_prose():
    text = load_text("pydocs")["pydocs"]
    assert len(text) > 200_000
    assert text.count(" the ") > 2_000


# --- a folder of the learner's own --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            path = tmp_path / "mine" / split / name
            path.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return tmp_path / "mine"


def test_a_folder_is_a_data_set(folder):
    images = load_images(str(folder), "train")
    assert images.x.shape == (6, 3, 10, 12)
    assert images.classes == ("cat", "dog")
    assert sorted(images.y.tolist()) == [0, 0, 0, 1, 1, 1]
    assert all(sorted(images.y[i : i + 2].tolist()) == [0, 1] for i in (0, 2, 4))  # the first few are of all classes
    stored = np.asarray(Image.open(folder / "train/cat/0.png"))
    assert (images.x == stored.transpose(2, 0, 1)).all((1, 2, 3)).sum() == 1
    assert load_images(str(folder), "test", shape=(1, 28, 20)).x.shape == (6, 1, 28, 20)
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "train/cat/._0.png").write_text("what a Mac leaves")
    assert len(load_images(str(folder), "train")) == 6


def test_pictures_of_every_kind(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp * 257).save(tmp_path / "deep.png")
    assert np.array_equal(data.read_image(tmp_path / "deep.png")[0], ramp)
    clear = np.zeros((4, 6, 4), dtype=np.uint8)
    clear[0, 0, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert data.read_image(tmp_path / "clear.png", channels=1)[0].tolist()[0] == [0, 255, 255, 255, 255, 255]
    Image.fromarray(clear[..., 2:]).save(tmp_path / "grey.png")
    assert data.read_image(tmp_path / "grey.png").shape == (1, 4, 6)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    Image.fromarray(clear[..., :3]).save(tmp_path / "phone.jpg", exif=turned)
    assert data.read_image(tmp_path / "phone.jpg").shape == (3, 6, 4)


def break_png(folder):
    (folder / "train/cat/0.png").write_text("no image")


def cut_png(folder):
    path = folder / "train/cat/0.png"
    path.write_bytes(path.read_bytes()[:60])


def other_size(folder):
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "train/dog/1.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_png, r"cat.0\.png: it is no image"),
        (cut_png, r"cat.0\.png: it is no image"),
        (other_size, r"dog.1\.png is"),
        (lambda f: shutil.rmtree(f / "test"), "needs train/<class>"),
        (lambda f: shutil.rmtree(f / "train/dog"), "at least two"),
        (lambda f: [p.unlink() for p in (f / "train/dog").iterdir()], "train/dog has no image"),
        (lambda f: (f / "test/dog").rename(f / "test/wolf"), "test/wolf is a class"),
    ],
)
def test_a_folder_with_a_fault_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_images(str(folder), "test" if "wolf" in message or "needs" in message else "train")
    assert "\n" not in str(error.value)


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(UserError, match="mnist, fashion, cifar10, digits, shapes"):
        load_images("imagenet", "train")
    with pytest.raises(UserError, match="books, shakespeare, pydocs"):
        load_text("bible")
    with pytest.raises(UserError, match=r"3×32×32.*needs 1×28×28"):
        load_images("shapes", "test", shape=(1, 28, 28))


def test_texts_of_the_learners_own(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.txt"):
        load_text(str(tmp_path))
    (tmp_path / "poem.txt").write_bytes("\ufeffRøses\r\nare red\n".encode())
    assert load_text(str(tmp_path)) == {"poem": "Røses\nare red\n"}
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8: byte 3 is 0xff"):
        load_text(str(tmp_path))
    (tmp_path / "bad.txt").write_bytes(b" \n")
    with pytest.raises(UserError, match=r"bad\.txt is empty"):
        load_text(str(tmp_path))


# --- the real sets ------------------------------------------------------------------------------------------------


@needs_mnist
def test_mnist_is_read_as_it_is():
    train, test = load_images("mnist", "train", REAL), load_images("mnist", "test", REAL)
    assert (train.x.shape, test.x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train.y[:5].tolist() == [5, 0, 4, 1, 9]
    mean, std = data.channel_statistics(train.x)
    np.testing.assert_allclose([mean[0], std[0]], [0.1307, 0.3081], atol=1e-4)


@needs_cifar10
def test_cifar10_is_read_as_it_is():
    test = load_images("cifar10", "test", REAL)
    assert test.x.shape == (10000, 3, 32, 32)
    assert test.classes[3] == "cat"
    assert test.y[:4].tolist() == [3, 8, 8, 0]
    stored = torchvision.datasets.CIFAR10(REAL, train=False)[7][0]
    assert np.array_equal(test.x[7], np.asarray(stored).transpose(2, 0, 1))


@needs_mnist
@pytest.mark.parametrize("fault", ["cut", "flipped", "text"])
def test_a_damaged_idx_file_is_named_with_its_checksum(tmp_path, fault):
    raw = tmp_path / "MNIST/raw"
    shutil.copytree(REAL / "MNIST/raw", raw)
    path = raw / "t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    if fault == "cut":
        content = content[:5000]
    elif fault == "flipped":
        content[100_000] ^= 1
    else:
        content = b"<html>not found</html>"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte is damaged: md5 .* expected 2646ac64") as error:
        load_images("mnist", "test", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "stand_in"), [("mnist", "digits"), ("fashion", "digits"), ("cifar10", "shapes")])
def test_a_missing_set_without_a_network_says_what_to_do(tmp_path, no_network, name, stand_in, capsys):
    with pytest.raises(UserError, match=f"--dataset {stand_in}") as error:
        load_images(name, "train", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    assert socket.getdefaulttimeout() is None


def test_a_missing_book_without_a_network_says_what_to_do(tmp_path, no_network):
    with pytest.raises(UserError, match=r"shakespeare\.txt is missing and https.*--dataset pydocs"):
        load_text("shakespeare", tmp_path)


@needs_texts
def test_books_come_without_gutenbergs_words():
    books = load_text("books", REAL)
    assert set(books) == {"hound_of_the_baskervilles", "shakespeare", "war_and_peace"}
    assert "Mr. Sherlock Holmes, who was usually very late" in books["hound_of_the_baskervilles"]
    for text in books.values():
        assert "Project Gutenberg" not in text
        assert "\r" not in text
    assert len(load_text("shakespeare", REAL)["shakespeare"]) == 1_115_394


@needs_texts
def test_a_damaged_book_is_named(tmp_path):
    shutil.copytree(REAL / "texts", tmp_path / "texts")
    path = tmp_path / "texts/shakespeare.txt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shakespeare\.txt is damaged: md5"):
        load_text("shakespeare", tmp_path)


class Download:
    """What `urlopen` gives: a context with one answer."""

    def __init__(self, content):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self):
        return self.content


def test_a_login_page_is_no_book(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: Download(b"<html>log in</html>"))
    with pytest.raises(UserError, match="not the book"):
        load_text("shakespeare", tmp_path)
    assert not list((tmp_path / "texts").iterdir())


def test_another_edition_is_taken_as_it_came_down_and_then_watched(tmp_path, monkeypatch, capsys):
    edition = b"*** START OF THE PROJECT GUTENBERG EBOOK X ***\nTo be.\n*** END OF THE PROJECT\n"
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: Download(edition))
    assert load_text("shakespeare", tmp_path) == {"shakespeare": "To be.\n"}
    assert "later edition" in capsys.readouterr().out
    path = tmp_path / "texts/shakespeare.txt"
    assert hashlib.md5(path.read_bytes()).hexdigest() == path.with_suffix(".md5").read_text()
    path.write_bytes(edition[:-3])
    with pytest.raises(UserError, match="damaged"):
        load_text("shakespeare", tmp_path)


# --- operations ---------------------------------------------------------------------------------------------------


def some_images(counts=(50, 30, 20)):
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.arange(len(y), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Images(x, y, tuple("abc"))


def test_downsample_is_the_mean_of_two_by_two():
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 28, 28), dtype=np.uint8)
    small = data.downsample(x)
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(x).float(), 2).numpy()
    assert small.dtype == np.float32
    assert np.array_equal(small, expected)
    with pytest.raises(ValueError, match="even"):
        data.downsample(x[:, :, :27])


def test_binarize_is_strictly_above_the_threshold():
    assert data.binarize(np.array([0, 128, 128.25, 129, 255])).tolist() == [0, 0, 1, 1, 1]


def test_channel_statistics_by_channel():
    x = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    mean, std = data.channel_statistics(x)
    np.testing.assert_allclose(mean, (x / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (x / 255).std((0, 2, 3)), rtol=1e-9)


def test_every_prefix_of_a_stratified_order_is_balanced():
    y = some_images().y
    order = data.stratified_order(y, np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    for n in (10, 20, 50):
        np.testing.assert_allclose(np.bincount(y[order[:n]], minlength=3), np.array([0.5, 0.3, 0.2]) * n, atol=1)
    assert not np.array_equal(order, data.stratified_order(y, np.random.default_rng(1)))


def test_the_split_is_fixed_disjoint_complete_and_stratified():
    images = some_images()
    train, val = data.train_val_split(images, 20)
    np.random.default_rng(5).random()
    again, _ = data.train_val_split(images, 20)
    assert np.array_equal(train.x, again.x)
    assert sorted([*train.x.ravel(), *val.x.ravel()]) == list(range(100))
    assert np.bincount(val.y).tolist() == [10, 6, 4]
    assert len(data.train_val_split(images)[1]) == 16
    with pytest.raises(UserError, match="hold out"):
        data.train_val_split(images, 100)


def test_subsets():
    images, rng = some_images(), np.random.default_rng(0)
    assert np.bincount(data.subset(images, 10, rng).y).tolist() == [5, 3, 2]
    equal = data.per_class(images, 20, rng)
    assert np.bincount(equal.y).tolist() == [20, 20, 20]
    assert equal.y.tolist() != sorted(equal.y)
    with pytest.raises(UserError, match="there are 100"):
        data.subset(images, 101, rng)
    with pytest.raises(UserError, match="class c has 20"):
        data.per_class(images, 21, rng)


def test_minibatches_are_one_epoch():
    batches = list(data.minibatches(10, 4, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches)) == list(range(10))
    assert [len(batch) for batch in data.minibatches(10, 4, drop_last=True)] == [4, 4]
    assert np.concatenate(list(data.minibatches(10, 4))).tolist() == list(range(10))
    assert np.concatenate(batches).tolist() != list(range(10))


def test_endless_minibatches_pass_over_all_items_again_and_again():
    batches = data.endless_minibatches(10, 5, np.random.default_rng(0))
    epochs = [[*next(batches), *next(batches)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for n, size in ((3, 5), (11, 5)):  # fewer than a batch; some are left over
        assert len(next(data.endless_minibatches(n, size, np.random.default_rng(0)))) == min(n, size)


def test_image_files_are_those_named_and_those_of_a_folder_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "._a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    named = str(tmp_path / "notes.txt")
    found = [path.name for path in data.image_files([named, str(tmp_path)])]
    assert found == ["notes.txt", "a.JPG", "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no image"):
        data.image_files([str(tmp_path / "empty")])
