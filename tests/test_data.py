"""Loading without a network; the real data where it is."""

import gzip
import http.server
import io
import json
import sys
import tarfile
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from experiments.data import datasets, published, sources, tfrecord
from experiments.data import images as data
from experiments.data.datasets import Examples


@pytest.fixture
def fake():
    """Something shaped like MNIST, each class once."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 28, 28, 1), dtype=np.uint8)
    labels = np.arange(10, dtype=np.int32)
    return Examples(images, labels), Examples(images[:5], labels[:5])


def assert_same(splits, expected):
    for examples, wanted in zip(splits, expected, strict=True):
        np.testing.assert_array_equal(examples.images, wanted.images)
        np.testing.assert_array_equal(examples.labels, wanted.labels)
        assert examples.labels.dtype == np.int32


# --- mnist5k --------------------------------------------------------------------------


def test_mnist5k_is_split_evenly_over_the_classes_and_is_mnist():
    digits = data.load("mnist", source="mnist5k")
    assert digits.name == "mnist5k"
    assert np.bincount(digits.train.labels).tolist() == [400] * 10
    assert np.bincount(digits.test.labels).tolist() == [100] * 10
    every = np.concatenate([digits.train.images, digits.test.images])
    assert every.dtype == np.uint8
    assert len(np.unique(every.reshape(5000, -1), axis=0)) == 5000
    assert 0.12 < every.mean() / 255 < 0.14, "MNIST's mean is 0.1307"


def test_names_and_sources_are_not_mixed_up():
    with pytest.raises(ValueError, match="unknown data set 'mnits'"):
        data.load("mnits")
    with pytest.raises(ValueError, match="unknown source 'web'"):
        data.load("mnist", source="web")
    with pytest.raises(ValueError, match="mnist5k holds digits of MNIST, not cifar10"):
        data.load("cifar10", source="mnist5k")


# --- Cache ----------------------------------------------------------------------------


def test_cache_serves_later_loads(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "from_tfds", lambda *_: fake)
    first = data.load("mnist", data_dir=tmp_path)
    monkeypatch.setattr(data, "from_tfds", None)  # not to be called again
    assert_same(data.load("mnist", data_dir=tmp_path)[2:], first[2:])
    assert [p.name for p in (tmp_path / "si_jax").iterdir()] == ["mnist.npz"]


def test_data_dir_comes_before_the_environment(fake, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "from_tfds", lambda _, d: asked.append(d) or fake)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    data.load("mnist")
    data.load("mnist", data_dir=tmp_path / "argument")
    assert asked == [tmp_path / "env", tmp_path / "argument"]


def test_a_cache_of_other_images_is_refused(fake, tmp_path):
    colour = Examples(np.zeros((10, 32, 32, 3), np.uint8), fake[0].labels)
    data._write_cache(tmp_path / "si_jax" / "mnist.npz", (colour, colour))
    with pytest.raises(datasets.DataError, match=r"mnist\.npz holds as mnist are"):
        data.load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_cache_is_made_anew(damage, fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data, "from_tfds", lambda *_: fake)
    data.load("mnist", data_dir=tmp_path)
    cache = tmp_path / "si_jax" / "mnist.npz"
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        cache.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        with np.load(cache) as file:
            arrays = dict(file)
        arrays["train_labels"] = arrays["train_labels"][::-1]
        np.savez(cache, **arrays)
    elif damage == "empty":
        cache.write_bytes(b"")
    else:
        np.savez(cache, something=np.zeros(3))
    assert_same(data.load("mnist", data_dir=tmp_path)[2:], fake)
    assert f"{cache} is damaged" in caplog.text
    caplog.clear()
    assert_same(data.load("mnist", data_dir=tmp_path)[2:], fake)
    assert not caplog.text


def test_a_full_disk_costs_the_cache_only(fake, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "from_tfds", lambda *_: fake)
    monkeypatch.setattr(np, "savez", full)
    assert_same(data.load("mnist", data_dir=tmp_path)[2:], fake)
    assert "not cached" in caplog.text
    assert not list((tmp_path / "si_jax").iterdir())


def test_other_images_are_not_taken_for_mnist(fake, tmp_path, monkeypatch):
    colour = Examples(np.zeros((10, 32, 32, 3), np.uint8), fake[0].labels)
    monkeypatch.setattr(data, "from_tfds", lambda *_: (colour, colour))
    with pytest.raises(datasets.DataError, match="holds as mnist are uint8 images"):
        data.load("mnist", data_dir=tmp_path)


# --- Network --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_a_network_one_message_at_once(name, tmp_path, monkeypatch):
    tried = []

    def unreachable(request, *, timeout):
        tried.append(request.host)
        assert timeout < 10, "seconds"
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(sources.urllib.request, "urlopen", unreachable)
    with pytest.raises(datasets.DataError, match="cannot be reached") as error:
        data.load(name, data_dir=tmp_path)
    assert len(tried) == 1
    assert "TFDS_DATA_DIR" in str(error.value)
    assert ("--data mnist5k" in str(error.value)) == (name == "mnist")


def test_a_network_that_swallows_everything_is_given_up_on(tmp_path, monkeypatch):
    def hang(*_, **__):
        threading.Event().wait()

    assert sources._PATIENCE < 10, "seconds"
    monkeypatch.setattr(sources, "_PATIENCE", 0.1)
    monkeypatch.setattr(sources.urllib.request, "urlopen", hang)
    with pytest.raises(datasets.DataError, match=r"cannot be reached \(no answer\)"):
        data.load("mnist", data_dir=tmp_path)


@pytest.fixture
def server():
    """A web server on loopback; returns its files by path and its address."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def do_GET(self):
            content = files.get(self.path.lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield files, f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def publish(monkeypatch, server, name, contents):
    files, base = server
    original = published.ORIGINALS[name]
    files.update(zip(original.files, contents, strict=True))
    changed = {**published.ORIGINALS, name: original._replace(base=base)}
    monkeypatch.setattr(sources, "ORIGINALS", changed)


def idx(examples):
    """The two files, as http://yann.lecun.com/exdb/mnist describes them."""
    number = len(examples.labels).to_bytes(4, "big")
    size = (28).to_bytes(4, "big")
    images = b"\0\0\x08\x03" + number + size + size + examples.images.tobytes()
    labels = b"\0\0\x08\x01" + number + examples.labels.astype(np.uint8).tobytes()
    return gzip.compress(images), gzip.compress(labels)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # TFDS's sessions
def test_mnist_is_downloaded_and_parsed(fake, server, tmp_path, monkeypatch):
    publish(monkeypatch, server, "mnist", [*idx(fake[0]), *idx(fake[1])])
    digits = data.load("mnist", data_dir=tmp_path)
    assert digits.name == "mnist"
    assert_same(digits[2:], fake)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_truncated_download_says_so(fake, server, tmp_path, monkeypatch):
    images, labels = idx(fake[0])
    broken = [images[: len(images) // 2], labels, *idx(fake[1])]
    publish(monkeypatch, server, "mnist", broken)
    with pytest.raises(datasets.DataError, match=r"Downloading mnist .* failed"):
        data.load("mnist", data_dir=tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(sources.urllib.request, "urlopen", unreachable)


def torchvision(folder, fake, *, compressed=False):
    """MNIST as torchvision keeps it: the published files, as they are or unpacked."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    contents = [*idx(fake[0]), *idx(fake[1])]
    for name, content in zip(published.ORIGINALS["mnist"].files, contents, strict=True):
        if compressed:
            (raw / name).write_bytes(content)
        else:
            (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
    return raw


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("inside", ["", "MNIST", "MNIST/raw"])
@pytest.mark.usefixtures("no_network")
def test_mnist_is_read_where_torchvision_keeps_it(
    inside, compressed, fake, tmp_path, monkeypatch
):
    """Without TFDS, in its folder and in those within."""
    torchvision(tmp_path, fake, compressed=compressed)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for _ in range(2):  # from the cache, too
        assert_same(data.load("mnist", data_dir=tmp_path / inside)[2:], fake)


@pytest.mark.usefixtures("no_network")
def test_mnist_is_read_where_keras_keeps_it(fake, tmp_path, monkeypatch):
    (images, labels), (more, others) = fake
    arrays = {
        "x_train": images[..., 0],
        "y_train": labels.astype(np.uint8),
        "x_test": more[..., 0],
        "y_test": others.astype(np.uint8),
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert_same(data.load("mnist", data_dir=tmp_path)[2:], fake)
    with pytest.raises(
        datasets.DataError, match="tensorflow-datasets is not installed"
    ):
        data.load("cifar10", data_dir=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    np.savez(other / "mnist.npz", **{k: x for k, x in arrays.items() if k != "y_test"})
    with pytest.raises(datasets.DataError, match=r"mnist\.npz is damaged: .*y_test"):
        data.load("mnist", data_dir=other)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.unlink(), r"raw has no t10k-labels-idx1-ubyte\.gz, and .*reached"),
        (lambda x: x.write_bytes(x.read_bytes()[:-1]), "labels.* is not a whole file"),
        (lambda x: x.write_bytes(b""), "labels.* is not a whole file"),
        (lambda x: x.write_bytes(bytes(13)), "labels.* is not a whole file"),
        (lambda x: x.write_bytes(gzip.compress(bytes(99))[:-9]), "raw is damaged"),
    ],
)
def test_files_of_torchvision_that_are_not_whole_are_named(
    change, message, fake, tmp_path
):
    change(torchvision(tmp_path, fake) / "t10k-labels-idx1-ubyte")
    with pytest.raises(datasets.DataError, match=message):
        data.load("mnist", data_dir=tmp_path)


def test_other_images_among_torchvisions_are_not_taken_for_mnist(fake, tmp_path):
    raw = torchvision(tmp_path, fake)
    raw.parent.rename(tmp_path / "FashionMNIST")
    assert published.from_files("mnist", tmp_path) is None
    assert published.from_files("mnist", tmp_path / "FashionMNIST" / "raw") is None


def cifar_tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, (labels, images) in members.items():
            rows = np.concatenate(
                [labels, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1
            )
            content = rows.astype(np.uint8).tobytes()
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_and_parsed(name, server, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    fine = name == "cifar100"  # a coarse label before the fine one
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    members = {}
    for file in ["train.bin", "test.bin"] if fine else batches:
        labels = rng.integers(0, 10, (3, 1 + fine))
        members[file] = labels, rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    publish(monkeypatch, server, name, [cifar_tar(members)])
    loaded = data.load(name, data_dir=tmp_path)
    parts = list(members.values())
    train, test = parts[:-1], parts[-1:]
    expected = [
        Examples(
            np.concatenate([i for _, i in part]),
            np.concatenate([labels[:, -1] for labels, _ in part]),
        )
        for part in (train, test)
    ]
    assert_same(loaded[2:], expected)


# --- What TensorFlow has prepared -----------------------------------------------------


def crc32c(content):
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def framed(content):
    """A record of a TFRecord file."""

    def checked(part):
        crc = crc32c(part)
        masked = ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
        return part + masked.to_bytes(4, "little")

    return checked(len(content).to_bytes(8, "little")) + checked(content)


def example(image, label):
    """A tf.train.Example of a PNG and a number."""
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    png = io.BytesIO()
    Image.fromarray(image.squeeze()).save(png, "PNG")
    of = tf_feature_pb2.Feature
    features = {
        "image": of(bytes_list=tf_feature_pb2.BytesList(value=[png.getvalue()])),
        "label": of(int64_list=tf_feature_pb2.Int64List(value=[label])),
    }
    features = tf_feature_pb2.Features(feature=features)
    return tf_example_pb2.Example(features=features).SerializeToString()


@pytest.fixture
def tfrecords(fake, tmp_path):
    """MNIST's folder as TFDS lays it out by default, its training set in two files."""
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    splits = []
    for split, (images, labels), sizes in zip(
        ("train", "test"), fake, ([7, 3], [5]), strict=True
    ):
        records = [framed(example(*pair)) for pair in zip(images, labels, strict=True)]
        for i, size in enumerate(sizes):
            name = f"mnist-{split}.tfrecord-{i:05}-of-{len(sizes):05}"
            (folder / name).write_bytes(b"".join(records[sum(sizes[:i]) :][:size]))
        splits.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "shardLengths": [str(size) for size in sizes],
            }
        )
    info = {
        "name": "mnist",
        "version": "3.0.1",
        "fileFormat": "tfrecord",
        "splits": splits,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_records_are_read_as_tensorflow_writes_them(tmp_path):
    path = tmp_path / "two.tfrecord"  # tf.io.TFRecordWriter's, of b"omega" and b""
    path.write_bytes(
        bytes.fromhex(
            "0500000000000000eab2043e6f6d65676189a429ff000000000000000029039807d8ea82a2"
        )
    )
    assert list(tfrecord.read(path)) == [b"omega", b""]
    assert path.read_bytes() == framed(b"omega") + framed(b"")


@pytest.mark.usefixtures("tfrecords")
def test_tfrecords_are_read_without_tensorflow(fake, tmp_path):
    digits = data.load("mnist", data_dir=tmp_path)
    assert digits.name == "mnist"
    assert_same(digits[2:], fake)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("cut", "what"),
    [
        (lambda content, _: content[:-1], "ends within a record"),
        (lambda content, first: content[: first + 3], "ends within a record"),
        (lambda content, first: content[: first + 9], "ends within a record"),
        (lambda content, first: content[: first + 40], "ends within a record"),
        (lambda content, first: content[:first], "holds 1 examples, not 3"),
        (lambda content, first: content + content[:first], "holds 4 examples, not 3"),
        (lambda content, _: content[:60] + b"?" + content[61:], "checksum does not"),
        (lambda content, _: b"\xff" * 8 + content[8:], "checksum does not"),
    ],
)
def test_damaged_tfrecords_are_named(cut, what, fake, tfrecords, tmp_path):
    file = tfrecords / "mnist-train.tfrecord-00001-of-00002"
    first = len(framed(example(fake[0].images[7], 7)))
    file.write_bytes(cut(file.read_bytes(), first))
    with pytest.raises(datasets.DataError, match=what) as error:
        data.load("mnist", data_dir=tmp_path)
    assert str(file) in str(error.value)
    assert "Remove it and prepare it again" in str(error.value)
    assert not (tmp_path / "si_jax").exists(), "nothing is cached"


def test_a_missing_tfrecord_file_is_named(tfrecords, tmp_path):
    file = tfrecords / "mnist-test.tfrecord-00000-of-00001"
    file.unlink()
    with pytest.raises(datasets.DataError, match="is damaged") as error:
        data.load("mnist", data_dir=tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "dataset_info.json").unlink(),
            r"3\.0\.1 has no dataset_info\.json, which TFDS writes to the records, and",
        ),
        (
            lambda folder: folder.rename(folder.with_name("incomplete.ABC_3.0.1")),
            r"mnist has no 3\.0\.1, but incomplete\.ABC_3\.0\.1, and",
        ),
        (
            lambda folder: folder.rename(folder.with_name("3.0.0")),
            r"mnist has no 3\.0\.1, but 3\.0\.0, and .* cannot be reached",
        ),
    ],
)
def test_a_prepared_folder_that_is_not_whole_is_named(
    change, message, tfrecords, tmp_path
):
    """Not the network alone, which whoever has copied a folder does not ask for."""
    change(tfrecords)
    with pytest.raises(datasets.DataError, match=message) as error:
        data.load("mnist", data_dir=tmp_path)
    assert "\n- complete what is there\n" in str(error.value)
    assert str(tfrecords.parent) in str(error.value)


