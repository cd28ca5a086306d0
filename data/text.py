"""Turn any text into token shards: `python data/text.py [INPUT ...]`.

Inputs are files and folders of text or source code, and .jsonl files with a text field; each may be
compressed (.gz, .xz, .zst). Without inputs it takes the standard library of the running Python. Out, in one
folder: token shards in the contest's format, the tokenizer, and manifest.json (per split: documents, tokens,
raw bytes, SHA-256). The split goes by the content of a document (first 8 bytes of its SHA-256, big-endian,
modulo 20: 0 validates), and equal documents are kept once, so no document is on both sides. Every document
survives exactly: decode(encode(document)) == document.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import io
import json
import lzma
import os
import re
import shlex
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import (
    MARKER_ID,
    SHARD_HEADER_BYTES,
    SHARD_MAGIC,
    SHARD_VERSION,
    WORD_START,
    DataError,
    Settings,
    Tokenizer,
    failure_of,
    file_sha256,
    shards_sha256,
    write_atomically,
)

SHARD_TOKENS = 100_000_000  # tokens of a full shard, as the contest cuts them
SPLIT_MODULUS = 20
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test"}
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".lzma": lzma.open, ".zst": zstandard.open}


def standard_library() -> list[Path]:
    """Return every *.py of the running Python's library outside site-packages and test folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"))
    kept = [path for path in paths if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])]
    return [path for path in kept if path.is_file()]


def list_files(inputs: list[Path]) -> list[tuple[Path, bool]]:
    """Return (file, named) for all inputs; folders are walked in path order, hidden entries left out.

    Raises DataError where an input does not exist.
    """
    files = []
    for path in inputs:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                files.extend([(file, False)] if file.is_file() and not hidden else [])
        elif path.is_file():
            files.append((path, True))
        else:
            raise DataError(f"{path}: no such file or folder; name existing inputs")
    return files


def open_input(path: Path) -> io.BufferedIOBase:
    """Open a file for reading bytes, through its decompressor where its suffix names one."""
    return OPENERS.get(path.suffix, open)(path, "rb")


def read_jsonl(path: Path, field: str) -> Iterator[bytes]:
    """Yield the text of each line of a .jsonl file; raises DataError with the number of a broken line."""
    with open_input(path) as file:
        for number, line in enumerate(io.BufferedReader(file), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                yield text.encode("utf-8", errors="surrogatepass")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                rule = f"a JSON object with a text field {field!r}"
                raise DataError(
                    f"{path}: line {number} is not {rule}; mend it or set --text-field"
                ) from error


def read_documents(files: list[tuple[Path, bool]], field: str) -> Iterator[bytes]:
    """Yield the documents of all files; a binary file is skipped in a folder and refused when named."""
    for path, named in files:
        try:
            if path.name.removesuffix(path.suffix if path.suffix in OPENERS else "").endswith(".jsonl"):
                yield from read_jsonl(path, field)
                continue
            with open_input(path) as file:
                document = file.read()
        except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
            raise DataError(f"{path}: cannot be read ({error}); mend it or leave it out") from error
        if b"\0" not in document[:8192]:
            yield document
        elif named:
            raise DataError(f"{path}: a binary file (it holds zero bytes), not text; leave it out")


def split_of(digest: bytes, tune: bool) -> str | None:
    """Return "train" or "val" for a document with this SHA-256, or None for one that is left out.

    With `tune` the validation documents stay away and a twentieth of the training documents takes their
    place: for choosing settings without a look at the validation split.
    """
    remainder = int.from_bytes(digest[:8], "big") % SPLIT_MODULUS
    if tune:
        return {0: None, 1: "val"}.get(remainder, "train")
    return "val" if remainder == 0 else "train"


def shard_header(tokens: int) -> bytes:
    """Return the 1,024-byte header of a shard of `tokens` tokens: 256 little-endian int32."""
    return struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, tokens).ljust(SHARD_HEADER_BYTES, b"\0")


