"""data/fineweb.py against a stand-in for the hub. Run alone: pytest tests/test_data_fineweb.py

The hub's client is the real one; it talks to an HTTP server in a thread of this process. Nothing else is
reached: endpoint, cache and token are set for each test.
"""

import http.server
import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import fineweb
import numpy as np
import pytest
from conftest import REPOSITORY
from text import shard_header

import train_gpt
from train_gpt import Settings, load_dataset, open_shard

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

REPO = "willdepueoai/parameter-golf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "datasets/"
FOLDER = "datasets/fineweb10B_sp384/"
PURE_BYTES = json.dumps({"config": {"byte_offset": 4}}).encode()


def shard(count, seed, low=4, high=384):
    """Return a shard of `count` random token ids."""
    ids = np.random.default_rng(seed).integers(low, high, count).astype("<u2")
    return shard_header(count) + ids.tobytes()


def manifest():
    """Return the manifest of the stand-in's two datasets."""
    model = {"name": "sp_bpe_384", "model_path": "tokenizers/fineweb_384_bpe.model", "vocab_path": "no.vocab"}
    pure = {"name": "pure_byte_260", "json_path": "tokenizers/fineweb_pure_byte_260.json"}
    stats = {"files_train": 3, "files_val": 1}
    datasets = [
        {"name": f"fineweb10B_{variant}", "tokenizer_name": name, "vocab_size": size, "stats": stats}
        | {"path": f"datasets/fineweb10B_{variant}"}
        for variant, name, size in (("sp384", "sp_bpe_384", 384), ("byte260", "pure_byte_260", 260))
    ]
    return {"tokenizers": [model, pure], "datasets": datasets}


