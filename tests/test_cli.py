"""The command line: defaults, mistakes, help, and what happens before PyTorch is there."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import encodec_tokenizer
from encodec_tokenizer import Settings, UserError, parse_settings, resolve_device

SCRIPT = str(ROOT / "encodec_tokenizer.py")


def script_beside(folder, *args, **environment) -> list:
    """What subprocess takes to start the script, with the modules of a folder before all others."""
    env = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], **environment}
    return {"args": [sys.executable, SCRIPT, *args], "env": env, "text": True}


def run_beside(folder, *args, **environment):
    return subprocess.run(**script_beside(folder, *args, **environment), capture_output=True)


def test_defaults_are_those_of_the_contract():
    settings = parse_settings([])
    assert settings == Settings()
    assert (settings.dataset, settings.model, settings.bandwidth) == ("curated", "encodec_24khz", 6)
    assert (settings.target_duration, settings.overlap, settings.whole) == (2.0, 0.1, False)
    assert (settings.aggregate, settings.weights) == ("mean", "pretrained")
    assert (str(settings.input_dir), str(settings.output_dir)) == ("input", "work/tokenized")
    assert (settings.device, settings.max_duration) == ("auto", 600)
    assert settings.max_samples is None and not settings.overwrite and not settings.debug
    assert settings.plot is None and not settings.parquet


@pytest.mark.parametrize("target, overlap, hop", [(2.0, 0.1, 43_200), (3.0, 0.5, 36_000)])
def test_chunk_and_hop_are_rounded_to_samples(target, overlap, hop):
    settings = parse_settings(["--target_duration", str(target), "--overlap", str(overlap)])
    assert (settings.chunk_samples, settings.hop_samples) == (round(target * 24_000), hop)


MISTAKES = [
    (["--bandwidth", "7"], "encodec_24khz offers 1.5, 3, 6, 12, 24 kbps"),
    (["--bandwidth", "1.5", "--model", "encodec_48khz"], "encodec_48khz offers 3, 6, 12, 24"),
    (["--target_duration", "0"], "0 is out of range: from 0.1 to 60"),
    (["--target_duration", "nan"], "nan is out of range"),
    (["--target_duration", "two"], "invalid float value: 'two'"),
    (["--overlap", "1.0"], "1.0 is out of range: from 0 to 0.9"),
    (["--overlap", "-0.1"], "-0.1 is out of range"),
    (["--max_samples", "0"], "0 is out of range"),
    (["--batch_size", "-4"], "-4 is out of range"),
    (["--workers", "0"], "0 is out of range"),
    (["--dataset", "other"], "invalid choice: 'other'"),
    (["--aggregate", "median"], "invalid choice: 'median'"),
    (["--device", "tpu"], "choose from auto, cpu, cuda, cuda:N"),
    (["--input-dir", "x"], "unrecognized arguments: --input-dir"),
    (["--whole", "--aggregate", "mean"], "--aggregate has no meaning with --whole"),
    (["--overlap", "0.1", "--whole"], "--overlap has no meaning with --whole"),
    (["--whole", "--target_duration", "2.0"], "--target_duration has no meaning with --whole"),
    (["--dataset", "test", "--audio_dir", "x"], "name two sets of clips; give one of them"),
    (["--metadata", "clips.csv"], "--metadata needs --audio_dir"),
    (["--metadata", str(ROOT)], f"is a folder. Name a CSV, or * --audio_dir {ROOT}"),
    (["--metadata", str(ROOT), "--audio_dir", "x"], "is a folder. Name a CSV"),
]


@pytest.mark.parametrize("args, says", MISTAKES)
def test_a_mistake_ends_in_one_sentence_and_status_2(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert all(part in err for part in says.split("*")) and "usage" not in err
    assert out == "" and len(err.splitlines()) <= 2


@pytest.mark.parametrize("flag, package", [("--plot", "matplotlib"), ("--parquet", "pyarrow")])
def test_a_flag_without_its_package_says_what_to_install(flag, package, monkeypatch, capsys):
    monkeypatch.setattr(encodec_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        parse_settings([flag])
    assert stop.value.code == 2 and f"pip install {package}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="there is such a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_sentence_and_status_2(run):
    status, _, err = run("--dataset", "sample", device="cuda:99")
    assert status == 2
    assert err.startswith("error: --device cuda:99 cannot be used: ") and err.count("\n") == 1


def test_auto_takes_the_cpu_where_pytorch_has_no_kernels_for_the_gpu(monkeypatch, capfd):
    """PyTorch sees Kaggle's P100 and fails at the first convolution; here any convolution fails."""

    def no_kernel(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(encodec_tokenizer.F, "conv1d", no_kernel)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))
    settings = resolve_device(parse_settings([]))
    assert settings.device == "cpu" and settings.batch_size == 4
    err = capfd.readouterr().err
    assert "no kernel image is available" in err and "Compile" not in err
    with pytest.raises(UserError, match=r"--device cuda cannot be used: .*no kernel image"):
        resolve_device(parse_settings(["--device", "cuda"]))


@pytest.mark.parametrize(
    "flags, size",
    [
        ("--target_duration 0.5", 16),
        ("--target_duration 2", 4),
        ("--target_duration 60", 1),
        ("--batch_size 7", 7),
        ("--whole", 1),
        ("--whole --model encodec_48khz", 4),  # of the model's segments of 1 s
    ],
)
def test_a_batch_is_counted_in_seconds_of_audio(flags, size):
    """So that long chunks take no more memory."""
    settings = parse_settings(["--device", "cpu", *flags.split()])
    assert resolve_device(settings).batch_size == size