class ShardWriter:
    """Collects one split's tokens into shards of at most SHARD_TOKENS, each written atomically."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.paths: list[Path] = []
        self.pending: list[np.ndarray] = []
        self.documents = self.tokens = self.bytes = self.waiting = 0

    def add(self, ids: list[int], size: int) -> None:
        """Take in one document of `size` raw bytes."""
        self.pending.append(np.array([MARKER_ID, *ids], dtype="<u2"))
        self.documents += 1
        self.tokens += 1 + len(ids)
        self.bytes += size
        self.waiting += 1 + len(ids)
        while self.waiting >= SHARD_TOKENS:
            self.flush(SHARD_TOKENS)

    def flush(self, count: int) -> None:
        """Write the first `count` waiting tokens as the next shard."""
        tokens = np.concatenate(self.pending) if self.pending else np.zeros(0, dtype="<u2")
        path = self.folder / f"text_{self.split}_{len(self.paths):06d}.bin"
        write_atomically(path, shard_header(count) + tokens[:count].tobytes())
        self.paths.append(path)
        self.pending, self.waiting = [tokens[count:]], len(tokens) - count

    def close(self) -> dict[str, object]:
        """Write what is left; return the split's entry in the manifest."""
        if self.waiting or not self.paths:
            self.flush(self.waiting)
        entry = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return entry | {"sha256": shards_sha256(self.paths), "shards": [path.name for path in self.paths]}


def training_chunks(documents: list[bytes]) -> Iterator[str]:
    """Yield a line with the indentation of the next: pieces may then span the line break."""
    for document in documents:
        text = document.decode("utf-8", errors="ignore").replace(WORD_START, " ").replace("\0", "")
        chunk = ""
        for line in text.splitlines(keepends=True):
            body = line.lstrip(" \t")
            chunk += line[: len(line) - len(body)]
            if chunk:
                yield chunk
            chunk = body
        if chunk:
            yield chunk


def train_tokenizer(documents: list[bytes], vocab_size: int) -> bytes:
    """Return a SentencePiece BPE model: identity normalisation, byte fallback, pieces that may span spaces.

    Raises DataError where the text is too small for `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_chunks(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentencepiece_length=24,
            max_sentence_length=1_000_000,
            pad_id=0,
            bos_id=MARKER_ID,
            eos_id=2,
            unk_id=3,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        most = re.search(r"<= (\d+)", reason)
        remedy = f"choose {most[1]} at most" if most else f"change it ({reason})"
        raise DataError(f"--vocab-size {vocab_size} does not fit this text; {remedy}") from error
    return model.getvalue()


def fingerprint(files: list[tuple[Path, bool]], arguments: argparse.Namespace) -> str:
    """Return a digest of all options and of the inputs' names, sizes and times: it stands for a dataset."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in files]
    tokenizer = file_sha256(arguments.tokenizer) if arguments.tokenizer else arguments.vocab_size
    options = (tokenizer, arguments.text_field, arguments.tune, arguments.sample_bytes)
    sources = [file_sha256(Path(__file__)), inspect.getsource(Tokenizer), options, stats]
    return hashlib.sha256(repr(sources).encode()).hexdigest()


