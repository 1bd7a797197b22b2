"""README's examples and claims, run as they stand."""

import io
import os
import re
import shutil
import sys
from contextlib import redirect_stdout

from conftest import ROOT

import encodec_tokenizer
from encodec_tokenizer import parse_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_print_what_they_say(run, weights, tmp_path, monkeypatch):
    """The pretrained weights cannot be downloaded everywhere: the stand-in's take their place.

    The row that README shows is that of the example, but for its tokens.
    """
    out, sounds = tmp_path / "work" / "tokenized", tmp_path / "sounds"
    shutil.copytree(ROOT / "tests" / "sample", sounds)
    assert run("--dataset", "sample", "--output_dir", out)[0] == 0
    assert run("--audio_dir", sounds, "--output_dir", out, "--whole", "--parquet")[0] == 0
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encodec_tokenizer, "find_weights", lambda _: weights("encodec_24khz"))
    scope = {}
    assert len(EXAMPLES) == 4
    for example in EXAMPLES:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(example, scope)
        said = re.search(r"^print.*  # (.*)$", example, re.MULTILINE)[1]
        assert printed.getvalue() == said + "\n"
    header, *rows = (out / "tokenized_sample.csv").read_text().splitlines()
    shown = re.search(r"^(fname,labels.*),\.\.\.\n(.*)$", README, re.MULTILINE)
    facts = re.match(r'(.*"\(8, 150\)",\d+,[\d.]+),', shown[2])[1]
    assert header.startswith(shown[1]) and any(row.startswith(facts + ",") for row in rows)


def test_readme_has_at_most_225_lines_and_names_each_example():
    assert README.count("\n") <= 225
    for path in (ROOT / "tests" / "examples").glob("*.py"):
        assert f"`{path.name}`" in README


def test_the_commands_parse():
    commands = re.findall(
        r"(?:python|--nproc_per_node=4|/\S+) ?encodec_tokenizer\.py ([^`\n]*)", README
    )
    assert len(commands) >= 9
    for command in commands:
        if command != "--help":
            parse_settings(command.split())


def test_codebooks_of_each_bandwidth_are_as_stated(plain):
    def cells(first: str) -> list[str]:
        row = re.search(rf"^\| {re.escape(first)}.*", README, re.MULTILINE)[0]
        return [cell.strip() for cell in row.strip("|").split("|")[1:]]

    for rate in (24, 48):
        model = plain(f"encodec_{rate}khz")
        count = model.quantizer.get_num_quantizers_for_bandwidth
        for kbps, codebooks in zip(cells("`--bandwidth`"), cells(f"codebooks at {rate} kHz")):
            kbps = float(kbps.split()[0])
            is_offered = kbps in model.target_bandwidths
            assert codebooks == (str(count(model.frame_rate, kbps)) if is_offered else "-")


def test_the_script_needs_nothing_but_requirements_txt():
    names = set(re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    code = (ROOT / "encodec_tokenizer.py").read_text()
    imported = set(re.findall(r"^ *(?:import|from) ([a-z_]+)", code, re.MULTILINE))
    optional = {"matplotlib", "pyarrow", "safetensors"}
    assert imported - set(sys.stdlib_module_names) - optional <= names
    assert names - imported == {"pandas"}  # README's example reads the CSV with it
    block = re.search(r"^# /// script\n(.*?)^# ///$", code, re.MULTILINE | re.DOTALL)[1]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line for line in lines if not line.startswith("#")}
    assert set(re.findall(r'"([a-z][^"]*)",', block.replace("# ", ""))) == wanted


def test_ci_runs_the_two_commands_of_the_readme():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if ".venv" in line]
    assert len(commands) == 2
    assert commands[0].endswith("encodec_tokenizer.py --dataset sample")
    assert commands[1].endswith("-m pytest tests")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
