"""AUDIT AND CODEC, the codec: any file, coded by an artifact, comes back byte for byte, or is refused.

Run alone: pytest tests/test_12_codec.py. What the slow path computes is compared with the fast one in
test_12_audit.py.
"""

import contextlib
import hashlib
import io
import math
import os
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import REPOSITORY, shell_environment, write_artifact

import train_gpt
from train_gpt import CODEC_MAGIC, CODEC_PREFIX, RangeDecoder, RangeEncoder, Scorer, Settings, frequencies

ENGLISH = b"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
ENGLISH += (
    b"foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light."
)
TEXTS = {
    "english": 2 * ENGLISH,
    "source code": (REPOSITORY / "records" / "report.py").read_bytes()[:700],
    "random bytes": np.random.default_rng(0).bytes(200),
    "empty": b"",
    "one byte": b"\xf0",
    "one letter": 500 * b"e",
    "invalid utf-8": b"caf\xe9 \xff\xfe \xc3( \xed\xa0\x80 \xf8\x88\x80\x80\x80 ok\xe2\x82",
    "line ends": b"one\r\ntwo\r\n\r\nthree\rfour\n\tfive  \n",
    "emoji": "naïve 👩‍👩‍👧‍👦 e\u0301 ﬁ Ａ \u200b\ufeff".encode(),
    "space mark": "\u2581a \u2581\u2581 b\u2581".encode(),
    "nul bytes": b"\0\0a\0 \0\0\0",
    "marker as text": b"<s></s><unk><pad><0x41>\n<s>",
}


def codec(work, artifact, source, target, **more):
    """Run the codec in this process and return the exit code."""
    files = {"ARTIFACT": str(artifact), "INPUT": str(source), "OUTPUT": str(target)}
    return train_gpt.main({"RECIPE": "smoke", "CODEC": work, **files, **more})


def round_trip(artifact, folder, data, **more):
    """Compress and decompress `data` and return the coded file's bytes."""
    source, coded, back = (folder / name for name in ("source", "coded", "back"))
    source.write_bytes(data)
    assert codec("compress", artifact, source, coded, **more) == 0
    assert codec("decompress", artifact, coded, back, **more) == 0
    assert back.read_bytes() == data
    return coded.read_bytes()


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip(name, tiny_artifact, tmp_path, capsys):
    coded = round_trip(tiny_artifact, tmp_path, TEXTS[name])
    assert coded.startswith(CODEC_MAGIC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "coded", "source"]
    lines = capsys.readouterr().out.splitlines()
    sizes = f"{len(TEXTS[name])} bytes of text, {len(coded)} coded, bits_per_byte:"
    assert [line.split(sizes)[0] for line in lines] == ["compress: ", "decompress: "]


def test_coded_twice_and_into_a_new_folder(tiny_artifact, tmp_path):
    """A coded file is a file like any other; folders are made."""
    (tmp_path / "text").write_bytes(ENGLISH)
    once, twice, back = (tmp_path / "new" / name for name in ("once", "twice", "back"))
    assert codec("compress", tiny_artifact, tmp_path / "text", once) == 0
    assert codec("compress", tiny_artifact, once, twice) == 0
    assert codec("decompress", tiny_artifact, twice, back) == 0
    assert back.read_bytes() == once.read_bytes()


@pytest.mark.parametrize(
    "more", [{"NGRAM_CACHE": "none"}, {"CACHE_LR": "0"}, {"EVAL_SEQ_LEN": "16"}, {"CACHE_STEPS": "1"}]
)
def test_round_trip_with_other_scoring_settings(more, tiny_artifact, tmp_path, capsys):
    """Settings of the score change the file; without them it is refused, not misread."""
    text = TEXTS["line ends"] + ENGLISH
    assert round_trip(tiny_artifact, tmp_path, text, **more) != round_trip(tiny_artifact, tmp_path, text)
    assert codec("compress", tiny_artifact, tmp_path / "source", tmp_path / "coded", **more) == 0
    assert codec("decompress", tiny_artifact, tmp_path / "coded", tmp_path / "other") == 5
    assert "it decodes to something else, with other settings" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_test_time_training_is_off(tiny_artifact, tmp_path):
    text, learning = TEXTS["line ends"] + ENGLISH, {"TTT_LAST_BLOCKS": "1", "TTT_CHUNK_TOKENS": "32"}
    assert round_trip(tiny_artifact, tmp_path, text, **learning) == round_trip(tiny_artifact, tmp_path, text)