def up_to_date(folder: Path, digest: str) -> bool:
    """Return whether `folder` holds the complete dataset that `digest` stands for."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = [name for split in manifest["splits"].values() for name in split["shards"]]
        files = [folder / name for name in [*names, manifest["tokenizer"]["file"]]]
        return manifest["fingerprint"] == digest and all(file.is_file() for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def how_to_use(folder: Path) -> str:
    """Return the variables to use the dataset in `folder` with, as a shell takes them."""
    tokenizer = folder / json.loads((folder / "manifest.json").read_text())["tokenizer"]["file"]
    size = len(Tokenizer.load(tokenizer).pieces)
    paths = f"DATA_PATH={shlex.quote(str(folder))} TOKENIZER_PATH={shlex.quote(str(tokenizer))}"
    return f"use with {paths} VOCAB_SIZE={size}"


def build(arguments: argparse.Namespace) -> str:
    """Make the dataset; return the line to print."""
    if arguments.inputs:
        files = list_files(arguments.inputs)
    else:
        files = [(path, False) for path in standard_library()]
    folder: Path = arguments.output
    digest = fingerprint(files, arguments)
    if up_to_date(folder, digest):
        return f"{folder} is up to date\n{how_to_use(folder)}"
    seen: dict[bytes, str | None] = {}
    sample, sample_bytes, duplicates = [], 0, 0
    documents = read_documents(files, arguments.text_field)
    for document in tqdm(documents, "read", leave=False, disable=None, unit="doc"):
        content = hashlib.sha256(document).digest()
        duplicates += content in seen
        if content not in seen:
            seen[content] = split_of(content, arguments.tune)
            if seen[content] == "train" and sample_bytes < arguments.sample_bytes:
                sample.append(document)
                sample_bytes += len(document)
    if not sample_bytes:
        raise DataError(
            "the inputs hold no training text (corpus empty, or all of it validates); name more of them"
        )
    trained_here = arguments.tokenizer is None
    if trained_here:
        tokenizer = Tokenizer(train_tokenizer(sample, arguments.vocab_size))
    else:
        tokenizer = Tokenizer.load(arguments.tokenizer)
    name = "tokenizer.model" if tokenizer.model else "tokenizer.json"
    for stale in [*folder.glob("text_*.bin"), folder / "manifest.json"]:
        stale.unlink(missing_ok=True)
    write_atomically(folder / name, tokenizer.source)
    writers = {split: ShardWriter(folder, split) for split in ("train", "val")}
    documents = read_documents(files, arguments.text_field)
    for document in tqdm(documents, "encode", len(seen) + duplicates, leave=False, disable=None, unit="doc"):
        writer = writers.get(seen.pop(hashlib.sha256(document).digest(), None))
        if writer:
            ids = tokenizer.encode(document)
            if tokenizer.decode(ids) != document:
                raise DataError("a document does not survive encode and decode; please report the tokenizer")
            writer.add(ids, len(document))
    splits = {split: writer.close() for split, writer in writers.items()}
    if not splits["val"]["documents"]:
        raise DataError(f"{folder}: none of the documents validates (one in {SPLIT_MODULUS} does); add more")
    entry = {"file": name, "sha256": tokenizer.sha256, "trained_here": trained_here}
    manifest = {"fingerprint": digest, "duplicates": duplicates, "tokenizer": entry, "splits": splits}
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    counts = "; ".join(
        f"{split}: {values['documents']} documents, {values['bytes']} bytes, {values['tokens']} tokens"
        for split, values in splits.items()
    )
    return f"{folder}: {counts}; {duplicates} duplicates dropped\n{how_to_use(folder)}"


def main(argv: list[str]) -> int:
    """Parse the command line, build the dataset, return the exit code (5: an input is bad)."""
    cpu = Settings.from_env({"RECIPE": "cpu"})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, help="files and folders (default: Python's standard library)")
    add("--output", type=Path, default=Path(cpu.data_path), help="folder to write (%(default)s)")
    add("--vocab-size", type=int, default=cpu.vocab_size, help="pieces to train (%(default)s)")
    add("--tokenizer", type=Path, help="use this tokenizer instead of training one")
    add("--text-field", default="text", help="field of .jsonl lines (%(default)s)")
    add("--sample-bytes", type=int, default=50_000_000, help="text to train the tokenizer on (%(default)s)")
    add("--tune", action="store_true", help="hold out training documents instead of validation's")
    arguments = parser.parse_args(argv)
    try:
        if not 2 <= arguments.vocab_size <= 2**16:
            raise DataError(f"--vocab-size {arguments.vocab_size} is not between 2 and 65536; choose another")
        if arguments.tokenizer:
            Tokenizer.load(arguments.tokenizer)
        print(build(arguments))
        return 0
    except (DataError, OSError) as error:
        code, message = failure_of(error)
        print(f"error: {message}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