def test_a_damaged_description_is_named(tfrecords, tmp_path):
    (tfrecords / "dataset_info.json").write_text("")
    with pytest.raises(datasets.DataError, match=r"TFDS cannot read .*mnist"):
        data.load("mnist", data_dir=tmp_path)


def test_compressed_tfrecords_are_called_so(tfrecords, tmp_path):
    file = tfrecords / "mnist-train.tfrecord-00001-of-00002"
    file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(datasets.DataError, match="00001-of-00002 is compressed: decom"):
        data.load("mnist", data_dir=tmp_path)


def test_a_format_that_is_not_read_is_named(tfrecords, tmp_path):
    info = tfrecords / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    message = "riegeli format; only array_record and tfrecord are read"
    with pytest.raises(datasets.DataError, match=message):
        data.load("mnist", data_dir=tmp_path)


@pytest.mark.usefixtures("tfrecords")
@pytest.mark.parametrize("package", ["tensorflow-datasets", "google_crc32c"])
def test_a_package_that_is_missing_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    monkeypatch.delitem(sys.modules, "experiments.data.tfrecord")
    monkeypatch.delattr("experiments.data.tfrecord")
    message = rf"{package} is not installed: pip install 'si_jax\[experiments\]'"
    with pytest.raises(datasets.DataError, match=message):
        data.load("mnist", data_dir=tmp_path)


