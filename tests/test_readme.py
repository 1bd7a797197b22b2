"""README's examples and claims, run as they stand."""

import io
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stdout

import pytest
from conftest import ROOT

from encodec_tokenizer import parse_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_examples():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def tokenized_sample(run, tmp_path, monkeypatch):
    assert run("--dataset", "sample", "--output_dir", tmp_path / "work" / "tokenized")[0] == 0
    monkeypatch.chdir(tmp_path)


def test_the_examples_print_what_they_say(tokenized_sample):
    scope = {}
    examples = python_examples()
    assert len(examples) == 3
    for example in examples:
        out = io.StringIO()
        with redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(example, scope)
        said = re.search(r"^print.*  # (.*)$", example, re.MULTILINE)[1]
        assert out.getvalue() == said + "\n"
    assert scope["tokens"][4, 1, 2] == scope["table"].iloc[4]["token_152"]
    assert scope["bags"].sum(axis=1).tolist() == [8 * 150] * 12
    click = scope["table"].index[scope["table"]["fname"] == "click.wav"][0]  # 0.3 s of 2
    assert (scope["ids"][click] == scope["padding"]).sum() == 8 * (150 - 23)


def test_every_flag_is_in_the_table_with_its_default():
    settings = parse_settings(["--device", "cpu"])
    for flag in settings.__dataclass_fields__:
        (row,) = re.findall(rf"^\|.*`--{flag}`.*? \| (.*?) \|", README, re.MULTILINE)
        default = getattr(settings, flag)
        if default not in (None, False) and flag != "device":
            stated = row.strip("`").split(";")[0]
            assert stated in (str(default), f"{default:g}" if isinstance(default, float) else "")


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
    assert imported - set(sys.stdlib_module_names) - {"matplotlib"} <= names  # --plot asks for it


def test_ci_runs_the_two_commands_of_the_readme():
    commands = re.findall(r"^.*\.venv/bin.*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("encodec_tokenizer.py --dataset sample")
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
