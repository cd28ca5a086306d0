"""data/text.py: any text to shards, exactly, once. Run alone: pytest tests/test_data_text.py"""

import gzip
import hashlib
import json
import lzma
import shlex

import numpy as np
import pytest
import text
import zstandard
from conftest import make_documents

import train_gpt
from train_gpt import Tokenizer, open_shard


def build(capsys, *arguments):
    """Run the command line; return (exit code, stdout, stderr)."""
    code = text.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def documents_of(folder, split):
    """Return the raw documents that a split's shards hold."""
    manifest = manifest_of(folder)
    tokenizer = Tokenizer.load(folder / manifest["tokenizer"]["file"])
    tokens = np.concatenate([open_shard(folder / name) for name in manifest["splits"][split]["shards"]])
    starts = np.flatnonzero(tokens == train_gpt.MARKER_ID)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def test_shards_hold_every_document_once_in_order(dataset_dir, corpus):
    documents = [path.read_bytes() for path in sorted(corpus.iterdir())]
    digests = {document: hashlib.sha256(document).digest() for document in documents}
    validates = {d: int.from_bytes(digest[:8], "big") % 20 == 0 for d, digest in digests.items()}
    assert documents_of(dataset_dir, "val") == [d for d in documents if validates[d]] != []
    assert documents_of(dataset_dir, "train") == [d for d in documents if not validates[d]]


def test_manifest_counts_what_is_there(dataset_dir):
    manifest = manifest_of(dataset_dir)
    for split, entry in manifest["splits"].items():
        documents = documents_of(dataset_dir, split)
        paths = [dataset_dir / name for name in entry["shards"]]
        assert entry["documents"] == len(documents)
        assert entry["bytes"] == sum(map(len, documents))
        assert entry["tokens"] == sum(len(open_shard(path)) for path in paths)
        assert entry["sha256"] == train_gpt.shards_sha256(paths)
    assert manifest["tokenizer"]["trained_here"] is True
    assert manifest["tokenizer"]["sha256"] == train_gpt.file_sha256(dataset_dir / "tokenizer.model")


