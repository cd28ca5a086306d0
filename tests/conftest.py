"""Shared fixtures: a tiny dataset made by data/text.py, settings for seconds-long runs, runs in this process.

Tests import the script as a module; nothing here touches the real environment, the network or files outside
pytest's temporary folders. Tests that need the sample data take its folder from SAMPLE_DATA and are skipped
without it.
"""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import text
import torch

import train_gpt

REPOSITORY = Path(train_gpt.__file__).resolve().parent
TEST_SECONDS = 120  # a test that hangs fails instead of holding up the suite


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def watchdog(request):
    """Fail a test that takes longer than TEST_SECONDS (ten times that when marked slow)."""

    def fail(*_):
        raise TimeoutError(f"{request.node.name} took longer than {TEST_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(TEST_SECONDS * (10 if "slow" in request.keywords else 1))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: the same bits on every machine, and no fight over two cores."""
    torch.set_num_threads(1)


def make_documents(count, seed=0, words=200):
    """Return `count` different small documents of made-up words, as bytes."""
    generator = random.Random(seed)
    lexicon = ["".join(generator.choices("abcdefgehinorst", k=generator.randint(2, 8))) for _ in range(150)]
    documents = []
    for _ in range(count):
        lines = [" ".join(generator.choices(lexicon, k=generator.randint(3, 12))) for _ in range(words // 8)]
        documents.append(("\n    ".join(lines) + "\n").encode())
    return documents


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 120 small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, document in enumerate(make_documents(120)):
        (folder / f"{index:03d}.txt").write_bytes(document)
    return folder


@pytest.fixture(scope="session")
def dataset_dir(corpus, tmp_path_factory):
    """A dataset of data/text.py with 384 pieces, the vocabulary of the smoke recipe."""
    folder = tmp_path_factory.mktemp("dataset")
    assert text.main([str(corpus), "--output", str(folder), "--vocab-size", "384"]) == 0
    return folder


def write_artifact(path, tokenizer, embed=True, scale=0.3, **settings):
    """Write an artifact of random weights with standard deviation `scale`; by default the smoke recipe's."""
    settings = train_gpt.Settings.from_env(
        {"RECIPE": "smoke", "VOCAB_SIZE": str(len(tokenizer.pieces)), **settings}
    )
    torch.manual_seed(0)
    weights = {name: scale * torch.randn_like(w) for name, w in train_gpt.GPT(settings).state_dict().items()}
    path.write_bytes(train_gpt.pack_artifact(weights, settings, tokenizer, embed))
    return path


@pytest.fixture(scope="session")
def tiny_artifact(dataset_dir, tmp_path_factory):
    """A small artifact of random weights that carries the dataset's tokenizer."""
    tokenizer = train_gpt.Tokenizer.load(dataset_dir / "tokenizer.model")
    small = {"NUM_LAYERS": "2", "MODEL_DIM": "16", "CACHE_HIDDEN": "8"}
    return write_artifact(tmp_path_factory.mktemp("artifact") / "artifact.bin", tokenizer, **small)


@pytest.fixture
def env(dataset_dir, tmp_path):
    """Variables of a run that takes about a second and writes to its own folder."""
    return {
        "RECIPE": "smoke",
        "DATA_PATH": str(dataset_dir),
        "TOKENIZER_PATH": str(dataset_dir / "tokenizer.model"),
        "RUN_DIR": str(tmp_path / "run"),
        "EVAL_STRIDE": "32",
        "VAL_LOSS_EVERY": "0",
        "AUDIT": "0",  # test_12_audit.py has it on
    }


@pytest.fixture
def process():
    """This process, alone, on the CPU."""
    return train_gpt.Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def sample_data():
    """The folder of sample data, or skip."""
    folder = os.environ.get("SAMPLE_DATA")
    if not folder:
        pytest.skip("SAMPLE_DATA is not set")
    return Path(folder)


def result_of(env):
    """Return result.json of the run that `env` asked for."""
    return json.loads((Path(env["RUN_DIR"]) / "result.json").read_text())


def metrics_of(env, event):
    """Return the objects of one event in metrics.jsonl."""
    lines = (Path(env["RUN_DIR"]) / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def shell_environment(env, **more):
    """Return a subprocess environment: this one's tool variables, the run's settings, one thread."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", **env, **more}
