"""DATA: shards, batches, bytes per token, exact text. Run alone: pytest tests/test_03_data.py"""

import json
import shutil
import struct

import numpy as np
import pytest
import reference
from conftest import make_documents
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from text import shard_header

import train_gpt
from train_gpt import DataError, SettingError, Settings, Tokenizer, TokenStream, open_shard


def write_shard(path, tokens):
    path.write_bytes(shard_header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def test_header_is_the_contests():
    header = shard_header(5)
    assert len(header) == 1024
    assert struct.unpack("<256i", header) == (20240520, 1, 5, *[0] * 253)


@pytest.mark.parametrize("tokens", [[], [7], list(range(1000))])
def test_shard_round_trip(tmp_path, tokens):
    read = open_shard(write_shard(tmp_path / "a_val_0.bin", tokens))
    assert read.tolist() == tokens
    assert not tokens or isinstance(read, np.memmap)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "magic number 0"),
        (lambda data: data[:500], "500 bytes are not the 1044"),
        (lambda data: struct.pack("<i", 99) + data[4:], "magic number 99 is not 20240520"),
        (lambda data: data[:4] + struct.pack("<i", 2) + data[8:], "version 2 is not 1"),
        (lambda data: data[:-1], "1043 bytes are not the 1044"),
        (lambda data: data + b"\0\0", "1046 bytes are not the 1044"),
        (lambda data: data[:8] + struct.pack("<i", -3) + data[12:], "of its -3 tokens"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, damage, words):
    path = write_shard(tmp_path / "x_train_000000.bin", range(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        open_shard(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def stream_of(tmp_path, sizes, **changes):
    """A stream over shards whose token at stream position p is p."""
    first = 0
    for index, size in enumerate(sizes):
        write_shard(tmp_path / f"s_train_{index:06d}.bin", range(first, first + size))
        first += size
    variables = {"RECIPE": "smoke", "VOCAB_SIZE": "65536", "TRAIN_SEQ_LEN": "8", "TRAIN_BATCH_TOKENS": "64"}
    variables |= {"EVAL_STRIDE": "8", "VAL_BATCH_SIZE": "1024", "DATA_LANES": "1"} | changes
    return TokenStream(train_gpt.find_shards(tmp_path, "train"), Settings.from_env(variables))


@pytest.mark.parametrize("sizes", [[1000], [3, 500, 1, 496], [0, 1000, 0]])
def test_stream_reads_across_shards_and_wraps(tmp_path, sizes):
    stream = stream_of(tmp_path, sizes)
    assert stream.read(0, 1000).tolist() == list(range(1000))
    assert stream.read(990, 20).tolist() == [*range(990, 1000), *range(10)]
    assert stream.read(2500, 3).tolist() == [500, 501, 502]
    assert stream.read(5, 2005).tolist() == [p % 1000 for p in range(5, 2010)]


def test_batches_of_one_lane_are_the_contests_order(tmp_path):
    stream = stream_of(tmp_path, [600, 400])
    rows = [stream.batch(step, slot) for step in range(3) for slot in range(2)]
    assert [row.tolist() for row in rows[0]] == [list(range(8 * i, 8 * i + 9)) for i in range(4)]
    inputs = np.concatenate([row[:, :-1].numpy().reshape(-1) for row in rows])
    assert inputs.tolist() == list(range(len(inputs)))


def test_lanes_cover_the_stream_from_distant_places(tmp_path):
    stream = stream_of(tmp_path, [1024], DATA_LANES="4")
    first = stream.batch(0, 0)
    assert first[:, 0].tolist() == [0, 256, 512, 768]
    steps = [stream.batch(step, slot)[:, :-1] for step in range(16) for slot in range(2)]
    assert sorted(np.concatenate([s.numpy().reshape(-1) for s in steps]).tolist()) == list(range(1024))


def test_batches_do_not_depend_on_history(tmp_path):
    stream = stream_of(tmp_path, [1000])
    later = stream.batch(7, 1)
    stream.batch(2, 0)
    assert stream.batch(7, 1).equal(later)


def test_stream_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(SettingError, match=r"DATA_LANES=1: 8 training .* above TRAIN_SEQ_LEN=8; lower"):
        stream_of(tmp_path, [8])
    with pytest.raises(SettingError, match="DATA_LANES=200: 1000 training tokens over the lanes"):
        stream_of(tmp_path, [1000], DATA_LANES="200")
    with pytest.raises(DataError, match=r"s_train_000000\.bin: the training shards are empty"):
        stream_of(tmp_path, [0])
    stream = stream_of(tmp_path, [300], VOCAB_SIZE="256")
    assert stream.batch(0, 0).max() < 256
    with pytest.raises(DataError, match=r"s_train_000000\.bin: token id 2\d\d is not below VOCAB_SIZE=256"):
        for step in range(10):
            stream.batch(step, 0)


HARD = [
    b"",
    b" ",
    b"    ",
    b"\n",
    b"\r\n\r\n",
    b"one\r\ntwo\rthree\n",
    b"\t\ttabs  and   runs of    spaces ",
    "emoji \N{GRINNING FACE} and \N{ZERO WIDTH JOINER} joined \u2581 and \u2581\u2581word".encode(),
    "\ufb01ligature \u00bd \u212b \u1e9b\u0323 e\u0301 \uff21".encode(),
    b"invalid \xff\xfe\x80 bytes \xc3( and \xed\xa0\x80 surrogate",
    b"<s></s><unk><pad><0x41>\x00\x01\x7f",
    b"\xef\xbb\xbfbyte order mark",
    bytes(range(256)),
    b"a" * 3000,
    make_documents(1)[0],
]


@pytest.fixture(scope="module")
def tokenizers(dataset_dir):
    pure = json.dumps({"tokenizer_type": "pure_byte", "config": {"byte_offset": 4}}).encode()
    return [Tokenizer.load(dataset_dir / "tokenizer.model"), Tokenizer(pure)]


@pytest.mark.parametrize("data", HARD)
def test_every_text_survives_exactly(tokenizers, data):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(data)
        assert tokenizer.decode(ids) == data
        assert tokenizer.target_bytes(np.array([1, *ids]), exact=True).sum() == len(data)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda t: t.encode("utf-8", "ignore")))
)
def test_any_bytes_survive_exactly(tokenizers, data):
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode(data)) == data