def test_repetition_is_cheap(tiny_artifact, tmp_path):
    """The cache learns from what has been coded: a second copy costs a fraction of the first."""
    once, twice = (round_trip(tiny_artifact, tmp_path, n * TEXTS["source code"]) for n in (1, 2))
    overhead = CODEC_PREFIX.size + 32
    assert len(twice) - len(once) < 0.5 * (len(once) - overhead)


def test_one_process_codes_and_another_decodes(tiny_artifact, tmp_path):
    source, coded, back = (tmp_path / name for name in ("source", "coded", "back"))
    source.write_bytes(TEXTS["source code"])
    for work, start, end in (("compress", source, coded), ("decompress", coded, back)):
        files = {"CODEC": work, "ARTIFACT": str(tiny_artifact), "INPUT": str(start), "OUTPUT": str(end)}
        done = subprocess.run(
            [sys.executable, "train_gpt.py"],
            cwd=REPOSITORY,
            env=shell_environment(files),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert len(done.stdout.splitlines()) == 1
    assert back.read_bytes() == source.read_bytes()
    assert codec("compress", tiny_artifact, source, back) == 0
    assert back.read_bytes() == coded.read_bytes()


def test_progress_bar_on_a_terminal_only(tiny_artifact, tmp_path):
    (tmp_path / "source").write_bytes(TEXTS["english"])
    files = {"CODEC": "compress", "ARTIFACT": str(tiny_artifact)}
    files |= {"INPUT": str(tmp_path / "source"), "OUTPUT": str(tmp_path / "coded")}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=REPOSITORY,
        env=shell_environment(files),
        stderr=theirs,
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0
    shown = os.read(ours, 2**16).decode()
    os.close(theirs)
    os.close(ours)
    assert "compress:" in shown
    assert "%|" in shown
    assert b"%|" not in done.stdout


def letter_tokenizer():
    """A tokenizer with byte fallback whose longest piece is 64 letters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(50 * [200 * "a"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=267,
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentencepiece_length=64,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    tokenizer = train_gpt.Tokenizer(model.getvalue())
    assert max(map(len, tokenizer.pieces)) == 64
    return tokenizer


@pytest.mark.parametrize("size", [2**16, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_one_letter_many_times_by_counts_alone(size, tmp_path):
    """All weights are zero: the neural rows are uniform, and what is saved comes from counting."""
    small = {"NUM_LAYERS": "1", "MODEL_DIM": "4", "NUM_HEADS": "1", "NUM_KV_HEADS": "1"}
    artifact = write_artifact(tmp_path / "artifact", letter_tokenizer(), scale=0.0, **small)
    coded = round_trip(artifact, tmp_path, size * b"a")
    # The counts cannot promise more than 2^24 - V in 2^24; the first chunks are dear.
    assert len(coded) < 300 + size / 64 / 100


@pytest.mark.slow
def test_round_trip_of_the_sample(sample_data, tmp_path):
    """The first 100 kB of FineWeb's validation text, with a tokenizer that the artifact only names."""
    path = sample_data / "fineweb_1024_bpe.model"
    tokenizer = train_gpt.Tokenizer.load(path)
    tokens = train_gpt.open_shard(sample_data / "fineweb_val_000000.bin")[:100_000]
    text = tokenizer.decode(tokens.tolist())[:100_000]
    assert len(text) == 100_000
    artifact = write_artifact(tmp_path / "artifact", tokenizer, embed=False, NUM_LAYERS="2", MODEL_DIM="16")
    coded = round_trip(artifact, tmp_path, text, TOKENIZER_PATH=str(path))
    assert len(coded) < 0.5 * len(text)


@pytest.fixture(scope="module")
def coded_text(tiny_artifact, tmp_path_factory):
    """A coded file's bytes."""
    return round_trip(tiny_artifact, tmp_path_factory.mktemp("coded"), ENGLISH)


def signed(body):
    """Return `body` with the trailer that belongs to it: damage that only the content can show."""
    return body + hashlib.sha256(body).digest()


def with_header(packed, **changes):
    """Return a coded file with other values in its header, and a trailer that fits."""
    names = ("magic", "version", "artifact", "count", "size", "sha256")
    header = dict(zip(names, CODEC_PREFIX.unpack_from(packed), strict=True)) | changes
    return signed(CODEC_PREFIX.pack(*header.values()) + packed[CODEC_PREFIX.size : -32])


def flipped(packed, place):
    """Return `packed` with one byte altered."""
    return packed[:place] + bytes([packed[place] ^ 1]) + packed[place:][1:]


DAMAGES = {
    "empty": (lambda packed: b"", "it is not a file that CODEC=compress wrote"),
    "foreign": (lambda packed: ENGLISH, "it is not a file that CODEC=compress wrote"),
    "magic": (lambda packed: flipped(packed, 0), "it is not a file that CODEC=compress wrote"),
    "a signed stump": (lambda packed: signed(packed[:20]), "unpack_from requires"),
    "cut in the header": (lambda packed: packed[:60], "it is truncated or altered"),
    "cut by one byte": (lambda packed: packed[:-1], "it is truncated or altered"),
    "one byte more": (lambda packed: packed + b"\0", "it is truncated or altered"),
    "header": (lambda packed: flipped(packed, 20), "it is truncated or altered"),
    "payload": (lambda packed: flipped(packed, CODEC_PREFIX.size + 9), "it is truncated or altered"),
    "trailer": (lambda packed: flipped(packed, -1), "it is truncated or altered"),
    "newer version": (lambda packed: with_header(packed, version=2), "format version 2, this script reads"),
    "other artifact": (lambda packed: with_header(packed, artifact=bytes(32)), f"with artifact {'00' * 32}"),
    "more tokens than bytes": (lambda packed: with_header(packed, count=10**6), "claims 1000000 tokens for"),
    "endless": (lambda packed: with_header(packed, count=2**60, size=2**61), "header claims 11529215046068"),
    "fewer tokens": (lambda packed: with_header(packed, count=3), "it decodes to something else"),
    "other length": (lambda packed: with_header(packed, size=10**6), "it decodes to something else"),
    "other hash": (lambda packed: with_header(packed, sha256=bytes(32)), "it decodes to something else"),
    "payload, signed": (
        lambda packed: signed(flipped(packed, CODEC_PREFIX.size + 9)[:-32]),
        "it decodes to something else",
    ),
    "payload cut, signed": (lambda packed: signed(packed[:-72]), "it decodes to something else"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(name, tiny_artifact, tmp_path, coded_text, capsys):
    damage, message = DAMAGES[name]
    (tmp_path / "coded").write_bytes(damage(coded_text))
    assert codec("decompress", tiny_artifact, tmp_path / "coded", tmp_path / "back") == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: INPUT={tmp_path / 'coded'}: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["coded"]


def test_every_part_of_the_file_is_guarded(tiny_artifact, coded_text):
    """One bit at any place: refused before a token is decoded."""
    assert len(coded_text) < 400
    for place in range(len(coded_text)):
        with pytest.raises(ValueError, match=r"^it is (not a file|truncated or altered)"):
            train_gpt.decompress_text(flipped(coded_text, place), None, None, "")


def test_another_artifact_is_refused(dataset_dir, tmp_path, coded_text, capsys):
    tokenizer = train_gpt.Tokenizer.load(dataset_dir / "tokenizer.model")
    other = write_artifact(tmp_path / "other", tokenizer, scale=0.31)
    (tmp_path / "coded").write_bytes(coded_text)
    assert codec("decompress", other, tmp_path / "coded", tmp_path / "back") == 5
    error = capsys.readouterr().err
    assert f"this one is {hashlib.sha256(other.read_bytes()).hexdigest()}; name another" in error
    assert not (tmp_path / "back").exists()


def test_an_artifact_that_names_its_tokenizer_needs_that_one(dataset_dir, tmp_path, capsys):
    tokenizer = train_gpt.Tokenizer.load(dataset_dir / "tokenizer.model")
    artifact = write_artifact(tmp_path / "artifact", tokenizer, embed=False)
    (tmp_path / "text").write_bytes(ENGLISH)
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(letter_tokenizer().source)
    for path, message in ((wrong, "is not the artifact's tokenizer"), (tmp_path / "none", "No such file")):
        more = {"TOKENIZER_PATH": str(path)}
        assert codec("compress", artifact, tmp_path / "text", tmp_path / "coded", **more) == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: TOKENIZER_PATH={path}")
        assert message in line
    right = {"TOKENIZER_PATH": str(dataset_dir / "tokenizer.model")}
    assert codec("compress", artifact, tmp_path / "text", tmp_path / "coded", **right) == 0


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"ARTIFACT": ""}, 2, ["CODEC='compress'", "ARTIFACT, INPUT and OUTPUT"]),
        ({"INPUT": ""}, 2, ["CODEC='compress'", "ARTIFACT, INPUT and OUTPUT"]),
        ({"OUTPUT": ""}, 2, ["CODEC='compress'", "ARTIFACT, INPUT and OUTPUT"]),
        ({"CODEC": "expand"}, 2, ["CODEC='expand'", "none, compress, decompress"]),
        ({"ARTIFACT": "nowhere"}, 5, ["nowhere: not a valid artifact"]),
        ({"ARTIFACT": "text"}, 5, ["text: not a valid artifact"]),
        ({"INPUT": "nowhere"}, 5, ["nowhere: No such file or directory"]),
        ({"INPUT": "."}, 5, [".: Is a directory"]),
        ({"OUTPUT": "."}, 2, ["OUTPUT=. is INPUT, ARTIFACT, no plain file"]),
        ({"OUTPUT": "./text"}, 2, ["OUTPUT=./text is INPUT, ARTIFACT, no plain file"]),
        ({"OUTPUT": "artifact.bin"}, 2, ["OUTPUT=artifact.bin is INPUT, ARTIFACT, no plain file"]),
        ({"OUTPUT": "text/coded"}, 5, ["text: File exists"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    changes, code, words, tiny_artifact, tmp_path, capsys, monkeypatch
):
    """Before the work, with the exit code of its kind, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "encode_targets", lambda *_: pytest.fail("too late"))
    (tmp_path / "artifact.bin").write_bytes(tiny_artifact.read_bytes())
    (tmp_path / "text").write_bytes(ENGLISH)
    files = {"ARTIFACT": "artifact.bin", "INPUT": "text", "OUTPUT": "coded"}
    assert train_gpt.main({"RECIPE": "smoke", "CODEC": "compress", **files, **changes}) == code
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("error: ", *words):
        assert word in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact.bin", "text"]
    assert (tmp_path / "text").read_bytes() == ENGLISH


def test_only_a_plain_file_is_replaced(tiny_artifact, tmp_path, capsys):
    """A link leads to the file that is written; what is no file stays what it is."""
    (tmp_path / "text").write_bytes(ENGLISH)
    (tmp_path / "far").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far")
    assert codec("compress", tiny_artifact, tmp_path / "text", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far").read_bytes().startswith(CODEC_MAGIC)
    os.mkfifo(tmp_path / "pipe")
    capsys.readouterr()
    assert codec("compress", tiny_artifact, tmp_path / "text", tmp_path / "pipe") == 2
    assert "no plain file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_leaves_the_old_output(tiny_artifact, tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_bytes(ENGLISH)
    (tmp_path / "coded").write_bytes(b"old")

    def fail(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(train_gpt.Path, "write_bytes", fail)
    assert codec("compress", tiny_artifact, tmp_path / "text", tmp_path / "coded") == 5
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "coded").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupt_leaves_nothing(tiny_artifact, tmp_path, capsys, monkeypatch):
    def interrupt(scorer, past):
        raise KeyboardInterrupt(15)

    monkeypatch.setattr(Scorer, "predict", interrupt)
    (tmp_path / "text").write_bytes(ENGLISH)
    assert codec("compress", tiny_artifact, tmp_path / "text", tmp_path / "coded") == 143
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert "nothing half-written" in capsys.readouterr().err


def test_only_rank_0_works(tiny_artifact, tmp_path, capsys, monkeypatch):
    second = train_gpt.Process(1, 2, torch.device("cpu"))
    monkeypatch.setattr(train_gpt, "open_process", lambda *_: contextlib.nullcontext(second))
    (tmp_path / "text").write_bytes(ENGLISH)
    assert codec("compress", tiny_artifact, tmp_path / "text", tmp_path / "coded") == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "coded").exists()


def test_files_without_a_codec_do_nothing():
    """Other tools have variables of these names; an artifact is read only where it is asked for."""
    names = {"ARTIFACT": "/nowhere", "INPUT": "/nowhere", "OUTPUT": "/nowhere"}
    assert train_gpt.main({"RECIPE": "smoke", **names, "NUM_LAYERS": "0"}) == 2
    ragged = {"TRAIN_BATCH_TOKENS": "500000", "ARTIFACT": "/nowhere"}
    with pytest.raises(train_gpt.SettingError, match="TRAIN_BATCH_TOKENS"):
        Settings.from_env(ragged)
    assert Settings.from_env(names).changed().keys() == names.keys()


def scorer_of(path):
    """Return the scorer of an artifact, and its tokenizer."""
    artifact, process = train_gpt.read_artifact(path), train_gpt.Process(0, 1, torch.device("cpu"))
    files = {"CODEC": "compress", "ARTIFACT": "a", "INPUT": "b", "OUTPUT": "c", "RECIPE": "smoke"}
    settings = Settings.from_env(files, artifact.settings)
    return Scorer(train_gpt.load_model(artifact, settings, process), settings, process), artifact.tokenizer


def test_coded_size_is_the_code_length(tiny_artifact, tmp_path):
    """The payload against the sum of -log2 p of the slow path, and of the fast path over the same tokens."""
    coded = round_trip(tiny_artifact, tmp_path, TEXTS["source code"])
    scorer, tokenizer = scorer_of(tiny_artifact)
    tokens = np.array([train_gpt.MARKER_ID, *tokenizer.encode(TEXTS["source code"])], dtype=np.uint16)
    targets = range(len(tokens) - 1)
    slow = -sum(math.log2(scorer.predict(tokens[: t + 1])[tokens[t + 1]]) for t in targets)
    fast = -float(scorer.prices(tokens).astype(np.float64).sum()) / math.log(2)
    bits = 8 * (len(coded) - CODEC_PREFIX.size - 32)
    assert abs(bits - slow) <= 0.0005 * slow + 128
    assert slow == pytest.approx(fast, rel=1e-5)


def distributions(count, vocab_size, seed):
    """Return distributions (count, vocab_size), from flat to nearly certain, and targets drawn from them."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, vocab_size)) * random.choice([0, 1, 5, 30], size=(count, 1))
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    rows /= rows.sum(axis=1, keepdims=True)
    return rows, [random.choice(vocab_size, p=row) for row in rows]


@pytest.mark.parametrize(("count", "vocab_size"), [(4_000, 2), (4_000, 300), (300, 65_536)])
def test_coder_against_constriction_and_the_ideal(count, vocab_size):
    constriction = pytest.importorskip("constriction")
    rows, targets = distributions(count, vocab_size, seed=vocab_size)
    ours, referee = RangeEncoder(), constriction.stream.queue.RangeEncoder()
    for row, target in zip(rows, targets, strict=True):
        ours.encode(frequencies(row), target)
        referee.encode(int(target), constriction.stream.model.Categorical(row, perfect=False))
    data, words = ours.finish(), referee.get_compressed()
    ideal = -sum(math.log2(row[target]) for row, target in zip(rows, targets, strict=True))
    decoder = RangeDecoder(data)
    assert [decoder.decode(frequencies(row)) for row in rows] == targets
    for other in (32 * len(words), ideal):
        assert abs(8 * len(data) - other) <= 0.0005 * other + 128


@pytest.mark.parametrize("seed", range(20))
def test_coder_at_its_edges(seed):
    """Unlikely first and last tokens drive the range to its ends: carries run through many bytes."""
    random = np.random.default_rng(seed)
    rows, _ = distributions(400, 5, seed)
    targets = random.choice([0, 4], size=400, p=[0.05, 0.95]).tolist()
    encoder = RangeEncoder()
    for row, target in zip(rows, targets, strict=True):
        encoder.encode(frequencies(row), target)
    decoder = RangeDecoder(encoder.finish())
    assert [decoder.decode(frequencies(row)) for row in rows] == targets


@pytest.mark.parametrize("vocab_size", [2, 1_000, 65_536])
def test_frequencies_leave_every_token_possible(vocab_size):
    rows, _ = distributions(20, vocab_size, seed=1)
    certain = np.zeros(vocab_size)
    certain[-1] = 1.0
    for row in (*rows, certain):
        counts = frequencies(row)
        assert counts.min() >= 1
        assert 2**24 - vocab_size <= counts.sum() <= 2**24
        assert np.abs(counts / 2**24 - row).max() <= (vocab_size + 1) / 2**24


@pytest.mark.parametrize("value", [-1e-12, math.nan, math.inf])
def test_frequencies_refuse_what_is_no_distribution(value):
    with pytest.raises(train_gpt.AuditError, match="negative, infinite or no number"):
        frequencies(np.array([0.5, 0.5, value]))


def test_decoding_anything_ends(tiny_artifact):
    """Bytes that no encoder wrote give tokens of the vocabulary, never an error: the hash refuses them."""
    rows, _ = distributions(500, 7, seed=3)
    for data in (b"", b"\xff" * 3, b"\xff" * 400, np.random.default_rng(1).bytes(50)):
        decoder = RangeDecoder(data)
        assert {decoder.decode(frequencies(row)) for row in rows} <= set(range(7))


def test_one_unit_in_the_last_place_breaks_decoding(tiny_artifact, tmp_path, coded_text, capsys, monkeypatch):
    """A decoder whose likeliest token has one more of the 2^24: refused, nothing is written."""
    original = Scorer.predict

    def rounded_otherwise(scorer, past):
        row = original(scorer, past)
        row[row.argmax()] += 2**-24
        return row

    monkeypatch.setattr(Scorer, "predict", rounded_otherwise)
    (tmp_path / "coded").write_bytes(coded_text)
    assert codec("decompress", tiny_artifact, tmp_path / "coded", tmp_path / "back") == 5
    assert "it decodes to something else" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