class StandIn(http.server.ThreadingHTTPServer):
    """Serves `files` (name in the repository -> content) the way the hub does; `asked` keeps the requests."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.repo, self.asked = files, REPO, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def shard_requests(self):
        """Return the names of the shards that were asked for since the last call."""
        asked, self.asked = self.asked, []
        return [name for name in asked if name.endswith(".bin")]


class Answer(http.server.BaseHTTPRequestHandler):
    """One request. The ETag goes by name, not by content: a mended file looks like the damaged one."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits for 40 ms

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        name = self.path.removeprefix(f"/datasets/{self.server.repo}/resolve/main/")
        self.server.asked.append(name)
        body = self.server.files.get(name)
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name.encode().hex()[-60:]}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(dataset_dir):
    """A running stand-in with four shards of sp384 and four of byte260."""
    files = {
        PREFIX + "manifest.json": json.dumps(manifest()).encode(),
        PREFIX + "tokenizers/fineweb_384_bpe.model": (dataset_dir / "tokenizer.model").read_bytes(),
        PREFIX + "tokenizers/fineweb_pure_byte_260.json": PURE_BYTES,
    }
    for variant, size in (("sp384", 384), ("byte260", 260)):
        for index, name in enumerate(["val_000000", *(f"train_{i:06d}" for i in range(3))]):
            content = shard(500 + index, seed=index, high=size)
            files[f"{PREFIX}datasets/fineweb10B_{variant}/fineweb_{name}.bin"] = content
    server = StandIn(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """The hub's client with an empty cache, without token, proxy and telemetry."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    huggingface_hub.close_session()


@pytest.fixture
def run(hub, tmp_path, capsys):
    """Call the script's main; returns (exit code, standard output, standard error)."""

    def call(*arguments, variant="sp384", shards=2, environment=()):
        argv = ["--variant", variant, "--train-shards", str(shards), "--output", str(tmp_path / "out")]
        code = fineweb.main([*argv, *arguments], {"HF_ENDPOINT": hub.url} | dict(environment))
        return code, *capsys.readouterr()

    return call


def tree(folder):
    """Return the names of all files under `folder`, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_refused(result, code, *words):
    """Check for an exit code and one line of error that holds all `words`."""
    assert result[0] == code and result[1] == ""
    assert result[2].startswith("error: ") and result[2].count("\n") == 1, result[2]
    assert [word for word in words if word not in result[2]] == []


def test_fresh_download(hub, run, tmp_path):
    code, out, err = run()
    assert (code, err) == (0, "")
    names = [f"{FOLDER}fineweb_{name}.bin" for name in ("train_000000", "train_000001", "val_000000")]
    assert tree(tmp_path / "out") == [*names, "tokenizers/fineweb_384_bpe.model"]
    for name in tree(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == hub.files[PREFIX + name]
    folder, model = tmp_path / "out" / FOLDER, tmp_path / "out/tokenizers/fineweb_384_bpe.model"
    counts = "2 training and 1 validation shards and a tokenizer (4 files fetched, 0 kept)"
    command = f"DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE=384"
    assert out == f"{folder}: {counts}; use with {command}\n"


def test_training_reads_what_the_last_line_says(run):
    command = run()[1].split("use with ")[1]
    mapping = dict(pair.split("=", 1) for pair in shlex.split(command))
    dataset = load_dataset(Settings.from_env({"RECIPE": "smoke"} | mapping))
    assert len(dataset.val_tokens) == 500 and dataset.stream.total == 501 + 502
    assert dataset.manifest is None


def test_second_run_downloads_nothing(hub, run, tmp_path):
    run()
    assert len(set(hub.shard_requests())) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    code, out, _ = run()
    assert code == 0 and "(0 files fetched, 4 kept)" in out
    assert hub.shard_requests() == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")} == before


def test_goes_on_where_it_stopped(hub, run, tmp_path):
    run(shards=1)
    hub.shard_requests()
    code, out, _ = run(shards=3)
    assert code == 0 and "(2 files fetched, 3 kept)" in out
    assert {name[-10:] for name in hub.shard_requests()} == {"000001.bin", "000002.bin"}


def test_damage_done_here_is_mended(hub, run, tmp_path):
    """The file is a link to the client's cache, so what damages one damages both."""
    run()
    path = tmp_path / "out" / FOLDER / "fineweb_train_000001.bin"
    with open(path, "r+b") as file:
        file.truncate(1500)
    code, out, _ = run()
    assert code == 0 and "(1 files fetched, 3 kept)" in out
    assert path.read_bytes() == hub.files[f"{PREFIX}{FOLDER}fineweb_train_000001.bin"]


FAULTS = {
    "length": (lambda content: content[:-2], "bytes are not the"),
    "header": (lambda content: content[:7], "bytes are not the"),
    "empty": (lambda content: b"", "magic number 0"),
    "magic": (lambda content: b"\0\0\0\0" + content[4:], "magic number 0"),
    "version": (lambda content: content[:4] + b"\2" + content[5:], "shard version 2"),
    "id": (lambda content: content[:-2] + b"\x80\x01", "token id 384 is not below VOCAB_SIZE=384"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_shard_is_refused_until_it_is_mended(fault, hub, run, tmp_path):
    change, words = FAULTS[fault]
    name = "fineweb_train_000001.bin"
    sound = hub.files[PREFIX + FOLDER + name]
    hub.files[PREFIX + FOLDER + name] = change(sound)
    assert_refused(run(), 5, REPO, PREFIX + FOLDER + name, words)
    there = [f"{FOLDER}fineweb_train_000000.bin", f"{FOLDER}fineweb_val_000000.bin"]
    assert tree(tmp_path / "out") == [*there, "tokenizers/fineweb_384_bpe.model"]
    hub.files[PREFIX + FOLDER + name] = sound
    code, out, _ = run()
    assert code == 0 and "(1 files fetched, 3 kept)" in out
    assert (tmp_path / "out" / FOLDER / name).read_bytes() == sound


def test_token_ids_are_checked_in_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(fineweb, "CHECKED_TOKENS", 7)
    path = tmp_path / "fineweb_val_000000.bin"
    for position in (0, 6, 7, 29):
        ids = np.full(30, 9, dtype="<u2")
        ids[position] = 10
        path.write_bytes(shard_header(30) + ids.tobytes())
        fineweb.check_shard(path, 11)
        with pytest.raises(train_gpt.DataError, match="token id 10"):
            fineweb.check_shard(path, 10)


@pytest.mark.parametrize("content", [b"", b"not a model", PURE_BYTES])
def test_damaged_tokenizer_is_refused(content, hub, run, tmp_path):
    hub.files[PREFIX + "tokenizers/fineweb_384_bpe.model"] = content
    words = "260 pieces are not the 384" if content == PURE_BYTES else "neither a SentencePiece model"
    assert_refused(run(), 5, "tokenizers/fineweb_384_bpe.model", words)
    assert tree(tmp_path / "out") == []


def test_tokenizer_of_another_size_is_refused(hub, run, tmp_path):
    hub.files[PREFIX + "tokenizers/fineweb_pure_byte_260.json"] = b'{"config": {"byte_offset": 5}}'
    assert_refused(run(variant="byte260"), 5, "261 pieces are not the 260 of the manifest")
    assert tree(tmp_path / "out") == []


def test_byte260(hub, run, tmp_path):
    code, out, err = run(variant="byte260", shards=1)
    assert (code, err) == (0, "") and out.endswith("VOCAB_SIZE=260\n")
    folder = tmp_path / "out/datasets/fineweb10B_byte260"
    assert tree(folder) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    assert int(open_shard(folder / "fineweb_val_000000.bin").max()) < 260
    assert (tmp_path / "out/tokenizers/fineweb_pure_byte_260.json").read_bytes() == PURE_BYTES


def test_vocabulary_size_need_not_be_stated(hub, run):
    listing = manifest()
    for entry in listing["datasets"]:
        del entry["vocab_size"]
    hub.files[PREFIX + "manifest.json"] = json.dumps(listing).encode()
    assert run()[0] == 0
    hub.files[PREFIX + FOLDER + "fineweb_train_000002.bin"] = shard(20, seed=0, low=384, high=400)
    assert_refused(run(shards=3), 5, "is not below VOCAB_SIZE=384")


def test_another_repository_and_root(hub, run):
    hub.repo = "me/mirror"
    hub.files = {name.removeprefix(PREFIX): content for name, content in hub.files.items()}
    environment = {"MATCHED_FINEWEB_REPO_ID": "me/mirror", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""}
    assert run(environment=environment)[0] == 0
    assert_refused(run(), 5, REPO, "datasets/manifest.json", "404")


def test_copies_where_it_cannot_link(hub, run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no links here")

    monkeypatch.setattr(fineweb.os, "link", fail)
    assert run()[0] == 0
    path = tmp_path / "out" / FOLDER / "fineweb_val_000000.bin"
    assert path.stat().st_nlink == 1
    assert path.read_bytes() == hub.files[f"{PREFIX}{FOLDER}fineweb_val_000000.bin"]


@pytest.mark.parametrize("count, words", [(4, "more than the 3"), (-1, "below 0")])
def test_number_of_training_shards(count, words, hub, run, tmp_path):
    assert_refused(run(shards=count), 2, f"--train-shards {count}", words)
    assert hub.shard_requests() == [] and not (tmp_path / "out").exists()


def test_no_training_shards(run, tmp_path):
    code, out, _ = run(shards=0)
    assert code == 0 and "0 training and 1 validation" in out
    assert tree(tmp_path / "out" / FOLDER) == ["fineweb_val_000000.bin"]


@pytest.mark.parametrize("variant", ["gpt2", "sp", "sp0", "byte256", "../sp384", "sp384\n", ""])
def test_unknown_variant(variant, hub, run):
    assert_refused(run(variant=variant), 2, "--variant")
    assert hub.asked == []


def test_variant_that_the_repository_lacks(hub, run):
    assert_refused(run(variant="sp1024"), 2, "--variant sp1024", "byte260, sp384")
    assert hub.shard_requests() == []


DAMAGED_MANIFESTS = [b"", b"[]", b"{}", b'{"tokenizers": [], "datasets": [1]}', b"\xff", b'{"datasets": {}}']


@pytest.mark.parametrize("content", DAMAGED_MANIFESTS)
def test_damaged_manifest(content, hub, run):
    hub.files[PREFIX + "manifest.json"] = content
    assert_refused(run(), 5, "manifest.json", "MATCHED_FINEWEB_REPO_ID")


@pytest.mark.parametrize("key", ["path", "tokenizer_name", "stats"])
def test_manifest_with_a_missing_key(key, hub, run):
    listing = manifest()
    del listing["datasets"][0][key]
    hub.files[PREFIX + "manifest.json"] = json.dumps(listing).encode()
    assert_refused(run(), 5, "manifest.json", key)


def test_file_that_the_repository_lacks(hub, run, tmp_path):
    del hub.files[f"{PREFIX}{FOLDER}fineweb_train_000001.bin"]
    folder = str(tmp_path / "out/datasets/fineweb10B_sp384")
    assert_refused(run(), 5, "fineweb_train_000001.bin", "404", "python data/text.py", folder)


def test_unreachable_hub(hub, tmp_path):
    """As a user sees it, in a process of its own; it does not sit out the client's 23 s of retries."""
    hub.shutdown()
    hub.server_close()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(REPOSITORY / "data/fineweb.py"), "--train-shards", "1"]
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=20, **options)
    words = ("manifest.json cannot be fetched", "Connection refused", "run `python data/text.py`")
    assert_refused((done.returncode, done.stdout, done.stderr), 5, *words)
    assert str(Path("data/datasets/fineweb10B_sp1024")) in done.stderr and "Traceback" not in done.stderr


def test_out_of_reach_the_cache_is_used(hub, run, tmp_path):
    run()
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()  # its open connection would be served on
    (tmp_path / "out" / FOLDER / "fineweb_val_000000.bin").unlink()
    code, out, err = run()
    assert (code, err) == (0, "") and "(1 files fetched, 3 kept)" in out
    assert_refused(run(shards=3), 5, "fineweb_train_000002.bin cannot be fetched", "Connection refused")


def test_repository_id_that_is_none(run):
    environment = {"MATCHED_FINEWEB_REPO_ID": "no such id"}
    assert_refused(run(environment=environment), 5, "no such id: datasets/manifest.json cannot be fetched")


def test_client_that_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(run(), 5, "pip install huggingface_hub==2.4.0")


def test_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert_refused(run(), 5, f"--output {tmp_path / 'out'}", "cannot be written")


def test_interrupt(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fineweb, "check_shard", interrupt)
    assert run() == (130, "", "")
    assert tree(tmp_path / "out") == ["tokenizers/fineweb_384_bpe.model"]