def test_array_records_without_their_reader_say_what_to_install(tfrecords, monkeypatch):
    info = tfrecords / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    monkeypatch.setitem(sys.modules, "array_record", None)
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    message = r"array_record is not installed: pip install 'si_jax\[array_record\]'"
    with pytest.raises(datasets.DataError, match=message):
        data.load("mnist", data_dir=tfrecords.parents[1])


# --- Real data ------------------------------------------------------------------------


def prepared(name):
    folder = Path(data.os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    return (folder.expanduser() / name).exists()


@pytest.mark.slow
@pytest.mark.skipif(not prepared("mnist"), reason="MNIST is not prepared by TFDS here")
def test_real_mnist_through_tfds(monkeypatch):
    """Read from the prepared folder, not from the cache."""
    monkeypatch.setattr(data, "_read_cache", lambda _: None)
    monkeypatch.setattr(data, "_write_cache", lambda *_: None)
    mnist = data.load("mnist")
    assert mnist.train.images.shape == (60_000, 28, 28, 1)
    assert mnist.test.images.shape == (10_000, 28, 28, 1)
    # Per class, from Y. LeCun's page.
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.train.labels).tolist() == train
    assert np.bincount(mnist.test.labels).tolist() == test
    np.testing.assert_allclose(mnist.train.images.mean() / 255, 0.1307, atol=1e-4)
    every = {x.tobytes() for x in mnist.train.images}
    five = data.load("mnist", source="mnist5k")
    for part in (five.train, five.test):
        assert all(x.tobytes() in every for x in part.images), "a subset of MNIST"


