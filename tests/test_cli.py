import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import encodec_tokenizer
from encodec_tokenizer import UserError, parse_settings, resolve_device

SCRIPT = str(ROOT / "encodec_tokenizer.py")


def test_defaults_are_those_of_the_contract():
    settings = parse_settings([])
    assert (settings.dataset, settings.model, settings.bandwidth) == ("curated", "encodec_24khz", 6)
    assert (settings.target_duration, settings.overlap) == (2.0, 0.1)
    assert (settings.aggregate, settings.weights) == ("mean", "pretrained")
    assert (str(settings.input_dir), str(settings.output_dir)) == ("input", "work/tokenized")
    assert (settings.device, settings.max_duration) == ("auto", 600)
    assert settings.max_samples is None and not settings.overwrite and not settings.debug
    assert settings.plot is None and not settings.listen and not settings.parquet


@pytest.mark.parametrize("target, overlap, hop", [(2.0, 0.1, 43_200), (3.0, 0.5, 36_000)])
def test_chunk_and_hop_are_rounded_to_samples(target, overlap, hop):
    settings = parse_settings(["--target_duration", str(target), "--overlap", str(overlap)])
    assert (settings.chunk_samples, settings.hop_samples) == (round(target * 24_000), hop)


BAD_VALUES = [
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
]


@pytest.mark.parametrize("args, says", BAD_VALUES)
def test_what_cannot_be_meant_ends_in_one_sentence_and_status_2(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and "usage" not in err
    assert out == "" and len(err.splitlines()) <= 2


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="there is such a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_sentence_and_status_2(run):
    status, _, err = run("--dataset", "sample", device="cuda:99")
    assert status == 2
    assert err.startswith("error: --device cuda:99 cannot be used: ") and err.count("\n") == 1


def test_auto_goes_on_without_a_gpu_that_this_pytorch_has_no_kernels_for(monkeypatch, capfd):
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


def test_a_batch_is_so_many_seconds_of_audio():
    """So that long chunks take no more memory."""
    sizes = {
        seconds: resolve_device(parse_settings(["--device", "cpu", "--target_duration", seconds]))
        for seconds in ("0.5", "2", "8", "60")
    }
    assert [settings.batch_size for settings in sizes.values()] == [16, 4, 1, 1]
    assert resolve_device(parse_settings(["--device", "cpu", "--batch_size", "7"])).batch_size == 7


def test_help_shows_every_flag_its_default_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in parse_settings([]).__dataclass_fields__:
        assert f"--{flag}" in text
    for default in ("curated", "work/tokenized", "encodec_24khz", "6.0", "2.0", "0.1", "mean"):
        assert f"(default: {default})" in text
    assert "python encodec_tokenizer.py --dataset sample" in text


def without(folder, missing, *args):
    """The script in a process where importing the package `missing` fails.

    The others are empty shells, so that this takes no seconds.
    """
    (folder / "sitecustomize.py").write_text(
        f"""
import sys, types
from importlib.machinery import ModuleSpec

PACKAGES = "torch torchaudio encodec numpy pandas tqdm soundfile filelock".split()

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
    return subprocess.run(
        [sys.executable, SCRIPT, *args],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]},
    )


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


@pytest.mark.parametrize("flags", [["--listen", "1"], ["--parquet"], ["--plot"]], ids=str)
def test_missing_pandas_is_one_sentence_and_the_way_on(flags, run, monkeypatch):
    """It is imported late, and only by what is made from the CSV."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    status, _, err = run("--dataset", "sample", "--max_samples", "1", *flags)
    assert status in (1, 2)
    assert "pandas" in err.partition("pip install")[2]
    assert "Traceback" not in err


@pytest.mark.parametrize("args", [["--help"], ["--version"], *(args for args, _ in BAD_VALUES[:3])])
def test_help_and_mistakes_are_answered_before_torch_is_imported(args, tmp_path):
    """Which takes seconds."""
    (tmp_path / "torch.py").write_text("import os; os._exit(99)")
    done = subprocess.run(
        [sys.executable, SCRIPT, *args],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    if args == ["--version"]:
        assert done.stdout == f"{encodec_tokenizer.__version__}\n"
    assert done.returncode == (2 if len(args) > 1 else 0), done.stderr
    assert bool(done.stdout) != bool(done.stderr)


def test_torchaudio_of_another_torch_is_explained(tmp_path):
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('PyTorch has CUDA version 13.2')")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dataset", "sample"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 1
    assert "PyTorch has CUDA version 13.2" in done.stderr
    assert "'torch': '2." in done.stderr and "'torchaudio': '2." in done.stderr
    assert 'pip install "torch>=2.6,<2.12" "torchaudio>=2.6,<2.12"' in done.stderr
    assert "Traceback" not in done.stderr