@pytest.mark.parametrize("data", HARD)
def test_contest_tokenizer_keeps_every_text_too(sample_data, data):
    tokenizer = Tokenizer.load(sample_data / "fineweb_1024_bpe.model")
    assert tokenizer.decode(tokenizer.encode(data)) == data


def test_contest_tokenizer_stays_economical(sample_data):
    """Where normalisation would change a text, only the changed places go as bytes."""
    tokenizer = Tokenizer.load(sample_data / "fineweb_1024_bpe.model")
    text = b"The quick brown fox jumps over the lazy dog. " * 4
    plain = len(tokenizer.encode(text.strip()))
    assert len(tokenizer.encode(b"\n\n".join([text.strip()] * 10))) < 10 * (plain + 8)


def test_tokenizer_without_byte_pieces_is_refused(tokenizers):
    tokenizer = Tokenizer(tokenizers[0].source)
    tokenizer.byte_ids = {}
    with pytest.raises(DataError, match=r"no piece for byte 1\d\d; use one with byte fallback"):
        tokenizer.encode("\u2581".encode())


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"not a model",
        b"{}",
        b"{",
        b'{"config": 3}',
        b'{"config": {"byte_offset": 1e999}}',
        b'{"config": {"byte_offset": 100000000000}}',
        b'{"config": {"byte_offset": 0}}',
    ],
)
def test_what_is_no_tokenizer_is_refused(source, tmp_path):
    """Among them: numbers that would allocate what they claim, and a marker that has bytes."""
    with pytest.raises(ValueError, match="neither a SentencePiece model"):
        Tokenizer(source)
    (tmp_path / "t.model").write_bytes(source)
    with pytest.raises(DataError, match=r"TOKENIZER_PATH=.*t\.model: neither a SentencePiece model"):
        Tokenizer.load(tmp_path / "t.model")


def test_exact_bytes_are_the_raw_bytes(tokenizers):
    tokenizer, documents = tokenizers[0], make_documents(20, seed=3)
    ids = [token for document in documents for token in (1, *tokenizer.encode(document))]
    lengths = tokenizer.target_bytes(np.array(ids), exact=True)
    assert int(lengths.sum()) == sum(map(len, documents))
    assert lengths[np.array(ids[1:]) == 1].sum() == 0


