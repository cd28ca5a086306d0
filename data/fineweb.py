"""Download the contest's FineWeb shards and their tokenizer: `python data/fineweb.py [--train-shards N]`.

In: a dataset repository of the Hugging Face hub (MATCHED_FINEWEB_REPO_ID) whose manifest.json, under the
folder MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, names datasets and tokenizers. Out, where train_gpt.py looks for
them: all validation shards and the first N training shards, and the tokenizer. Every file is checked before
it gets its final name; files that are there and sound are kept, so an interrupted download goes on where it
stopped. Where the hub cannot be reached, its client's cache is used. Needs huggingface_hub.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import DataError, RunError, SettingError, Tokenizer, check_token_ids, open_shard

REPO_ID = "willdepueoai/parameter-golf"
REMOTE_ROOT_PREFIX = "datasets"
CLIENT = "huggingface_hub==2.4.0"
CHECKED_TOKENS = 2**24  # tokens checked at a time: 32 MB of a memory-mapped shard


class Entry(NamedTuple):
    """What the manifest says of one dataset; paths are relative to the remote root."""

    path: str
    tokenizer: str
    train: int  # number of training shards
    val: int
    vocab_size: int | None


def root_cause(error: BaseException) -> str:
    """Return the first line of what an error began with: its own words may name the hub's remedies only."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Hub:
    """A dataset repository, reached through the hub's client and its cache."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        """`folder`: where shards belong, for messages. Raises DataError where the client is not installed."""
        try:
            import huggingface_hub
            from huggingface_hub.utils import disable_progress_bars, logging
        except ImportError as error:
            raise DataError(
                f"huggingface_hub cannot be imported ({root_cause(error)}); run `pip install {CLIENT}`"
            ) from error
        # The client's warnings and bars would stand beside the one line that an error has here.
        logging.set_verbosity_error()
        disable_progress_bars()
        self.repo = environment.get("MATCHED_FINEWEB_REPO_ID", REPO_ID)
        self.root = environment.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", REMOTE_ROOT_PREFIX).strip("/")
        endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or None
        self.download = partial(
            huggingface_hub.hf_hub_download, repo_id=self.repo, repo_type="dataset", endpoint=endpoint
        )
        self.unreachable = ""  # why, once the hub was found to be out of reach
        self.remedy = f"run `python data/text.py` for any text, or copy shards into {folder}"

    def name(self, path: str) -> str:
        """Return the name in the repository of a path relative to the remote root."""
        return f"{self.root}/{path}".lstrip("/")

    def fetch(self, path: str, force: bool = False) -> Path:
        """Return a file in the client's cache, downloaded if it is not there or if `force` is set.

        Raises DataError, whatever fails: the client's errors have no common base.
        """
        options = {"force_download": force, "local_files_only": bool(self.unreachable)}
        try:
            return Path(self.download(filename=self.name(path), **options))
        except Exception as error:
            reason = self.unreachable or root_cause(error)
            message = f"{self.repo}: {self.name(path)} cannot be fetched ({reason})"
            raise DataError(f"{message}; {self.remedy}") from error

    def fetch_manifest(self) -> Path:
        """Return manifest.json as the hub has it, or else as the client's cache has it.

        Forced, the client gives up after one try; unforced, it would try for minutes behind a firewall.
        """
        try:
            return self.fetch("manifest.json", force=True)
        except DataError as error:
            self.unreachable = root_cause(error)
            return self.fetch("manifest.json")


def read_entry(path: Path, variant: str) -> Entry:
    """Return the dataset `variant` of a manifest.

    Raises SettingError where the manifest has no such dataset, DataError where it is damaged.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        datasets = {str(entry["name"]): entry for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
        if f"fineweb10B_{variant}" not in datasets:
            names = ", ".join(sorted(name.removeprefix("fineweb10B_") for name in datasets))
            raise SettingError(f"--variant {variant} is not in the manifest; choose one of {names or 'none'}")
        dataset = datasets[f"fineweb10B_{variant}"]
        tokenizer, stats = tokenizers[dataset["tokenizer_name"]], dataset["stats"]
        keys = [key for key in ("model_path", "json_path", "path") if tokenizer.get(key)]
        size = dataset.get("vocab_size")
        return Entry(
            str(dataset["path"]).strip("/"),
            str(tokenizer[keys[0]]).strip("/"),
            int(stats["files_train"]),
            int(stats["files_val"]),
            None if size is None else int(size),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"not a manifest of datasets and tokenizers ({error!r})"
        raise DataError(
            f"{path.name}: {reason}; set MATCHED_FINEWEB_REPO_ID to a repository with one"
        ) from error


def check_shard(path: Path, vocab_size: int) -> None:
    """Raise DataError unless `path` is a whole shard of token ids below `vocab_size`."""
    tokens = open_shard(path)
    for start in range(0, len(tokens), CHECKED_TOKENS):
        check_token_ids(tokens[start : start + CHECKED_TOKENS], vocab_size, path)


def check_tokenizer(path: Path, name: str, vocab_size: int | None) -> None:
    """Raise DataError, naming `name`, unless `path` is a tokenizer of `vocab_size` pieces."""
    try:
        pieces = len(Tokenizer(path.read_bytes()).pieces)
    except ValueError as error:
        raise DataError(f"{name}: {error}; get it anew") from error
    if vocab_size not in (None, pieces):
        raise DataError(f"{name}: {pieces} pieces are not the {vocab_size} of the manifest; mend one of them")


def place(source: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Put `source` at `target`, by a link where possible; passes on the DataError of a failed `check`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed run: copying onto a link would write to the cache
    try:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        check(temporary)
        os.replace(temporary, target)
    except DataError as error:
        raise DataError(str(error).replace(str(temporary), target.name)) from error
    finally:
        temporary.unlink(missing_ok=True)


def obtain(hub: Hub, path: str, target: Path, check: Callable[[Path], None]) -> bool:
    """Bring the hub's file `path` to `target`; return False where a sound one is there already.

    Raises DataError, and leaves nothing new at `target`, where the hub has no sound one.
    """
    with contextlib.suppress(DataError):
        if target.is_file():
            check(target)
            return False
    fault: DataError | None = None
    for force in (False, True):  # a damaged file may be the cache's only, so it is fetched anew, once
        source = hub.fetch(path, force)
        try:
            place(source, target, check)
            return True
        except DataError as error:
            fault = error
    raise DataError(
        f"{hub.repo}: {hub.name(path)} is damaged, it was not kept ({fault}); run again to fetch it anew"
    ) from fault


def build(arguments: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """Download what `arguments` ask for; return the line to print."""
    variant, count = arguments.variant, arguments.train_shards
    if not re.fullmatch(r"sp[1-9][0-9]*|byte260", variant):
        raise SettingError(
            f"--variant {variant!r} is neither byte260 nor sp and a vocabulary size; try sp1024"
        )
    if count < 0:
        raise SettingError(f"--train-shards {count} is below 0; raise it to 0 at least")
    folder: Path = arguments.output / "datasets" / f"fineweb10B_{variant}"
    hub = Hub(environment, folder)
    entry = read_entry(hub.fetch_manifest(), variant)
    if count > entry.train:
        raise SettingError(
            f"--train-shards {count} is more than the {entry.train} of {variant}; lower it to that at most"
        )
    tokenizer = arguments.output / "tokenizers" / Path(entry.tokenizer).name
    sound = partial(check_tokenizer, name=tokenizer.name, vocab_size=entry.vocab_size)
    fetched = int(obtain(hub, entry.tokenizer, tokenizer, sound))
    vocab_size = len(Tokenizer.load(tokenizer).pieces)
    # Validation comes first: with it, an interrupted download can already score an artifact.
    names = [f"fineweb_val_{index:06d}.bin" for index in range(entry.val)]
    names += [f"fineweb_train_{index:06d}.bin" for index in range(count)]
    for name in tqdm(names, variant, leave=False, disable=None, unit="file"):
        sound = partial(check_shard, vocab_size=vocab_size)
        fetched += obtain(hub, f"{entry.path}/{name}", folder / name, sound)
    shards = f"{count} training and {entry.val} validation shards and a tokenizer"
    paths = f"DATA_PATH={shlex.quote(str(folder))} TOKENIZER_PATH={shlex.quote(str(tokenizer))}"
    kept = f"{fetched} files fetched, {len(names) + 1 - fetched} kept"
    return f"{folder}: {shards} ({kept}); use with {paths} VOCAB_SIZE={vocab_size}"


def main(argv: list[str], environment: Mapping[str, str]) -> int:
    """Parse the command line, download, return the exit code (2: an option, 5: the hub or a file is bad)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variant", default="sp1024", help="sp1024, another sp<size>, or byte260 (%(default)s)")
    add("--train-shards", type=int, default=80, help="training shards, from the first on (%(default)s)")
    add("--output", type=Path, default=Path("data"), help="folder to write to (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        print(build(arguments, environment))
        return 0
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        problem = f"--output {arguments.output}: cannot be written ({error})"
        print(f"error: {problem}; make room there or choose another folder", file=sys.stderr)
        return DataError.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
