"""README's examples and claims, run as they stand."""

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

from conftest import ROOT

from encodec_tokenizer import mending, parse_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_examples():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_print_what_they_say(run, tmp_path, monkeypatch):
    assert run("--dataset", "sample", "--output_dir", tmp_path / "work" / "tokenized")[0] == 0
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    scope, examples = {}, python_examples()
    assert len(examples) == 2
    for example in examples:
        out = io.StringIO()
        with redirect_stdout(out):
            exec(example, scope)
        said = re.search(r"^print.*  # (.*)$", example, re.MULTILINE)[1]
        assert out.getvalue() == said + "\n"


def test_readme_has_at_most_200_lines_and_names_each_example():
    assert README.count("\n") <= 200
    for path in (ROOT / "tests" / "examples").glob("*.py"):
        assert f"`{path.name}`" in README


def test_the_flags_in_the_table_have_their_defaults():
    settings = parse_settings(["--device", "cpu"])
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| [^|]+\|$", README, re.MULTILINE)
    assert len(rows) == 6
    for flags, defaults in rows:
        for flag, stated in zip(re.findall(r"--(\w+)", flags), defaults.split(", ")):
            default = getattr(settings, flag)
            words = {None: "all", False: "off", 6.0: "6"}
            assert stated.strip("`") == words.get(default, str(default))


def test_a_row_is_shown_as_it_is_made(run, tmp_path):
    """But for its tokens, which need the pretrained weights."""
    run("--dataset", "sample")
    header, *rows = (tmp_path / "out" / "tokenized_sample.csv").read_text().splitlines()
    shown_header, shown_row = re.search(
        r"^(fname,labels.*),\.\.\.\n(.*)$", README, re.MULTILINE
    ).groups()
    assert header.startswith(shown_header)
    facts = re.match(r'(.*"\(8, 150\)",\d+,[\d.]+),', shown_row)[1]
    assert any(row.startswith(facts + ",") for row in rows)


def test_the_commands_parse():
    commands = re.findall(
        r"^(?:python|torchrun.*?) encodec_tokenizer\.py (.*?)(?: +#.*)?$", README, re.M
    )
    assert len(commands) >= 4
    for command in commands:
        parse_settings(command.split())


def test_the_script_needs_nothing_but_requirements_txt():
    names = set(re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    code = (ROOT / "encodec_tokenizer.py").read_text()
    imported = set(re.findall(r"^ *(?:import|from) ([a-z_]+)", code, re.MULTILINE))
    optional = {"matplotlib", "pyarrow", "safetensors"}
    assert imported - set(sys.stdlib_module_names) - optional <= names
    assert names - imported == {"pandas"}  # README's example reads the CSV with it


def test_requirements_are_the_same_in_the_script_and_its_message():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line for line in lines if not line.startswith("#")}
    code = (ROOT / "encodec_tokenizer.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", code, re.MULTILINE | re.DOTALL)[1]
    inline = "\n".join(line.removeprefix("# ") for line in block.splitlines())
    assert set(re.findall(r'"([a-z][^"]*)",', inline)) == wanted
    assert set(mending("", is_missing=True).replace('"', "").split()) == wanted


def test_ci_runs_the_two_commands_of_the_readme(tmp_path):
    """Its own steps, in a clone of which the commands only say what they are."""
    commands = re.findall(r"^.*\.venv/bin.*$", README, re.MULTILINE)
    commands = [c for c in commands if not c.startswith(("In what", "`source"))]
    project = tmp_path / "project"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", project / ".ci" / "run")
    (project / "README.md").write_text(README)
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "git").write_text('#!/bin/sh\nmkdir "$4" && cp -r "$3/." "$4"\n')
    (fake / "bash").write_text('#!/bin/sh\necho "RUN: $2"\n')
    for tool in fake.iterdir():
        tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/bash", project / ".ci" / "run"], env=env, capture_output=True, text=True
    )
    ran = re.findall(r"^RUN: (.*)$", done.stdout, re.MULTILINE)
    assert ran == commands[:2] and len(ran) == 2
    assert ran[0].endswith("encodec_tokenizer.py --dataset sample")
    assert ran[1].endswith("-m pytest tests")
    assert done.returncode != 0  # no .venv was made, so the linter is not there