def test_contest_bytes_follow_the_contests_rule(tokenizers, sample_data):
    for tokenizer, tokens in (
        (tokenizers[0], [*tokenizers[0].encode(b" a word  and \xff more"), 1, *tokenizers[0].encode(b" x")]),
        (Tokenizer.load(sample_data / "fineweb_1024_bpe.model"), None),
    ):
        if tokens is None:
            tokens = open_shard(sample_data / "fineweb_val_000000.bin")[:200_000].tolist()
        lengths = tokenizer.target_bytes(np.array(tokens), exact=False)
        assert int(lengths.sum()) == reference.contest_bytes(tokenizer.model, tokens)


def test_contest_bytes_of_the_sample(sample_data):
    """The shared README counts 2,504,867 bytes of text in this prefix of the contest's validation split."""
    tokenizer = Tokenizer.load(sample_data / "fineweb_1024_bpe.model")
    tokens = open_shard(sample_data / "fineweb_val_000000.bin")
    assert int(tokenizer.target_bytes(tokens, exact=False).sum()) == 2_504_867


def load(env):
    return train_gpt.load_dataset(Settings.from_env(env))


def test_dataset_bytes_are_the_manifests(env, dataset_dir):
    dataset = load(env)
    manifest = json.loads((dataset_dir / "manifest.json").read_text())
    assert int(dataset.target_bytes.sum()) == manifest["splits"]["val"]["bytes"]
    assert len(dataset.val_tokens) == manifest["splits"]["val"]["tokens"]
    assert dataset.stream.total == manifest["splits"]["train"]["tokens"]


def copy_dataset(env, dataset_dir, tmp_path):
    folder = shutil.copytree(dataset_dir, tmp_path / "copy")
    return {**env, "DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}, folder


def edit_manifest(folder, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def set_split(split, name, value):
    return lambda folder: edit_manifest(folder, lambda m: m["splits"][split].update({name: value}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: [p.unlink() for p in f.glob("*_val_*")],
            r"no \*_val_\*\.bin shard there; run `python data/text",
        ),
        (lambda f: [p.unlink() for p in f.glob("*_train_*")], r"no \*_train_\*\.bin shard there"),
        (
            lambda f: (f / "tokenizer.model").unlink(),
            r"No such file or directory.*; set it to the shards' own",
        ),
        (lambda f: (f / "manifest.json").write_text("{"), "not a manifest of data/text.py"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest of data/text.py"),
        (set_split("val", "bytes", 12345), "12345 raw val bytes, "),
        (set_split("val", "sha256", "0"), "another tokenizer or other shards"),
        (
            lambda f: edit_manifest(f, lambda m: m["tokenizer"].update(sha256="0")),
            "another tokenizer or other shards",
        ),
        (
            lambda f: write_shard(next(f.glob("*_val_*")), [1, 2, 900]),
            r"val_000000\.bin: token id 900 is not below VOCAB_SIZE=384",
        ),
        (lambda f: write_shard(next(f.glob("*_val_*")), [1]), "1 validation tokens leave nothing to score"),
    ],
)
def test_datasets_that_do_not_fit_together_are_refused(env, dataset_dir, tmp_path, damage, words):
    env, folder = copy_dataset(env, dataset_dir, tmp_path)
    damage(folder)
    with pytest.raises(DataError, match=words):
        load(env)


def test_vocabulary_must_be_the_tokenizers(env):
    with pytest.raises(SettingError, match="VOCAB_SIZE=500 is not the tokenizer's 384 pieces; set that"):
        load({**env, "VOCAB_SIZE": "500"})


def test_several_validation_shards_are_one_stream(env, dataset_dir, tmp_path):
    env, folder = copy_dataset(env, dataset_dir, tmp_path)
    whole = load(env).val_tokens.tolist()
    (folder / "manifest.json").unlink()
    path = next(folder.glob("*_val_*"))
    tokens = open_shard(path).tolist()
    write_shard(path, tokens[:100])
    write_shard(folder / "text_val_000001.bin", tokens[100:])
    assert load(env).val_tokens.tolist() == whole