def test_help_shows_every_flag_with_its_default_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    _, *helps = re.split(r" --(?=\w+ )", text.partition("options:")[2].partition("examples:")[0])
    helps = dict(part.split(" ", 1) for part in helps)
    assert set(helps) >= {setting.name for setting in fields(Settings)}
    for setting in fields(Settings):
        if setting.default not in (None, False):
            assert f"(default: {setting.default})" in helps[setting.name]
        if setting.name in ("batch_size", "workers", "max_samples"):
            assert "(default: " in helps[setting.name]
    assert "python encodec_tokenizer.py --dataset sample" in text


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda setting: setting.name)
def test_a_help_text_starts_with_what_the_flag_does(setting):
    """So that no text is a fragment that begins with an article or a question word."""
    other = "an?|the|any|all|what|where|whether|which|how|of|for|if|only"
    assert not re.match(rf"({other})\b", setting.metadata["help"], re.IGNORECASE)


def test_the_untrained_banner_is_not_printed_before_a_refusal(run):
    flags = ["--dataset", "sample", "--max_samples", "1", "--target_duration", "0.5"]
    status, _, err = run(*flags)
    assert status == 0 and "UNTRAINED WEIGHTS" in err
    status, _, err = run(*flags, "--bandwidth", "3")
    assert status == 2 and "--bandwidth: 6.0 -> 3.0" in err and "UNTRAINED" not in err


# ----------------------------------------------------------------------- before PyTorch is there


def without(folder, missing, *args):
    """The script in a process where importing the package `missing` fails.

    The others are empty shells, so that this takes no seconds.
    """
    (folder / "sitecustomize.py").write_text(
        f"""
import sys, types
from importlib.machinery import ModuleSpec

PACKAGES = "torch torchaudio encodec numpy tqdm soundfile".split()

class Shell(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {{}})

class Shells:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{package!r}}", name=package)
        return ModuleSpec(name, self, is_package=True) if package in PACKAGES else None
    def create_module(self, spec):
        return Shell(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Shells())
"""
    )
    return run_beside(folder, *args)


REQUIREMENTS = [
    line.split(">")[0].strip()
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("package", [name for name in REQUIREMENTS if name != "pandas"])
def test_a_missing_package_is_one_sentence_and_the_way_on(package, tmp_path):
    done = without(tmp_path, package, "--dataset", "sample")
    assert done.returncode == 1
    assert f"No module named '{package}'" in done.stderr
    assert package in done.stderr.partition("pip install")[2]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], *(args for args, _ in MISTAKES[-5:])])
def test_help_and_mistakes_are_answered_before_torch_is_imported(args, tmp_path):
    """Which takes seconds."""
    (tmp_path / "torch.py").write_text("import os; os._exit(99)")
    done = run_beside(tmp_path, *args)
    if args == ["--version"]:
        assert done.stdout == f"{encodec_tokenizer.__version__}\n"
    assert done.returncode == (2 if len(args) > 1 else 0), done.stderr
    assert bool(done.stdout) != bool(done.stderr)


PAIRS = {  # the installed torch -> the line that mends it
    "2.9.1": "torchaudio==2.9.1",
    "2.9.1+cu126": "torchaudio==2.9.1",
    "2.13.0+cpu": '--force-reinstall "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"',
    "2.11.0": '--upgrade "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"',
    "2.15.0": '--upgrade "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"',
}


@pytest.mark.parametrize("version, line", PAIRS.items(), ids=PAIRS)
def test_the_line_mends_the_pair_that_is_installed(version, line):
    assert encodec_tokenizer.mending(version, is_missing=False) == line


def test_torchaudio_of_another_torch_is_explained(tmp_path):
    (tmp_path / "torchaudio.py").write_text(
        "raise OSError('Could not load this library') from OSError('undefined symbol: x')"
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dataset", "sample"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 1
    assert "Could not load this library (undefined symbol: x)" in done.stderr
    assert "'torch': '2." in done.stderr and "'torchaudio': '2." in done.stderr
    assert "  pip install --" in done.stderr or "  pip install torchaudio==2." in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_python_imports_ends_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(**script_beside(tmp_path, "--dataset", "sample"), **pipes)
    try:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "interrupted before the run began\n"


NAME = "CUBLAS_WORKSPACE_CONFIG"


@pytest.mark.parametrize("given, expected", [({}, ":4096:2"), ({NAME: ":16:8"}, ":16:8")])
def test_cublas_is_deterministic_unless_the_user_has_a_say(given, expected, tmp_path):
    """PyTorch's page on torch.nn.LSTM asks for it. It has to be there before CUDA starts."""
    (tmp_path / "torch.py").write_text(f"import os, sys; sys.exit(os.environ[{NAME!r}])")
    done = run_beside(tmp_path, "--dataset", "sample", **given)
    assert done.stderr == f"{expected}\n"


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank, monkeypatch, capsys):
    """Nobody would write the CSV of a Slurm array that counts from 1."""
    monkeypatch.setattr(encodec_tokenizer, "RANK", rank)
    monkeypatch.setattr(encodec_tokenizer, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit) as stop:
        parse_settings([])
    assert stop.value.code == 2 and "ranks count from 0" in capsys.readouterr().err