HARD_DOCUMENTS = [
    b"",
    b"   \n \n",
    b"a\r\nb\rc\n",
    "\N{GRINNING FACE} \u2581 \ufb01".encode(),
    b"bad \xff\xfe utf-8 \xc3(",
    b"x" * 5000,
]


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".xz", ".zst"])
def test_hard_documents_survive_in_every_container(tmp_path, capsys, suffix):
    compress = {".txt": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    documents = make_documents(60, seed=5) + HARD_DOCUMENTS
    for index, document in enumerate(documents):
        (folder / f"{index:02d}{suffix}").write_bytes(compress(document))
    assert build(capsys, folder, "--output", out, "--vocab-size", 400)[0] == 0
    found = documents_of(out, "train") + documents_of(out, "val")
    assert sorted(found) == sorted(documents)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_json_lines(tmp_path, capsys, suffix):
    documents = make_documents(60, seed=6)
    lines = "".join(json.dumps({"body": d.decode(), "n": 1}) + "\n" for d in documents).encode() + b"\n"
    path = tmp_path / f"corpus{suffix}"
    compress = {"jsonl": bytes, "gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}
    path.write_bytes(compress[suffix.split(".")[-1]](lines))
    code, _, _ = build(
        capsys, path, "--output", tmp_path / "out", "--vocab-size", 400, "--text-field", "body"
    )
    assert code == 0
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert sorted(found) == sorted(documents)


def test_duplicates_are_dropped_counted_and_never_straddle(tmp_path, capsys):
    documents = make_documents(60, seed=7)
    for index, document in enumerate([*documents, *documents[:25]]):
        (tmp_path / f"{index:02d}.txt").write_bytes(document)
    code, out, _ = build(capsys, tmp_path, "--output", tmp_path / ".out", "--vocab-size", 400)
    assert code == 0
    assert "; 25 duplicates dropped" in out
    train, val = (documents_of(tmp_path / ".out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)


def test_tune_keeps_the_validation_documents_away(corpus, dataset_dir, tmp_path, capsys):
    assert build(capsys, corpus, "--output", tmp_path, "--vocab-size", 384, "--tune")[0] == 0
    held_out, trained = documents_of(tmp_path, "val"), documents_of(tmp_path, "train")
    assert held_out
    assert sorted(held_out + trained) == sorted(documents_of(dataset_dir, "train"))
    assert not set(documents_of(dataset_dir, "val")) & set(held_out + trained)


def test_an_existing_tokenizer_is_taken_and_not_embedded(corpus, dataset_dir, tmp_path, capsys):
    model = dataset_dir / "tokenizer.model"
    assert build(capsys, corpus, "--output", tmp_path, "--tokenizer", model)[0] == 0
    assert manifest_of(tmp_path)["tokenizer"]["trained_here"] is False
    assert manifest_of(tmp_path)["splits"] == manifest_of(dataset_dir)["splits"]


def test_work_already_done_is_skipped_and_changes_are_seen(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "with a space"
    source.mkdir()
    for index, document in enumerate(make_documents(60, seed=8)):
        (source / f"{index:02d}.txt").write_bytes(document)
    arguments = [source, "--output", out, "--vocab-size", 400]
    assert build(capsys, *arguments)[0] == 0
    stamp = (out / "manifest.json").stat().st_mtime_ns
    code, printed, _ = build(capsys, *arguments)
    use = f"DATA_PATH={shlex.quote(str(out))} TOKENIZER_PATH={shlex.quote(str(out / 'tokenizer.model'))}"
    assert (code, printed) == (0, f"{out} is up to date\nuse with {use} VOCAB_SIZE=400\n")
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    next(out.glob("*_val_*")).unlink()
    assert "up to date" not in build(capsys, *arguments)[1]
    (source / "new.txt").write_bytes(b"one more document\n")
    assert "up to date" not in build(capsys, *arguments)[1]
    assert "up to date" not in build(capsys, *arguments[:-1], 401)[1]
    assert "up to date" in build(capsys, *arguments[:-1], 401)[1]


def test_shards_are_cut_at_their_size(tmp_path, capsys, corpus, monkeypatch):
    monkeypatch.setattr(text, "SHARD_TOKENS", 30_000)
    assert build(capsys, corpus, "--output", tmp_path, "--vocab-size", 384)[0] == 0
    sizes = [len(open_shard(path)) for path in sorted(tmp_path.glob("*_train_*"))]
    assert sizes[:-1] == [30_000] * (len(sizes) - 1)
    assert sum(sizes) == manifest_of(tmp_path)["splits"]["train"]["tokens"]


def test_same_input_gives_the_same_files(tmp_path, capsys, corpus, dataset_dir):
    assert build(capsys, corpus, "--output", tmp_path, "--vocab-size", 384)[0] == 0
    for path in dataset_dir.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def bad_line(folder):
    (folder / "x.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    return [folder / "x.jsonl"], "x.jsonl: line 2 is not a JSON object with a text field 'text'"


def broken_line(folder):
    (folder / "x.jsonl").write_text('{"text": "fine"}\n\n{"text": "cut\n')
    return [folder / "x.jsonl"], "x.jsonl: line 3 is not a JSON object"


def binary(folder):
    (folder / "x.txt").write_bytes(b"\x7fELF\0\0\0")
    return [folder / "x.txt"], "x.txt: a binary file"


def missing(folder):
    return [folder / "nothing"], "nothing: no such file or folder"


def empty(folder):
    (folder / "x.txt").write_bytes(b"")
    return [folder], "hold no training text"


def truncated(folder):
    (folder / "x.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    return [folder / "x.txt.gz"], "x.txt.gz: cannot be read"


def too_small(folder):
    (folder / "x.txt").write_bytes(b"too little text for so many pieces\n")
    return [folder / "x.txt"], "--vocab-size 4000 does not fit this text"


def no_tokenizer(folder):
    (folder / "x.txt").write_bytes(b"some text")
    return [
        folder / "x.txt",
        "--tokenizer",
        folder / "nothing.model",
    ], "nothing.model: [Errno 2] No such file"


@pytest.mark.parametrize(
    "fault", [bad_line, broken_line, binary, missing, empty, truncated, too_small, no_tokenizer]
)
def test_bad_inputs_are_named_in_one_line(tmp_path, capsys, fault):
    arguments, words = fault(tmp_path)
    code, out, err = build(capsys, *arguments, "--output", tmp_path / ".out")
    assert code == 5
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / ".out" / "manifest.json").exists()


def test_binary_and_hidden_files_in_a_folder_are_left_out(tmp_path, capsys):
    documents = make_documents(60, seed=9)
    for index, document in enumerate(documents):
        (tmp_path / f"{index:02d}.txt").write_bytes(document)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"hidden\n")
    assert build(capsys, tmp_path, "--output", tmp_path / ".out", "--vocab-size", 400)[0] == 0
    found = documents_of(tmp_path / ".out", "train") + documents_of(tmp_path / ".out", "val")
    assert sorted(found) == sorted(documents)


def test_standard_library_is_the_default():
    paths = text.standard_library()
    names = {path.name for path in paths}
    assert len(paths) > 300
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in paths)
    assert paths == sorted(paths)


def test_a_failed_write_leaves_no_manifest(tmp_path, capsys, corpus, monkeypatch):
    def fail(self, count):
        raise train_gpt.DataError("the disk is full")

    monkeypatch.setattr(text.ShardWriter, "flush", fail)
    assert build(capsys, corpus, "--output", tmp_path, "--vocab-size", 384)[0] == 5
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.glob(".*"))
