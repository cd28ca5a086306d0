"""The source itself: size, order, purity. Run alone: pytest tests/test_00_source.py"""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY, shell_environment

import train_gpt

SOURCE = (REPOSITORY / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
DEFINITIONS = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def code_lines():
    """Return the numbers of lines that are neither blank, comment nor docstring."""
    documentation = set()
    for node in [TREE, *FUNCTIONS, *(n for n in ast.walk(TREE) if isinstance(n, ast.ClassDef))]:
        if ast.get_docstring(node):
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(SOURCE.splitlines(), 1)
    return [n for n, line in lines if line.strip() and line.strip()[0] != "#" and n not in documentation]


def test_size():
    assert len(SOURCE.splitlines()) <= 2900
    assert len(code_lines()) <= 2000


def test_width_and_one_statement_a_line():
    assert max(map(len, SOURCE.splitlines())) <= 110
    starts = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts))


def test_functions_are_short():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert {name: length for name, length in lengths.items() if length > 80} == {}
    assert sum(length > 60 for length in lengths.values()) <= len(lengths) // 10


def test_public_definitions_have_docstrings():
    members = [m for node in DEFINITIONS if isinstance(node, ast.ClassDef) for m in node.body]
    public = [n for n in [*DEFINITIONS, *members] if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert [n.name for n in public if not n.name.startswith("_") and not ast.get_docstring(n)] == []


def forward_references(tree):
    """Return (name, line) wherever a definition uses a top-level name that is defined below it."""
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lines = {node.name: node.lineno for node in definitions}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            lines |= {target.id: node.lineno for target in node.targets if isinstance(target, ast.Name)}
    loads = [(node, name) for node in tree.body for name in ast.walk(node) if isinstance(name, ast.Name)]
    loads = [(node, name) for node, name in loads if isinstance(name.ctx, ast.Load)]
    return [(name.id, node.lineno) for node, name in loads if lines.get(name.id, 0) > node.end_lineno]


def test_no_forward_references():
    assert forward_references(TREE) == []
    late = forward_references(ast.parse("def f():\n    return g() + C\ndef g(): pass\nC = 1"))
    assert sorted(late) == [("C", 1), ("g", 1)]


def test_sections_are_numbered_described_and_tested():
    bar = "# " + "=" * 108
    lines = SOURCE.splitlines()
    banners = [i for i, line in enumerate(lines) if line == bar and re.match(r"# \d+ [A-Z]", lines[i + 1])]
    numbers = [int(lines[i + 1].split()[1]) for i in banners]
    assert numbers == list(range(1, len(numbers) + 1))
    for index, number in zip(banners, numbers, strict=True):
        description = lines[index + 1 : lines.index(bar, index + 1)]
        assert 3 <= len(description) <= 8
        assert list((REPOSITORY / "tests").glob(f"test_{number:02d}_*.py")), (
            f"no test file for section {number}"
        )
        title = description[0].split(".")[0].removeprefix("# ").split(maxsplit=1)[1]
        assert re.search(rf"^    {number}  {title} ", ast.get_docstring(TREE, clean=False), re.M)


def environment_reads(tree):
    """Return the lines that read the environment outside the main guard."""
    names = ("environ", "getenv", "environb")
    reads = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in names]
    guard = range(tree.body[-1].lineno, tree.body[-1].end_lineno + 1)
    return [line for line in reads if line not in guard]


def test_environment_is_read_in_the_main_guard_only():
    assert environment_reads(TREE) == []
    assert "os.environ" in ast.unparse(TREE.body[-1])
    assert environment_reads(ast.parse("import os\nx = os.environ['A']\nif x:\n    os.getenv('B')")) == [2]


def test_no_globals_and_no_getattr_on_settings():
    assert not any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(TREE))
    assert not re.search(r"getattr\(settings", SOURCE)


def test_every_setting_is_read():
    attributes = [node for node in ast.walk(TREE) if isinstance(node, ast.Attribute)]
    holders = ("settings", "self", "s")
    owned = [n for n in attributes if not isinstance(n.value, ast.Name) or n.value.id in holders]
    unread = {field.name for field in dataclasses.fields(train_gpt.Settings)} - {n.attr for n in owned}
    assert unread == set()


PURITY = """
import sys, torch, numpy, sentencepiece, zstandard, tqdm
import torch.distributed
def watch(event, args):
    wrote = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if wrote or event in ("os.mkdir", "subprocess.Popen", "socket.connect", "os.putenv"):
        print("IMPURE", event, args)
before = torch.get_rng_state()
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import train_gpt
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(before, torch.get_rng_state())
print("imported")
"""


def test_import_is_pure():
    command = [sys.executable, "-c", PURITY]
    done = subprocess.run(command, cwd=REPOSITORY, env=shell_environment({}), capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stdout + done.stderr


@pytest.mark.parametrize("word", ["pickle", "torch.load", "torch.save", "eval(", "exec("])
def test_no_unsafe_loading(word):
    code = "\n".join(SOURCE.splitlines()[n - 1] for n in code_lines())
    assert not re.search(rf"(?<![\w.]){re.escape(word)}", code)


def test_top_level_holds_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    expected = {
        *("train_gpt.py", "data", "records", "tests", "README.md", "Makefile", "pyproject.toml", "LICENSE"),
        *("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt", ".gitignore", ".ci"),
    }
    assert {line.split("/")[0] for line in listed.splitlines()} <= expected


def test_requirements_are_pinned():
    for path in REPOSITORY.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or re.match(r"[\w-]+==[\w.]+( ;|$)", line), line