def test_held_out_examples_come_from_the_training_set_and_are_not_trained_on():
    labels = np.arange(600, dtype=np.int32) % 10
    images = np.arange(600)[:, None, None, None].astype(np.uint16)
    whole = datasets.Dataset(
        "numbers", 10, Examples(images, labels), Examples(images + 1000, labels)
    )
    held = datasets.hold_out(whole, 1 / 6)
    trained, evaluated = held.train.images.ravel(), held.test.images.ravel()
    assert len(evaluated) == 100
    assert sorted([*trained, *evaluated]) == list(range(600)), "and no test example"
    np.testing.assert_array_equal(held.test.labels, evaluated % 10)
    assert datasets.hold_out(whole, 0.0) is whole
    for fraction in (1e-6, 0.9999):
        with pytest.raises(datasets.DataError, match="leaves none"):
            datasets.hold_out(whole, fraction)
    for fraction in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\)"):
            datasets.hold_out(whole, fraction)


def test_joined_data_sets_keep_their_labels_apart():
    def dataset(name, classes, first):
        labels = np.arange(6, dtype=np.int32) % classes
        images = np.full((6, 2, 2, 3), first, np.uint8) + labels[:, None, None, None]
        examples = Examples(images.astype(np.uint8), labels)
        return datasets.Dataset(name, classes, examples, examples)

    few = datasets.select(dataset("b", 3, 100), 2)
    assert few.classes == 2
    assert few.train.labels.tolist() == [0, 1, 0, 1]
    both = datasets.join(dataset("a", 3, 0), few)
    assert (both.name, both.classes) == ("a+b", 5)
    assert both.test.labels.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert both.test.labels.dtype == np.int32
    assert both.test.images[:, 0, 0, 0].tolist() == [0, 1, 2] * 2 + [100, 101] * 2
